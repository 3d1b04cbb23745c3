"""When a page is at rest: no document on its way, nothing moving that ends, what it asked for is there."""

from __future__ import annotations

import math
import time
from typing import Any

from playwright.sync_api import Error, Frame, Page, Request

from .events import URL_LENGTH
from .patience import GivenUp, Patience

_ENDLESS = ("eventsource", "websocket", "media", "ping")
_TICK = 10  # milliseconds
_ROUNDS = 4  # what came may ask for more
_RELOADS = 3  # documents within one wait: the page does not stop loading itself
_JUST_NOW = 1.0  # seconds
DOCUMENT = 5.0  # seconds that a document may be on its way before the old page is shown

# two frames are drawn, so that what the new styles need is asked for;
# pictures from files are waited for here, because a request may be reported only after this script has answered;
# then scrolling and CSS and jQuery animations that end by themselves may run out
_SETTLE = """
async (cap) => {
  const end = performance.now() + cap;
  const frame = () => new Promise(requestAnimationFrame);
  let scrolled = -Infinity;
  const onScroll = () => { scrolled = performance.now(); };
  addEventListener('scroll', onScroll, true);
  const moving = (a) => a.playState === 'running' && isFinite(a.effect.getComputedTiming().endTime);
  const busy = () => document.getAnimations().some(moving) || (window.jQuery && jQuery.timers && jQuery.timers.length)
    || performance.now() - scrolled < 60;
  await frame();
  if (location.protocol === 'file:') {
    const urls = [...document.querySelectorAll('*')].map((e) => getComputedStyle(e).backgroundImage.slice(5, -2));
    const files = [...new Set(urls)].filter((url) => url.startsWith('file:'));
    const pictures = files.map((url) => Object.assign(new Image(), {src: url}));
    const shown = [...pictures, ...document.images].map((picture) => picture.decode().catch(() => 0));
    await Promise.race([Promise.all(shown), new Promise((late) => setTimeout(late, cap))]);
  }
  do await frame(); while (busy() && performance.now() < end);
  removeEventListener('scroll', onScroll, true);
  return Boolean(busy());
}
"""


class Rest:
    """Watches one page: what it loads, whether a document is on its way, and runs scripts when it can answer."""

    def __init__(self, page: Page, patience: Patience) -> None:
        self.page = page
        self._patience = patience
        self._loading: set[Request] = set()
        self._document: Request | None = None
        self._commits = 0
        self._last_commits = (-math.inf, -math.inf)  # when they were
        self._asking = 0
        self._expected = 0  # commits that are to come before the page is at rest
        page.on("request", self._on_start)
        page.on("requestfinished", self._on_end)
        page.on("requestfailed", self._on_end)
        page.on("framenavigated", self._on_commit)

    def _on_start(self, request: Request) -> None:
        if request.resource_type not in _ENDLESS:
            self._loading.add(request)
        if self._replaces(request):
            self._document = request
            if self._asking:
                self._unblock(request)

    def _replaces(self, request: Request) -> bool:
        try:
            return request.is_navigation_request() and request.frame == self.page.main_frame
        except Error:
            return False  # a page that is being opened has no frame yet

    def _on_end(self, request: Request) -> None:
        self._loading.discard(request)
        if request == self._document:
            self._document = None

    def _on_commit(self, frame: Frame) -> None:
        if frame == self.page.main_frame:
            self._document = None
            self._commits += 1
            self._last_commits = (self._last_commits[1], time.monotonic())

    @property
    def restless(self) -> bool:
        """A document is on its way, or one has replaced another just now."""
        return self._document is not None or time.monotonic() - self._last_commits[0] < _JUST_NOW

    def _late(self, request: Request) -> str:
        return f"the page is still loading {request.url[:URL_LENGTH]}; the old page is shown"

    def _unblock(self, request: Request) -> None:
        """Chromium lets a script wait while the page's next document is on its way; runs beside that script."""
        if not self._arrives() and self._asking:
            self._patience.give_up(self._late(request))

    def _arrives(self) -> bool:
        """Whether the document that is on its way comes, or the one that the page asks for in its place."""
        end = time.monotonic() + DOCUMENT
        while self._document is not None and time.monotonic() < end:
            self.page.wait_for_timeout(_TICK)
        return self._document is None

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run our own script in the page and return its value; a document on its way is waited for.

        Raises `GivenUp` when it does not come, and when every new try meets a new document.
        """
        request = self._document
        if request is not None and not self._arrives():
            raise GivenUp(self._late(request))
        end, commits = time.monotonic() + DOCUMENT, self._commits
        while True:
            self._asking += 1
            try:
                return self.page.evaluate(script, argument)
            except Error as error:
                if "context was destroyed" not in error.message:
                    raise
                if time.monotonic() > end or self._commits - commits > _RELOADS:
                    raise GivenUp("the page loads itself again and again") from error
                self.page.wait_for_timeout(_TICK)
            finally:
                self._asking -= 1

    @property
    def expecting(self) -> bool:
        """A document was asked for and is not shown yet."""
        return self._commits < self._expected

    def expect(self) -> None:
        """The next document was asked for: wait for it, though Chromium has not announced it yet."""
        self._expected = self._commits + 1

    def settle(self, cap: float) -> str:
        """Wait for rest, at most `cap` seconds for each kind of movement; returns what is still going on, or "". Raises
        `GivenUp`.
        """
        end = time.monotonic() + cap
        while self.expecting and self._document is None and time.monotonic() < end:
            self.page.wait_for_timeout(_TICK)
        self._expected = 0
        moving = self.evaluate(_SETTLE, cap * 1000)
        end, round_ = time.monotonic() + cap, 0
        while self._loading and time.monotonic() < end and round_ < _ROUNDS:
            self._wait_for_loads(end)
            moving = self.evaluate(_SETTLE, cap * 1000)
            round_ += 1
        late = bool(self._loading)
        self.forget()
        return "the page is still loading parts of itself" if late else "the page is still moving" if moving else ""

    def _wait_for_loads(self, end: float) -> None:
        """Pictures that an action brought up (the icon of a dialog) must be there before the screen is shown."""
        while self._loading and time.monotonic() < end:
            self.page.wait_for_timeout(5)

    def forget(self) -> None:
        """What had its time is not waited for once more: a request that hangs must not slow every later step."""
        self._loading.clear()
