"""Playwright's driver: a program beside this process, that has the browsers below it, and ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Playwright, sync_playwright

from textkv.command import guarded

WORD = "run-driver"  # what Playwright asks of its program


@contextmanager
def driver() -> Iterator[Playwright]:
    """Playwright while the context lasts.

    Left alone it would wait half a minute for a browser that does not answer, also when this process has gone.
    """
    with guarded(lambda: sync_playwright().start(), lambda playwright: playwright.stop(), WORD) as playwright:
        yield playwright
