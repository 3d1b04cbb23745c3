"""What a person did or can mend: one clear line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
