"""Any page by its address, with a goal in words: the agent ends the episode itself, a checker of yours may grade it.

Only the address's own origin can be reached (for a file: its folder); name further origins with `allow`. Without a
checker nobody knows whether the goal was met, so the raw reward stays 0. A page from outside is untrusted input:
what it says is data for the model, and running it at all is safest in a container.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from playwright.sync_api import Page

from .allow import AllowList, file_path, origin
from .browser import Browser
from .tab import Tab
from .task import Task, Verdict
from .web import WebEnv

SCREEN = (1280, 720)
Checker = Callable[[Page, str], bool]


def own_place(url: str) -> AllowList:
    """What `url` alone gives access to: its origin, or the folder of its file. Raises ValueError for any other
    address.
    """
    if origin(url) and url.partition(":")[0] in ("http", "https"):
        return AllowList(origins=(url,))
    path = file_path(url)
    if path is None:
        raise ValueError(
            f"url={url!r} cannot be opened; use an address like https://example.com or file:///folder/page.html"
        )
    if not path.is_file():
        raise ValueError(f"url={url!r} names no file; check the path {path}")
    return AllowList(folders=(path.parent,))


def page_says(text: str) -> Checker:
    """A checker: the page that the agent finished on shows `text` (white space and case aside)."""
    wanted = " ".join(text.split()).casefold()
    if not wanted:
        raise ValueError("the expected text is empty; give words that the last page shows")

    def check(page: Page, answer: str) -> bool:
        return wanted in " ".join(page.inner_text("body").split()).casefold()

    return check


class LiveTask(Task):
    """`url` with a `goal`. `checker(page, answer)` decides when the agent has finished; seeds change nothing here.

    viewport: (width, height) in CSS px. allow: further http(s) origins. Raises ValueError for an address that is not
    http, https or an existing file, and for an empty goal.
    """

    machine_fonts = True  # nobody trained on it, and it may be in any script

    def __init__(
        self,
        url: str,
        goal: str,
        viewport: tuple[int, int] = SCREEN,
        max_steps: int = 30,
        allow: Sequence[str] = (),
        checker: Checker | None = None,
    ) -> None:
        if not goal.strip():
            raise ValueError("goal is empty; say what the agent should do")
        if min(viewport) < 1:
            raise ValueError(f"viewport={viewport} is no screen; use (width, height) such as {SCREEN}")
        self.id = "live"
        self.url = url
        self.viewport = viewport
        self.max_steps = max_steps
        self.allow = own_place(url) | AllowList(tuple(allow))
        self._goal = goal.strip()
        self._checker = checker

    def setup(self, tab: Tab, seed: int) -> None:
        """Nothing: the page is as its server made it."""

    def goal(self, tab: Tab) -> str:
        """The goal that was given with the address."""
        return self._goal

    def verdict(self, tab: Tab, answer: str | None = None) -> Verdict:
        """Done when the agent says so; the reward is the checker's word, 0 without one."""
        if answer is None:
            return Verdict(False)
        if self._checker is None:
            return Verdict(True, 0.0, "the agent finished; no checker was given, so success is unknown")
        with tab.guard():
            solved = self._checker(tab.page, answer)
        return Verdict(True, 1.0 if solved else 0.0, "the checker agreed" if solved else "the checker did not agree")


def make(
    url: str,
    goal: str,
    browser: Browser | None = None,
    device_scale: float = 1.0,
    viewport: tuple[int, int] = SCREEN,
    max_steps: int = 30,
    allow: Sequence[str] = (),
    checker: Checker | None = None,
    **options: Any,
) -> WebEnv:
    """An environment for any address; arguments as in `LiveTask`, `options` go to `WebEnv` (time-outs)."""
    return WebEnv(LiveTask(url, goal, viewport, max_steps, allow, checker), browser, device_scale, **options)
