"""Our own tasks that need memory: what an earlier screen showed is asked on a later one.

The pages are plain HTML in `envs/pages`, drawn from a seed by their own small generator, on MiniWoB's screen of
160 x 210 CSS px. A page offers `window.task` = {start(seed), goal(), done(), reward(), reason()}; reward is 1 or -1
once it is done. Moving on removes a screen from the document. `chance` is the success of an agent that reads the last
screen and guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlencode

from .allow import AllowList
from .tab import Tab
from .task import Task, Verdict

SCREEN = (160, 210)


@dataclass(frozen=True)
class MemoryPage:
    """A page with parameters: `steps` = actions of a perfect run, `chance` = success by guessing (0..1)."""

    page: str
    steps: int
    chance: float
    parameters: tuple[tuple[str, int], ...] = ()


PAGES = {
    "memory-code": MemoryPage("memory-code", 4, 1 / 100),
    "memory-code-3": MemoryPage("memory-code", 5, 1 / 1000, (("digits", 3),)),
    "memory-code-long": MemoryPage("memory-code", 7, 1 / 100, (("between", 4),)),
    "memory-code-typed": MemoryPage("memory-code", 5, 1 / 100, (("typed", 1),)),
    "memory-changed": MemoryPage("memory-changed", 2, 1 / 3),
    "memory-colour": MemoryPage("memory-colour", 3, 1 / 4),
    "memory-colour-long": MemoryPage("memory-colour", 6, 1 / 4, (("between", 4),)),
    "memory-colour-rounds": MemoryPage("memory-colour", 40, 1 / 4**10, (("between", 2), ("rounds", 10))),
    "memory-place": MemoryPage("memory-place", 3, 1 / 9),
    "memory-order": MemoryPage("memory-order", 6, 1 / 6),
    "memory-first": MemoryPage("memory-order", 4, 1 / 3, (("asked", 1),)),
}


class MemoryTask(Task):
    """One of `PAGES`; `max_steps` defaults to twice a perfect run plus four."""

    def __init__(self, name: str, max_steps: int | None = None) -> None:
        spec = PAGES[name]
        folder = Path(str(files("agentkv.envs"))) / "pages"
        address = (folder / f"{spec.page}.html").resolve().as_uri()
        self.id = name
        self.url = f"{address}?{urlencode(spec.parameters)}" if spec.parameters else address
        self.viewport = SCREEN
        self.max_steps = max_steps or 2 * spec.steps + 4
        self.chance = spec.chance
        self.allow = AllowList(folders=(folder,))

    def setup(self, tab: Tab, seed: int) -> None:
        """Start the page's own episode of this seed."""
        tab.evaluate("seed => task.start(seed)", seed)

    def goal(self, tab: Tab) -> str:
        """What the page asks for."""
        return tab.evaluate("() => task.goal()")

    def verdict(self, tab: Tab, answer: str | None = None) -> Verdict:
        """The page's own word; leaving it ends the episode at -1."""
        if tab.page.url.partition("#")[0] != self.url:
            return Verdict(True, -1.0, "the agent left the task's page")
        done, raw, reason = tab.evaluate("() => [task.done(), task.reward(), task.reason()]")
        return Verdict(done, float(raw), reason)
