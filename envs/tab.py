"""What one episode sees of a browser: its pages (one is shown), their picture, the browser's own windows over them.

What a page may reach is boundary.py's, files transfers.py's, dialogs dialogs.py's, waiting rest.py's. Here they meet:
the newest page is shown, keys that pages leave alone do what a browser does, permissions are denied but for writing
the clipboard. All of it is recorded; the agent is told what concerns it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, CDPSession, Error, Page, Request, TimeoutError

from . import chords, pickers
from .actions import MODIFIER_KEYS, Action, CallUser, Finished, parts
from .allow import AllowList
from .boundary import ERROR_PAGE, Boundary, forgive
from .context import empty_clipboard, isolated
from .dialogs import DIALOG, MOST_DIALOGS, Dialogs, Policy
from .events import Blocked, Record
from .history import travel
from .patience import GivenUp, Patience
from .picture import capture
from .rest import Rest
from .sheet import Sheet
from .transfers import Transfers

_MOMENT = 0.5  # seconds
_PAUSE = 100  # milliseconds between two gestures of one answer, as pyautogui makes them
_MOST_PAGES = 10
_ANNOUNCED = 3.0  # seconds
_LONGEST_REST = 15.0  # seconds after which another new tab is not waited for
_LAST_DOCUMENT = 300  # milliseconds that one may need to come to its end; Chromium does not close a page meanwhile


class BrowserCrashed(RuntimeError):
    """The page or the browser process is gone; `Browser.relaunch()` (or the environment's `reset`) starts afresh."""


class PageNotLoaded(RuntimeError):
    """An address could not be opened: it never answered, or it is not on the allow-list."""


@dataclass(frozen=True)
class Manners:
    """What a tab does with what is not the page's: `dialogs` answers dialogs (accept, dismiss, or ask the agent),
    `files` is the folder whose files may be uploaded, `downloads` where downloads go; None refuses them.
    """

    dialogs: Policy = "dismiss"
    files: Path | None = None
    downloads: Path | None = None


@dataclass(frozen=True)
class _Shown:
    """A page with what watches it."""

    page: Page
    session: CDPSession
    rest: Rest


class Tab:
    """A context with the pages of one episode; `record` grows as they try things, `script` runs first in every
    document.
    """

    def __init__(
        self,
        browser: Browser,
        allow: AllowList,
        viewport: tuple[int, int],
        device_scale: float,
        script: str = "",
        manners: Manners | None = None,
    ) -> None:
        manners = manners or Manners()
        self.allow = allow
        self.viewport = viewport
        self.device_scale = device_scale
        self.record = Record()
        self.patience = Patience(lambda milliseconds: self.page.wait_for_timeout(milliseconds))
        self.boundary = Boundary(allow, self.record)
        self.dialogs = Dialogs(manners.dialogs, self.record, self.patience, self._on_endless)
        self.transfers = Transfers(manners.files, manners.downloads, self.record)
        self._browser = browser
        self._dead = ""
        self._pages: list[_Shown] = []  # the last one is shown
        self._coming: dict[str, float] = {}  # what Chromium announced: until when it is waited for
        self._last: np.ndarray | None = None
        with self.guard():
            self.context = isolated(browser, allow, viewport, device_scale, self.transfers.kept is not None, script)
            self.boundary.guard_context(self.context)
            self._add(self.context.new_page())
            self.context.on("page", self._on_page)
            empty_clipboard(self._pages[0].session)

    @property
    def page(self) -> Page:
        """The page that is shown."""
        return self._pages[-1].page

    @property
    def blocked(self) -> list[Blocked]:
        """What was refused since the record was taken."""
        return self.record.blocked

    @property
    def sheet(self) -> Sheet | None:
        """What the browser asks at the moment, over the page."""
        return self.dialogs.sheet or self.transfers.sheet

    def _add(self, page: Page) -> None:
        """Watch `page` and show it; without metrics of its own a capture would reset the page's to scale 1."""
        width, height = self.viewport
        session = self.context.new_cdp_session(page)
        metrics = {"width": width, "height": height, "deviceScaleFactor": self.device_scale, "mobile": False}
        session.send("Emulation.setDeviceMetricsOverride", metrics)
        page.on("crash", lambda _: self._mark_dead("the page crashed"))
        page.on("dialog", self.dialogs.on_dialog)
        page.on("close", self._on_close)
        page.on("requestfailed", self._on_failed)
        for end in ("download", "framenavigated"):
            page.on(end, lambda _: self._coming.pop("download", None))
        page.on("filechooser", lambda _: self._coming.pop("file", None))
        session.on("Page.windowOpen", lambda _: self._await("tab"))
        self.boundary.guard_page(page, session)
        self.transfers.watch(page, session)
        pickers.install(session, self._hear)
        self._pages.append(_Shown(page, session, Rest(page, self.patience)))

    def _on_page(self, page: Page) -> None:
        """A page opened another one."""
        if not any(shown.page == page for shown in self._pages):
            self._admit(page)
        self._coming.pop("tab", None)

    def _admit(self, page: Page) -> None:
        reason = "" if page.url.startswith((ERROR_PAGE, ":")) else self.allow.refusal(page.url)
        if len(self._pages) >= _MOST_PAGES:
            reason = f"an episode may have {_MOST_PAGES} tabs"
        if reason:
            self.record.refuse("popup", page.url, reason)
        if reason or page.url.startswith((ERROR_PAGE, ":")):
            forgive(page.close)
            return
        forgive(lambda: self._add(page))
        self.record.tell(f"a new tab was opened and is shown: {page.url} ({len(self._pages)} tabs are open)")

    def _on_close(self, page: Page) -> None:
        self._pages = [shown for shown in self._pages if shown.page != page or len(self._pages) == 1]
        if not self._dead and self._browser.is_connected() and not self.page.is_closed():
            self.record.tell(f"a tab was closed; {self.page.url} is shown")

    def _on_failed(self, request: Request) -> None:
        """A document that turns out to be a download is broken off before the download is announced."""
        if request.is_navigation_request() and request.failure == "net::ERR_ABORTED":
            self._await("download")

    def _on_endless(self) -> None:
        if not self._dead:
            self._mark_dead(f"the page opened more than {MOST_DIALOGS} dialogs")
            for shown in list(self._pages):
                forgive(shown.page.close)

    def _mark_dead(self, why: str) -> None:
        self._dead = self._dead or why

    def _hear(self, message: dict[str, Any]) -> None:
        """Keys that the page left to the browser, a form that was not sent."""
        if "invalid" in message:
            self.record.tell(f"the form was not sent: {message['field']}: {message['invalid']}")
        elif "coming" in message:
            self._await(message["coming"])
        else:
            does, why_not = chords.meaning(message["keys"])
            self._await("keys")
            if why_not:
                self.record.tell(why_not)
            elif does:
                forgive(lambda: self._do(does))
            self._coming.pop("keys", None)

    def _await(self, what: str) -> None:
        self._coming[what] = time.monotonic() + _ANNOUNCED

    def _do(self, what: str) -> None:
        if what == "reload":
            self._pages[-1].rest.expect()
            self._pages[-1].session.send("Page.reload")
        elif what in ("back", "forward"):
            refused = travel(self.page, -1 if what == "back" else 1)
            if refused:
                self.record.tell(refused)
            elif not self.page.is_closed():
                self._pages[-1].rest.expect()
        elif len(self._pages) == 1:
            self.record.tell("there is one tab only; nothing was done")
        elif what == "close":
            self.page.close()
        else:
            self._switch(what)

    def _switch(self, what: str) -> None:
        """The shown page is the last of the list, so switching turns it; numbers count from the oldest page."""
        if what in ("next", "previous"):
            turn = 1 if what == "next" else -1
            self._pages = self._pages[turn:] + self._pages[:turn]
        else:
            ages = [page for page in self.context.pages if any(shown.page == page for shown in self._pages)]
            number = min(int(what.split()[1]), len(ages))
            wanted = ages[-1] if what == "tab 9" else ages[number - 1]
            self._pages.sort(key=lambda shown: shown.page == wanted)
        self.page.bring_to_front()
        self.record.tell(f"another tab is shown: {self.page.url}")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn Playwright's errors about a dead page or browser into `BrowserCrashed`; others pass."""
        try:
            yield
        except Error as error:
            pages = getattr(self, "_pages", [])
            gone = not self._browser.is_connected() or (bool(pages) and self.page.is_closed())
            if self._dead or gone or "crashed" in error.message:
                why = self._dead or ("the page is closed" if self._browser.is_connected() else "the browser is gone")
                raise BrowserCrashed(f"{why}; reset the environment to go on with a fresh one") from error
            raise

    def goto(self, url: str, timeout: float) -> None:
        """Open `url` and wait for its load event, at most `timeout` seconds. Raises `PageNotLoaded`."""
        with self.guard():
            end = time.monotonic() + timeout
            self.boundary.expect()
            try:
                self.page.goto(url, timeout=timeout * 1000, wait_until="commit")
                self._load(end)
            except TimeoutError as error:
                raise PageNotLoaded(
                    f"{url} did not load within {timeout:g} s; check the address or raise load_timeout"
                ) from error
            except Error as error:
                if self._dead or self.page.is_closed() or not self._browser.is_connected():
                    raise
                reason = self.boundary.why_not(url) or error.message.splitlines()[0]
                raise PageNotLoaded(f"{url} could not be opened: {reason}") from error

    def _load(self, end: float) -> None:
        """Wait for the load event until `end`; only a moment for a page that went elsewhere, as that broke it off, and
        for one that asks first.
        """
        while self.dialogs.sheet is None:
            try:
                self.page.wait_for_load_state("load", timeout=max(min(_MOMENT, end - time.monotonic()), 0.001) * 1000)
                return
            except TimeoutError:
                if self.boundary.away:
                    raise Error(self.boundary.away) from None
                if time.monotonic() >= end:
                    raise

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run our own script in the page that is shown and return its value. Raises `GivenUp` for a page that
        cannot answer now.
        """
        with self.guard():
            if self.dialogs.sheet is not None:
                raise GivenUp(DIALOG)
            return self.patience.run(lambda: self._pages[-1].rest.evaluate(script, argument))

    def act(self, action: Action, perform: Callable[[Page, Action], str]) -> str:
        """Let `perform` do `action` on the page, or the browser's own question take it; returns "" or what was wrong.
        The first gesture of several that cannot be done ends them.

        Raises `BrowserCrashed`.
        """
        gestures = parts(action)
        for number, part in enumerate(gestures, 1):
            if number > 1:
                self.page.wait_for_timeout(_PAUSE)
            if problem := self._gesture(part, perform):
                return problem if number == 1 else f"gesture {number} of {len(gestures)}: {problem}"
        return ""

    def _gesture(self, action: Action, perform: Callable[[Page, Action], str]) -> str:
        with self.guard():
            if isinstance(action, Finished | CallUser):
                self._drop_sheet()
            if self.sheet is not None:
                return self._answer(self.sheet, action)
            page = self.page
            try:
                return self.patience.run(lambda: perform(page, action))
            except GivenUp:
                return ""
            except Error:
                if self._dead or not page.is_closed() or self.page.is_closed():
                    raise
                return "the tab was closed before all was done"

    def _answer(self, sheet: Sheet, action: Action) -> str:
        problem = sheet.act(action)
        if not sheet.reply:
            return problem
        with suppress(GivenUp):
            self.patience.run(self.dialogs.close)
        return self.transfers.close()

    def _drop_sheet(self) -> None:
        with suppress(GivenUp):
            self.patience.run(self.dialogs.stop_asking)
        self.transfers.close()

    def settle(self, cap: float = 1.0) -> None:
        """Wait until the shown page is at rest, at most `cap` seconds for each kind of movement, and tell what is still
        going on; then take away what may not be shown.
        """
        with self.guard():
            if self.dialogs.sheet is None:
                try:
                    self.patience.run(lambda: self._rest(cap))
                except GivenUp as why:
                    if self.dialogs.sheet is None:  # a dialog has told of itself
                        self.record.tell(str(why))
            self.boundary.enforce()

    def _rest(self, cap: float) -> None:
        longest = time.monotonic() + _LONGEST_REST
        while True:
            shown = self._pages[-1]
            try:
                going_on = shown.rest.settle(cap)
            except Error:
                if not shown.page.is_closed() or self.page.is_closed():
                    raise
            # What a page announces again and again is not waited for again and again.
            announced = time.monotonic() + _ANNOUNCED
            while self.transfers.busy or any(min(end, announced) > time.monotonic() for end in self._coming.values()):
                self.page.wait_for_timeout(10)
            if self._coming.get("download", 0) > time.monotonic():
                going_on = "the page asks for another document again and again; the old page is shown"
            if (shown is self._pages[-1] and not shown.rest.expecting) or time.monotonic() > longest:
                break
        if going_on:
            self.record.tell(going_on)

    def screenshot(self) -> np.ndarray:
        """The viewport as uint8 [height * scale, width * scale, 3]."""
        if self.dialogs.sheet is None or self._last is None:  # a page in a dialog stands still
            with self.guard():
                self._last = self._capture()
        sheet = self.sheet
        return self._last if sheet is None else sheet.draw(self._last, self.device_scale)

    def _capture(self) -> np.ndarray:
        seen = capture(self.page, self._pages[-1].session)
        seen = self._last if seen is None else seen
        if seen is None and self.dialogs.sheet is not None:  # it asked before it was drawn
            seen = np.full([*(round(side * self.device_scale) for side in self.viewport[::-1]), 3], 255, np.uint8)
        if seen is None:
            raise PageNotLoaded(f"{self.page.url} cannot be shown: the page loads itself again and again")
        return seen

    def renew(self) -> bool:
        """Forget what was recorded and where it has been, let go of mouse and keys; False when the page is dead."""
        if self._dead or self.page.is_closed() or not self._browser.is_connected():
            return False
        self.dialogs.forget()
        self.transfers.forget()
        self.boundary.forget()
        try:
            for shown in self._pages[1:]:
                shown.page.close()
            self.page.mouse.move(-1, -1)
            for key in MODIFIER_KEYS:
                self.page.keyboard.up(key)
            self._pages[-1].session.send("Page.resetNavigationHistory")
        except Error:
            return False
        self._pages[-1].rest.forget()
        self.record.clear()
        self._last = None
        return True

    def close(self) -> None:
        """Close the pages and drop their context; safe when the browser is already gone."""
        self.boundary.shut()
        if any(shown.rest.restless for shown in self._pages):
            forgive(lambda: self.page.wait_for_timeout(_LAST_DOCUMENT))
        forgive(self.context.close)
