"""One isolated page of a browser: what it may load, what it tried to do, its picture.

Every request is checked against the task's allow-list twice. A route handler aborts and records what the page asks
for; below it the tab's own proxy setting sends every host that is not allowed to a closed port, which also catches
what handlers never see (redirects, workers, prefetch). Dialogs are dismissed, popups closed, downloads refused,
permissions denied; all of it is recorded, nothing of it reaches the agent.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    CDPSession,
    Dialog,
    Download,
    Error,
    FileChooser,
    Frame,
    Page,
    Request,
    Route,
    TimeoutError,
    WebSocketRoute,
)

from .actions import MODIFIER_KEYS
from .allow import AllowList

# nothing listens there: the TCP port multiplexer is dead since decades and needs root to open
_NOWHERE = "http://127.0.0.1:1"
_MAX_DIALOGS = 20
_URL_LENGTH = 300
_TRIES = 5
_ERROR_PAGE = "chrome-error:"
_PICTURE = {"format": "png", "optimizeForSpeed": True}
_ENDLESS = ("eventsource", "websocket", "media", "ping")

# a blinking caret would make two pictures of the same screen differ
_NO_CARET = """
new MutationObserver((_, watch) => {
  if (!document.documentElement) return;
  watch.disconnect();
  const style = document.createElement('style');
  style.textContent = '* { caret-color: transparent !important; }';
  document.documentElement.append(style);
}).observe(document, {childList: true});
"""

# two frames are drawn, so that what the new styles need is asked for;
# pictures from files are waited for here, because a request may be reported only after this script has answered;
# then CSS and jQuery animations that end by themselves may run out
_SETTLE = """
async (cap) => {
  const end = performance.now() + cap;
  const moving = (a) => a.playState === 'running' && isFinite(a.effect.getComputedTiming().endTime);
  const busy = () => document.getAnimations().some(moving) || (window.jQuery && jQuery.timers && jQuery.timers.length);
  await new Promise(requestAnimationFrame);
  if (location.protocol === 'file:') {
    const urls = [...document.querySelectorAll('*')].map((e) => getComputedStyle(e).backgroundImage.slice(5, -2));
    const files = [...new Set(urls)].filter((url) => url.startsWith('file:'));
    const pictures = files.map((url) => Object.assign(new Image(), {src: url}));
    const shown = [...pictures, ...document.images].map((picture) => picture.decode().catch(() => 0));
    await Promise.race([Promise.all(shown), new Promise((late) => setTimeout(late, cap))]);
  }
  do await new Promise(requestAnimationFrame); while (busy() && performance.now() < end);
}
"""


class BrowserCrashed(RuntimeError):
    """The page or the browser process is gone; `Browser.relaunch()` (or the environment's `reset`) starts afresh."""


class PageNotLoaded(RuntimeError):
    """An address could not be opened: it never answered, or it is not on the allow-list."""


@dataclass(frozen=True)
class Blocked:
    """What the page tried and was refused; kinds: request, redirect, navigation, websocket, popup, download, upload."""

    kind: str
    url: str
    reason: str


class Tab:
    """A context with one page. `blocked` and `dialogs` grow as the page tries things; `script` runs first in every
    document.
    """

    def __init__(
        self, browser: Browser, allow: AllowList, viewport: tuple[int, int], device_scale: float, script: str = ""
    ) -> None:
        self.allow = allow
        self.viewport = viewport
        self.blocked: list[Blocked] = []
        self.dialogs: list[str] = []
        self._browser = browser
        self._dead = ""
        self._strays: list[Frame] = []
        self._loading: set[Request] = set()
        with self.guard():
            self.context = self._isolate(browser, device_scale, script)
            self.page = self.context.new_page()
            self.context.on("page", self._on_popup)
            self._watch(self.page)
            self._cdp = self._own_session(device_scale)

    def _isolate(self, browser: Browser, device_scale: float, script: str) -> BrowserContext:
        width, height = self.viewport
        context = browser.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=device_scale,
            accept_downloads=False,
            service_workers="block",
            locale="en-US",
            timezone_id="UTC",
            reduced_motion="reduce",
            proxy={"server": _NOWHERE, "bypass": ",".join(urlsplit(entry).netloc for entry in self.allow.origins)},
        )
        context.grant_permissions([])
        context.add_init_script(_NO_CARET)
        if script:
            context.add_init_script(script)
        context.route("**/*", self._on_request)
        context.route_web_socket("**/*", self._on_websocket)
        return context

    def _own_session(self, device_scale: float) -> CDPSession:
        """For pictures and redirects; without metrics of its own a capture would reset the page's to scale 1."""
        width, height = self.viewport
        session = self.context.new_cdp_session(self.page)
        metrics = {"width": width, "height": height, "deviceScaleFactor": device_scale, "mobile": False}
        session.send("Emulation.setDeviceMetricsOverride", metrics)
        session.on("Network.requestWillBeSent", self._on_raw_redirect)
        session.send("Network.enable")
        return session

    def _watch(self, page: Page) -> None:
        page.on("crash", lambda _: self._mark_dead("the page crashed"))
        page.on("dialog", self._on_dialog)
        page.on("download", self._on_download)
        page.on("filechooser", self._on_upload)
        page.on("framenavigated", self._on_navigated)
        page.on("request", self._on_redirect)
        page.on("request", self._on_start)
        page.on("requestfinished", self._on_end)
        page.on("requestfailed", self._on_end)

    def _mark_dead(self, why: str) -> None:
        self._dead = self._dead or why

    def _refuse(self, kind: str, url: str, reason: str) -> None:
        self.blocked.append(Blocked(kind, url[:_URL_LENGTH], reason))

    def _on_request(self, route: Route, request: Request) -> None:
        navigation = request.is_navigation_request()
        reason = self.allow.refusal(request.url, navigation)
        if not reason:
            self._forgive(route.continue_)
        elif navigation and self._is_own(request):
            # "no content" leaves the agent on the page where it is; an abort would show Chromium's error page
            self._refuse("navigation", request.url, reason)
            self._forgive(lambda: route.fulfill(status=204))
        else:
            self._refuse("navigation" if navigation else "request", request.url, reason)
            self._forgive(lambda: route.abort("blockedbyclient"))

    def _is_own(self, request: Request) -> bool:
        try:
            return request.frame.page == self.page
        except Error:
            return False  # a popup that is being opened has no frame yet

    def _on_start(self, request: Request) -> None:
        if request.resource_type not in _ENDLESS:
            self._loading.add(request)

    def _on_end(self, request: Request) -> None:
        self._loading.discard(request)

    def _on_redirect(self, request: Request) -> None:
        """Redirects of frames and workers in other processes; the page's own come surely through `_on_raw_redirect`."""
        if request.redirected_from is not None:
            self._refuse_redirect(request.url, request.is_navigation_request())

    def _on_raw_redirect(self, event: dict[str, Any]) -> None:
        """Playwright loses a redirect whose connection fails at once, so the protocol's own event is read."""
        if "redirectResponse" in event:
            self._refuse_redirect(event["request"]["url"], event.get("type") == "Document")

    def _refuse_redirect(self, url: str, navigation: bool) -> None:
        """Route handlers see only the first request of a chain; the proxy stops the rest, this notes each URL once."""
        reason = self.allow.refusal(url, navigation)
        if reason and not any(entry.kind == "redirect" and url.startswith(entry.url) for entry in self.blocked):
            self._refuse("redirect", url, reason)

    def _on_websocket(self, socket: WebSocketRoute) -> None:
        reason = self.allow.refusal(socket.url, navigation=False)
        if reason:
            self._refuse("websocket", socket.url, reason)
            socket.close(code=1008, reason="not on the allow-list")
        else:
            socket.connect_to_server()

    def _on_popup(self, popup: Page) -> None:
        self._refuse("popup", popup.url or "about:blank", "a task has one page")
        self._forgive(popup.close)

    def _on_download(self, download: Download) -> None:
        self._refuse("download", download.url, "downloads are refused")
        self._forgive(download.cancel)

    def _on_upload(self, chooser: FileChooser) -> None:
        """Having a listener keeps the system's own file dialog shut; nothing is chosen."""
        self._refuse("upload", chooser.page.url, "uploads are refused")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(f"{dialog.type}: {dialog.message[:_URL_LENGTH]}")
        self._forgive(dialog.dismiss)
        if len(self.dialogs) > _MAX_DIALOGS and not self._dead:
            self._mark_dead(f"the page opened more than {_MAX_DIALOGS} dialogs")
            self._forgive(self.page.close)

    def _on_navigated(self, frame: Frame) -> None:
        """`data:` and `blob:` frames never pass a route handler, so they are found here and removed by `enforce`."""
        reason = self.allow.refusal(frame.url)
        if reason and frame.url and not frame.url.startswith(_ERROR_PAGE):
            self._refuse("navigation", frame.url, reason)
            self._strays.append(frame)

    @staticmethod
    def _forgive(call: Callable[[], object]) -> None:
        with suppress(Error):  # the page was quicker and has gone by itself
            call()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn Playwright's errors about a dead page or browser into `BrowserCrashed`; others pass."""
        try:
            yield
        except Error as error:
            page = getattr(self, "page", None)
            gone = not self._browser.is_connected() or (page is not None and page.is_closed())
            if self._dead or gone or "crashed" in error.message:
                why = self._dead or ("the page is closed" if self._browser.is_connected() else "the browser is gone")
                raise BrowserCrashed(f"{why}; reset the environment to go on with a fresh one") from error
            raise

    def goto(self, url: str, timeout: float) -> None:
        """Open `url` and wait for its load event, at most `timeout` seconds. Raises `PageNotLoaded`."""
        with self.guard():
            try:
                self.page.goto(url, timeout=timeout * 1000, wait_until="load")
            except TimeoutError as error:
                raise PageNotLoaded(
                    f"{url} did not load within {timeout:g} s; check the address or raise load_timeout"
                ) from error
            except Error as error:
                if self._dead or self.page.is_closed() or not self._browser.is_connected():
                    raise
                reason = self._why_not(url) or error.message.splitlines()[0]
                raise PageNotLoaded(f"{url} could not be opened: {reason}") from error

    def _why_not(self, url: str) -> str:
        away = [entry for entry in self.blocked if entry.kind == "redirect"]
        if away:
            return f"it redirects to {away[-1].url}, and {away[-1].reason}"
        return self.allow.refusal(url)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run our own script in the page and return its value; while the page navigates it is tried again."""
        with self.guard():
            for _ in range(_TRIES):
                try:
                    return self.page.evaluate(script, argument)
                except Error as error:
                    if "context was destroyed" not in error.message:
                        raise
                    self._forgive(lambda: self.page.wait_for_load_state("load", timeout=5_000))
            return self.page.evaluate(script, argument)

    def settle(self, cap: float = 1.0) -> None:
        """Wait for new frames, animations that end and what they load, at most `cap` seconds each; then `enforce`."""
        self.evaluate(_SETTLE, cap * 1000)
        if self._loading:
            self._wait_for_loads(cap)
            self.evaluate(_SETTLE, cap * 1000)
        self.enforce()

    def _wait_for_loads(self, cap: float) -> None:
        """Pictures that an action brought up (the icon of a dialog) must be there before the screen is shown."""
        end = time.monotonic() + cap
        with self.guard():
            while self._loading and time.monotonic() < end:
                self.page.wait_for_timeout(5)

    def enforce(self) -> None:
        """Close popups that are still open and take away frames that show an address which is not allowed."""
        for popup in self.context.pages:
            if popup != self.page:
                self._forgive(popup.close)
        strays, self._strays = self._strays, []
        for frame in strays:
            if frame.is_detached():
                continue
            with self.guard():
                if frame.parent_frame is None:
                    self.page.goto("about:blank")
                else:
                    frame.frame_element().evaluate("element => element.remove()")

    def screenshot(self) -> np.ndarray:
        """The viewport as uint8 [height * scale, width * scale, 3]."""
        with self.guard():
            png = base64.b64decode(self._capture())
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))

    def _capture(self) -> str:
        for _ in range(_TRIES):
            try:
                return self._cdp.send("Page.captureScreenshot", _PICTURE)["data"]
            except Error as error:
                if "Unable to capture" not in error.message:
                    raise
                self.page.wait_for_timeout(100)  # between two documents there is nothing to see
        return self._cdp.send("Page.captureScreenshot", _PICTURE)["data"]

    def renew(self) -> bool:
        """Forget what was recorded and where it has been, let go of mouse and keys; False when the page is dead."""
        if self._dead or self.page.is_closed() or not self._browser.is_connected():
            return False
        self.blocked.clear()
        self.dialogs.clear()
        self._strays.clear()
        self._loading.clear()
        try:
            self.page.mouse.move(-1, -1)
            for key in MODIFIER_KEYS:
                self.page.keyboard.up(key)
            self._cdp.send("Page.resetNavigationHistory")
        except Error:
            return False
        return True

    def close(self) -> None:
        """Close the page and drop its context; safe when the browser is already gone."""
        self._forgive(self.context.close)
