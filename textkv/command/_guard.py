"""`python _guard.py PID ...`: when standard input ends, give these processes a moment, then end what holds them up.

The other end of that pipe is held by the process that started them. First the processes below them are ended, for one
of those may be what they wait for in vain, and they can then remove their temporary files; what is left after a further
moment is ended too. With `now` before the numbers none gets a moment, and all below go with them. A file to run, which
must start in a blink; `children` and `end_all` are for others as well.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

LOOK = 2.0  # seconds between two looks at what is there
GRACE = 0.5  # seconds in which all may end by itself: what commands start is to be gone within three
TIDYING = 1.0  # seconds for the temporary files of those that were held up


def table() -> dict[int, tuple[int, str]]:
    """{process: (the one above it, its command)} of this machine; one that has ended and waits to be read is none."""
    found = {}
    if os.path.isdir("/proc/self"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The name before it may have spaces and brackets of its own.
                    state, above = file.read().rpartition(b")")[2].split()[:2]
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    command = file.read().replace(b"\0", b" ").decode("utf-8", "replace")
                if state != b"Z":
                    found[int(name)] = int(above), command
        return found
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,command="], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        number, above, state, command = (*line.split(None, 3), "")[:4]
        if "Z" not in state:
            found[int(number)] = int(above), command
    return found


def children(above: int, word: str) -> set[int]:
    """Those that process `above` has started itself, with `word` in their command."""
    return {number for number, (parent, command) in table().items() if parent == above and word in command}


def below(numbers: set[int]) -> set[int]:
    """All below these, however deep."""
    found, known, more = set(), table(), set(numbers)
    while more:
        more = {number for number, (above, _) in known.items() if above in more} - found - numbers
        found |= more
    return found


def main(numbers: set[int], now: bool = False) -> None:
    """Wait, and end them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # who holds the pipe decides
    if now:
        # Those may end with their parent before they are looked for, and what is below them then has another parent.
        known = numbers | below(numbers)
        while not select.select([0], [], [], LOOK)[0]:
            known = numbers | below(numbers)
        end_all(known)
        return
    os.read(0, 1)
    if _ended(numbers, GRACE):
        return
    held = below(numbers)
    _kill(held)
    if not _ended(numbers, TIDYING):
        _kill(numbers | below(numbers))


def end_all(numbers: set[int]) -> None:
    """All of them and below them, also what those start meanwhile: whoever loses its parent is still known."""
    known = set(numbers)

    def gone() -> bool:
        known.update(below(known))
        _kill(known & table().keys())
        return not known & table().keys()

    _until(gone, GRACE + TIDYING)


def _ended(numbers: set[int], seconds: float) -> bool:
    """Whether all of them end within so many seconds."""
    return _until(lambda: not numbers & table().keys(), seconds)


def _until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _kill(numbers: set[int]) -> None:
    for number in numbers:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(number, getattr(signal, "SIGKILL", signal.SIGTERM))


if __name__ == "__main__":
    main({int(word) for word in sys.argv[1:] if word != "now"}, "now" in sys.argv)
