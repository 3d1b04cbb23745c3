"""What a person did or can mend: one clear line instead of a traceback; and Ctrl-C, heard between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from agentkv.envs.browser import BrowserCrashed, ChromiumMissing
from agentkv.envs.miniwob import MiniwobMissing
from agentkv.envs.sites import SitesMissing
from agentkv.envs.tab import PageNotLoaded
from textkv.disk import NoSpace


class UserError(Exception):
    """A request that cannot be carried out; the message says what to change."""


# Errors that explain themselves wherever they come from.
EXPLAINED = (UserError, NoSpace, ChromiumMissing, MiniwobMissing, SitesMissing, PageNotLoaded, BrowserCrashed)


@contextmanager
def user_errors() -> Iterator[None]:
    """While the request is checked, what the libraries refuse is the request's fault and becomes a UserError."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


class Interrupts:
    """A context in which the first Ctrl-C sets `asked` (stop after this step) and the second interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)
