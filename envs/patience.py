"""A call into the page that may be given up while it waits: Playwright's sync API has no other way out of one.

A page that shows a dialog ends no gesture, and one whose next document is on its way runs no script. So the call waits
in a greenlet of its own; a handler that knows better lets the caller go on without it, and what the call still does
later comes to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet


class GivenUp(RuntimeError):
    """The page cannot answer now; the message says why."""


class Patience:
    """Runs calls for one tab. `pause` waits for some milliseconds and lets Playwright's events through meanwhile."""

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause = pause
        self._caller: greenlet | None = None
        self._why = ""

    def run(self, call: Callable[[], Any]) -> Any:
        """The value of `call`. Raises what it raises, or `GivenUp`; inside another `run` that one is given up."""
        if self._caller is not None:
            return call()
        ended: list[tuple[Any, BaseException | None]] = []

        def waiting() -> None:
            try:
                ended.append((call(), None))
            except BaseException as error:
                ended.append((None, error))

        self._caller, self._why = getcurrent(), ""
        try:
            greenlet(waiting).switch()
            while not ended and not self._why:  # an earlier call came to its end meanwhile
                self._pause(5)
        finally:
            self._caller = None
        if not ended:
            raise GivenUp(self._why)
        value, error = ended[0]
        if error is not None:
            raise error
        return value

    def give_up(self, why: str) -> None:
        """Called by a handler of an event: let the caller of the running call go on, if there is one."""
        if self._caller is not None:
            self._why = why
            asyncio.get_running_loop().call_soon(self._release, self._caller)

    def _release(self, caller: greenlet) -> None:
        if self._caller is caller and self._why:
            caller.switch()
