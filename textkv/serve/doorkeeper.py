"""Who is let in: by a key, or, where no key is asked for, whoever is on this machine and no web page of a stranger's.

Plain ASGI: FastAPI's own middleware hides that a client has gone.
"""

from __future__ import annotations

import hmac
import ipaddress
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from textkv.records import read_text
from textkv.serve import protocol

OPEN = ("/health",)  # paths that need no key

Keys = Sequence[str] | Callable[[], Sequence[str]]
"""Keys, or who knows them now."""


class KeyFile:
    """The keys in a file, one a line, as they are now: one that is taken out of it is not let in any more.

    Raises:
        ValueError: at first, a file that cannot be read or holds no key. Later such a file changes nothing, and is told
            of on stderr.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state, self._keys = self._stamp(), self._read()

    def __call__(self) -> tuple[str, ...]:
        """The keys."""
        state = self._stamp()
        if state != self._state:
            self._state = state
            try:
                self._keys = self._read()
            except ValueError as error:
                print(f"{error}; the keys before it are still asked for", file=sys.stderr)
        return self._keys

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[str, ...]:
        try:
            lines = read_text(self._path).splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"no keys can be read from {str(self._path)!r}: {error}") from None
        found = tuple(line.strip() for line in lines if line.strip())
        if not found:
            raise ValueError(f"{self._path} holds no key; write one a line")
        return found


class KeyAsked:
    """Lets requests in that bring a key."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys if callable(keys) else lambda: keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._known(scope):
            line = "no valid API key; send it as Authorization: Bearer KEY"
            await JSONResponse(protocol.error_body(line, "authentication_error", "invalid_api_key"), 401)(
                scope, receive, send
            )
        else:
            await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, told = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        told = told.strip() if scheme.lower() == b"bearer" else b""
        # All are compared, each in constant time: how long it takes says nothing about a key.
        return any([hmac.compare_digest(told, key.encode()) for key in self.keys()])


class HereAlone:
    """Lets in what was meant for this machine: a page in a browser here may send requests too, under its own name or
    one that it has pointed at this machine.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin", "")
        told = headers.get(b"host", ""), origin.partition("://")[2] or origin
        strange = next((name for name in told if name and not is_here(name)), None)
        if scope["type"] == "http" and strange is not None:
            line = f"this server answers to this machine alone, not to {strange[:100]!r}"
            await JSONResponse(protocol.error_body(f"{line}; use --api-key-file for others"), 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_here(netloc: str) -> bool:
    """Whether HOST[:PORT] is this machine by its own names: a loopback address, or localhost."""
    try:
        name = urlsplit(f"//{netloc}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
