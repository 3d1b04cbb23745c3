"""What a tab may reach: every request is checked against the task's allow-list twice.

A route handler aborts and records what the page asks for; below it the context's own proxy setting sends every host
that is not allowed to a closed port, which also catches what handlers never see (redirects, workers, prefetch).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, CDPSession, Error, Frame, Page, Request, Route, WebSocketRoute

from .allow import AllowList
from .events import URL_LENGTH, Record

# nothing listens there: the TCP port multiplexer is dead since decades and needs root to open
NOWHERE = "http://127.0.0.1:1"
ERROR_PAGE = "chrome-error:"


def forgive(call: Callable[[], object]) -> None:
    """Call; the page may be quicker and have gone by itself."""
    with suppress(Error):
        call()


def proxy(allow: AllowList) -> dict[str, str]:
    """The proxy setting of a context that reaches the origins of `allow` and nothing else."""
    return {"server": NOWHERE, "bypass": ",".join(urlsplit(entry).netloc for entry in allow.origins)}


class Boundary:
    """Refuses what `allow` does not admit, for every page of a context, and notes it in `record`."""

    def __init__(self, allow: AllowList, record: Record) -> None:
        self.allow = allow
        self.record = record
        self.away = ""  # where the page that is shown wanted to go since `expect`, and why it may not
        self._strays: list[Frame] = []
        self._shut = False

    def expect(self) -> None:
        """A page is to be loaded now."""
        self.away = ""

    def guard_context(self, context: BrowserContext) -> None:
        """Requests and sockets of every page."""
        context.route("**/*", self._on_request)
        context.route_web_socket("**/*", self._on_websocket)

    def guard_page(self, page: Page, session: CDPSession) -> None:
        """Redirects and inline documents, which no route handler sees."""
        page.on("framenavigated", self._on_navigated)
        page.on("request", self._on_redirect)
        page.on("requestfailed", self._on_failed)
        session.on("Network.requestWillBeSent", self._on_raw_redirect)
        session.send("Network.enable")

    def _on_request(self, route: Route, request: Request) -> None:
        navigation = request.is_navigation_request()
        reason = self.allow.refusal(request.url, navigation)
        if self._shut:
            forgive(route.abort)
        elif not reason:
            forgive(route.continue_)
        elif navigation and self._has_page(request):
            # "no content" leaves the agent on the page where it is; an abort would show Chromium's error page
            self.record.refuse("navigation", request.url, reason)
            self._note(request.frame, request.url, reason)
            forgive(lambda: route.fulfill(status=204))
        else:
            self.record.refuse("popup" if navigation else "request", request.url, reason)
            forgive(lambda: route.abort("blockedbyclient"))

    @staticmethod
    def _has_page(request: Request) -> bool:
        try:
            return request.frame.page is not None
        except Error:
            return False  # a popup that is being opened has no frame yet

    def _on_redirect(self, request: Request) -> None:
        """Redirects of frames and workers in other processes; the page's own come surely through `_on_raw_redirect`."""
        if request.redirected_from is not None:
            self._refuse_redirect(request.url, request.is_navigation_request())

    def _on_failed(self, request: Request) -> None:
        """A page behind a question that a browser asks by itself, and this one has no answer to."""
        if request.failure == "net::ERR_INVALID_AUTH_CREDENTIALS" and request.is_navigation_request():
            self.record.tell(f"{request.url[:URL_LENGTH]} asks for a user name and a password; this browser has none")

    def _on_raw_redirect(self, event: dict[str, Any]) -> None:
        """Playwright loses a redirect whose connection fails at once, so the protocol's own event is read."""
        if "redirectResponse" in event:
            self._refuse_redirect(event["request"]["url"], event.get("type") == "Document")

    def _refuse_redirect(self, url: str, navigation: bool) -> None:
        """Route handlers see only the first request of a chain; the proxy stops the rest, this notes each URL once."""
        reason = self.allow.refusal(url, navigation)
        known = (entry.kind == "redirect" and url.startswith(entry.url) for entry in self.record.blocked)
        if reason and not any(known):
            self.record.refuse("redirect", url, reason)
            if navigation:
                self.record.tell(f"refused: the address redirects to {url} ({reason})")

    def _on_websocket(self, socket: WebSocketRoute) -> None:
        reason = self.allow.refusal(socket.url, navigation=False)
        if reason:
            self.record.refuse("websocket", socket.url, reason)
            socket.close(code=1008, reason="not on the allow-list")
        else:
            socket.connect_to_server()

    def _on_navigated(self, frame: Frame) -> None:
        """`data:` and `blob:` frames never pass a route handler, so they are found here and removed by `enforce`."""
        reason = self.allow.refusal(frame.url)
        if reason and frame.url and not frame.url.startswith(ERROR_PAGE):
            self.record.refuse("navigation", frame.url, reason)
            self._note(frame, frame.url, reason)
            self._strays.append(frame)

    def _note(self, frame: Frame, url: str, reason: str) -> None:
        if frame.parent_frame is None:
            self.away = self.away or f"the page goes on to {url[:URL_LENGTH]}, and {reason}"

    def enforce(self) -> None:
        """Take away frames that show an address which is not allowed."""
        strays, self._strays = self._strays, []
        for frame in strays:
            if frame.is_detached():
                continue
            if frame.parent_frame is None:
                frame.page.goto("about:blank")
            else:
                frame.frame_element().evaluate("element => element.remove()")

    def why_not(self, url: str) -> str:
        """Why `url` could not be opened, "" when that was not the boundary's doing."""
        away = [entry for entry in self.record.blocked if entry.kind == "redirect"]
        if away:
            return f"it redirects to {away[-1].url}, and {away[-1].reason}"
        return self.away or self.allow.refusal(url)

    def forget(self) -> None:
        """Nothing is to be removed any more: the pages are gone."""
        self._strays.clear()

    def shut(self) -> None:
        """Load nothing any more: a page that loads itself for ever comes to an end, and can be closed."""
        self._shut = True
