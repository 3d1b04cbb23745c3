"""A disk that fills up, or a file that may not grow: one line that says where, and a run that goes on later."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, larger than `ulimit -f` allows


class NoSpace(OSError):
    """The disk is full, or too full to begin; the message names the place."""


@contextmanager
def disk_errors(place: Path, mend: str = "the same command goes on") -> Iterator[None]:
    """Turn "no space left" while writing to `place` into NoSpace, whose message says what helps after freeing some, and
    what else safetensors could not write into an OSError too: whoever is ready for a disk that fails knows no other."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _number(error) in FULL:
            raise NoSpace(f"{place}: the disk is full; free some space, then {mend}") from error
        if isinstance(error, OSError):
            raise
        raise OSError(_number(error), f"it cannot be written ({error})", str(place)) from error


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors tells it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_whole(path: Path, data: bytes, mend: str = "the same command goes on") -> Path:
    """As `replace_whole`, which tells of a disk that is full as `disk_errors` does; returns the path.

    Raises:
        NoSpace: see `disk_errors`.
        OSError: it cannot be written for another reason.
    """
    with disk_errors(path.parent, mend):
        replace_whole(path, data)
    return path


def replace_whole(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before; folders are made.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()  # it would keep the disk full
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft of `folder`, beside it, that becomes it when the context ends without an error, and is gone otherwise.

    Where `folder` has files already, those of the draft take their place, weights last.

    Raises:
        NoSpace: see `disk_errors`.
        OSError: it cannot be written for another reason.
    """
    with disk_errors(folder, "run the same command again"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:20]}-") as place:
            draft = Path(place) / "draft"
            draft.mkdir()
            yield draft
            move_files(draft, folder)


def move_files(draft: Path, folder: Path) -> None:
    """Move every file of `draft` into `folder`, over what is there: no moment lacks one of them."""
    for path in draft.iterdir():
        # Whatever the writing library and the umask made of it: others may read a model too.
        path.chmod(0o644)
    if not folder.exists():
        draft.rename(folder)
        draft.mkdir()  # as after moving what was in it
        return
    for path in sorted(draft.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        os.replace(path, folder / path.name)
