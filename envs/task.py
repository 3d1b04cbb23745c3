"""What a task is: an address, a screen, a goal, a verdict. Environments run tasks and know nothing else of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .allow import AllowList
from .tab import Tab


@dataclass(frozen=True)
class Verdict:
    """Is the episode over, and how good was it: `raw_reward` in -1..1, exactly 1 = solved; `reason` in words."""

    done: bool
    raw_reward: float = 0.0
    reason: str = ""


class Task(ABC):
    """One task. `setup` runs once per episode on a freshly loaded page; `verdict` after every action.

    id: its name. url: what to open. viewport: (width, height) in CSS pixels. max_steps: actions before truncation.
    allow: what its page may load. machine_fonts: a browser of the environment's own draws it with the machine's fonts.
    """

    id: str
    url: str
    viewport: tuple[int, int]
    max_steps: int
    allow: AllowList
    machine_fonts: bool = False

    @abstractmethod
    def setup(self, tab: Tab, seed: int) -> None:
        """Make the loaded page the episode of `seed`."""

    @abstractmethod
    def goal(self, tab: Tab) -> str:
        """What the agent is asked to do, after `setup`."""

    @abstractmethod
    def verdict(self, tab: Tab, answer: str | None = None) -> Verdict:
        """The state now; `answer` is the text of `Finished`, None while the agent goes on."""
