"""The tasks of the `miniwob` package (MiniWoB++, Farama Foundation): its HTML pages, driven by this package's browser.

Success is raw reward == 1, the package's binary rule (BrowserGym counts raw > 0; partial-credit tasks differ). The
page is loaded afresh for every episode, because an in-place restart leaves widgets behind; the time limit is lifted to
1e6 ms, so slow models are not punished; the START cover and the reward display never show. The package is located
without importing it: its `__init__` pulls in selenium, which is not needed. The pages and their libraries have their
own licences and are not shipped here.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .allow import AllowList
from .tab import Tab
from .task import Task, Verdict

SCREEN = (160, 210)
_TIME_LIMIT_MS = 1_000_000

_START = """
async ([seed, limit]) => {
  const style = document.createElement('style');
  style.textContent = '#reward-display, #click-canvas, #sync-task-cover { display: none !important; }';
  document.head.append(style);
  core.EPISODE_MAX_TIME = limit;
  Math.seedrandom(seed);
  core.startEpisodeReal();
  while (!WOB_TASK_READY) await new Promise((again) => setTimeout(again, 20));
}
"""
_GOAL = "() => { const u = core.getUtterance(); return typeof u === 'string' ? u : u.utterance; }"
_STATE = "() => typeof core === 'undefined' ? null : [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL, WOB_REWARD_REASON || '']"


class MiniwobMissing(RuntimeError):
    """The package with the pages is not installed."""


@cache
def html_root() -> Path:
    """Folder of the package's HTML. Raises `MiniwobMissing` with the install command."""
    spec = find_spec("miniwob")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        folder = Path(root) / "html"
        if folder.is_dir():
            return folder
    raise MiniwobMissing(
        'the MiniWoB++ pages are not installed; run `pip install "agentkv[miniwob]"` '
        "(or `pip install miniwob --no-deps`)"
    )


def page_ids() -> list[str]:
    """Every page of the package by its bare name, sorted (130 in version 1.1)."""
    return sorted(path.stem for path in (html_root() / "miniwob").glob("*.html"))


class MiniwobTask(Task):
    """One page of the package; `name` as in `page_ids()`. `max_steps` counts actions."""

    def __init__(self, name: str, max_steps: int = 20) -> None:
        page = html_root() / "miniwob" / f"{name}.html"
        if not page.is_file():
            raise ValueError(f"{name!r} is not a page of the miniwob package")
        self.id = name
        self.url = page.resolve().as_uri()
        self.viewport = SCREEN
        self.max_steps = max_steps
        self.allow = AllowList(folders=(html_root(),))

    def setup(self, tab: Tab, seed: int) -> None:
        """Start the page's own episode of this seed, with a time limit that never comes."""
        tab.evaluate(_START, [seed, _TIME_LIMIT_MS])

    def goal(self, tab: Tab) -> str:
        """The page's utterance in one line."""
        return " ".join(tab.evaluate(_GOAL).split())

    def verdict(self, tab: Tab, answer: str | None = None) -> Verdict:
        """The page's own reward, 0 until it is done; leaving it ends the episode at -1."""
        here = tab.page.url.partition("#")[0]
        state = tab.evaluate(_STATE) if here == self.url else None
        if state is None:
            return Verdict(True, -1.0, "the agent left the task's page")
        done, raw, reason = state
        return Verdict(bool(done), float(raw) if done else 0.0, str(reason))
