"""Programs that a command starts: they end with it, whatever ends it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from textkv.command._guard import children, end_all

T = TypeVar("T")
WATCH, GUARD = (Path(__file__).with_name(name) for name in ("_watch.py", "_guard.py"))
_STARTING = threading.Lock()


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A program while the context lasts; it and all that it started are ended then, or when this process has gone.

    Args:
        options: of `subprocess.Popen`; standard input is taken.
    """
    # In a session of its own: a Ctrl-C reaches this process alone, which decides.
    watched = [sys.executable, "-I", "-S", str(WATCH), *command]
    process = subprocess.Popen(watched, stdin=subprocess.PIPE, start_new_session=True, **options)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def ran(command: Sequence[str], *, hear: bool = False, **options: Any) -> tuple[int, str]:
    """(exit code, what it said on stderr if `hear`) of a program that is run to its end. Raises OSError for none."""
    with started(command, stderr=subprocess.PIPE if hear else None, text=True, **options) as process:
        said = process.stderr.read() if process.stderr is not None else ""
        return process.wait(), said


@contextmanager
def guarded(open: Callable[[], T], close: Callable[[T], object], word: str, patient: bool = True) -> Iterator[T]:
    """What `open()` gives, while the context lasts, of a library that starts processes by itself.

    At the end of the context, or of this process, they have a moment to end by themselves, `close` them; then they are
    ended with all below them, and a `close` that waits for them comes back.

    Args:
        word: in the command of what the library starts, by which it is known among the others of this process.
        patient: False for those that take longer to end than a Ctrl-C may, and lose nothing by it: after a signal, or
            when this process has gone, they are ended at once and without `close`.
    """
    with _STARTING:  # what is new is this context's
        before = children(os.getpid(), word)
        try:
            opened = open()
        except BaseException:
            # Stopped, or failed, half-way: what was started already has nobody.
            end_all(children(os.getpid(), word) - before)
            raise
        new = children(os.getpid(), word) - before
    command = [sys.executable, "-I", "-S", str(GUARD), *([] if patient else ["now"]), *map(str, new)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stopped = True
    try:
        yield opened
        stopped = False
    except Exception:
        stopped = False  # an error, no signal: there is time
        raise
    finally:
        assert guard.stdin is not None
        if patient or stopped:
            guard.stdin.close()
        try:
            if patient or not stopped:
                close(opened)
        finally:
            guard.stdin.close()
            guard.wait()
