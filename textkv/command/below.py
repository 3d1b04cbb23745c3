"""Programs that a command starts: they end with it, whatever ends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WATCH = Path(__file__).with_name("_watch.py")


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
