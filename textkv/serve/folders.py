"""A folder of a process's own in a place that several share; one that was killed has its folder removed by the next."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process leaves there stays
    fcntl = None

LOCK = "lock"


class OwnFolder:
    """A new folder in `place`, whose name begins with `prefix`.

    Attributes:
        path: where it is.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, place: Path, prefix: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        self._lock = (self.path / LOCK).open("w")
        # Held until this process has gone, however it goes.
        _taken(self._lock)

    def close(self) -> None:
        """Removes it."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(place: Path, prefix: str) -> None:
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError), (folder / LOCK).open("r+") as lock:
            # One that is empty is just being made: its process writes this file first, and then takes it.
            if any(other.name != LOCK for other in folder.iterdir()) and _taken(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _taken(lock: IO[str]) -> bool:
    """Whether nobody has it; then this process does."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
