"""Where a command may write, known before its work, and writing that loses neither an old file nor new figures.

A command writes over what it wrote itself and over nothing else. Whose a file is stands in it: the "meta" of a JSON
file, the "Software" of a picture, the first lines of a text name the command.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from textkv.disk import replace_whole

HEAD = 2_000  # bytes in which a text names its command
PROBE = 4_096  # bytes that a place must take before a command begins: a full disk takes an empty file
SOFTWARE = b"tEXtSoftware\x00"


def results_file(module: str, beside: Sequence[str] = ()) -> Callable[[str], Path]:
    """The type of an argument that names a file which `python -m module` will write.

    Refused: no name, a folder, a place that cannot be written to, and a file that another program wrote.

    Args:
        beside: suffixes of further files that are written beside it, as ".jsonl".
    """

    def check(text: str) -> Path:
        """The path; ArgumentTypeError for what is refused."""
        path = Path(text)
        check_file(path, text, lambda path: is_own(path, module), f"python -m {module}")
        for other in (path.with_suffix(suffix) for suffix in beside):
            # What stands in it is asked by those who go on with it; this is only about the place.
            check_file(other, str(other), lambda path: True, f"python -m {module}")
        return path

    check.__name__ = "results_file"
    check.writes = True
    return check


def output_file(own: Callable[[Path], bool], whose: str) -> Callable[[str], Path]:
    """As `results_file`, for a file whose format says by itself that it is one of ours: `own(path)`.

    Args:
        whose: what wrote such a file, for the line that refuses another.
    """

    def check(text: str) -> Path:
        """The path; ArgumentTypeError for what is refused."""
        check_file(Path(text), text, own, whose)
        return Path(text)

    check.__name__ = "output_file"
    check.writes = True
    return check


def output_folder(own: Callable[[Path], bool], whose: str) -> Callable[[str], Path]:
    """The type of an argument that names a folder to write to: one that is not there yet, is empty, or is `own`.

    Refused: no name, a file, a place that cannot be written to, and a folder with something else in it.
    """

    def check(text: str) -> Path:
        """The path; ArgumentTypeError for what is refused."""
        path = Path(text)
        if not text:
            raise ArgumentTypeError("an empty name is no folder")
        if path.exists() and not path.is_dir():
            raise ArgumentTypeError(f"{path} is a file; name a folder")
        _check_place(path / "x", path)
        if path.is_dir() and any(path.iterdir()) and not own(path):
            raise ArgumentTypeError(f"{path} holds something else than of {whose}; name another folder, or move it")
        return path

    check.__name__ = "output_folder"
    check.writes = True
    return check


def writable_folder(text: str) -> Path:
    """A folder for files that only this process needs; made if missing."""
    try:
        Path(text or "\0").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=text):
            return Path(text)
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"nothing can be written to {text!r}: {error}") from None


def check_file(path: Path, text: str, own: Callable[[Path], bool], whose: str) -> None:
    """Raises ArgumentTypeError if a command must not, or cannot, write `path`, which the user called `text`."""
    if not text:
        raise ArgumentTypeError("an empty name is no file")
    if path.is_dir():
        raise ArgumentTypeError(f"{path} is a folder; name a file in it")
    target = Path(os.path.realpath(path))  # where it is written: a link may lead elsewhere
    if target.is_symlink():
        raise ArgumentTypeError(f"{path} is a link that leads to itself; name a file")
    _check_place(target, path)
    if path.exists() and not path.is_file():
        raise ArgumentTypeError(f"{path} is no file to write results to; name another")
    if path.exists() and path.stat().st_size and not own(path):
        raise ArgumentTypeError(f"{path} is there and not of {whose}; name another file, or move it")


def _check_place(path: Path, named: Path | None = None) -> None:
    """Raises ArgumentTypeError, about `named` or the path itself, if no file can be made at `path`; missing folders are
    made when it is written."""
    named = named or path
    try:
        folder = next(place for place in path.absolute().parents if place.exists())
        if not folder.is_dir():
            raise ArgumentTypeError(f"{folder} is a file, so {named} cannot lie in it")
        # Tried and not looked up: a superuser may do anything, but not on a file system that is read-only or full.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name[:20]}-") as file:
            file.write(bytes(PROBE))
            file.flush()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise ArgumentTypeError(f"{named} cannot be written ({told}); name another") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ArgumentTypeError(f"{named} cannot be written (it is read-only); name another")


def is_own(path: Path, module: str) -> bool:
    """Whether `python -m module` wrote the file."""
    said = _named(path)
    # From an installed package eval.needle is agentkv.eval.needle.
    return re.search(rf"python -m (agentkv\.)?{re.escape(module)}(\s|$)", said) is not None


def _named(path: Path) -> str:
    """The command that a file names, or ""."""
    try:
        if path.suffix == ".json":
            return str(json.loads(path.read_bytes())["meta"]["command"])
        with path.open("rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return _software(head) if path.suffix == ".png" else head.decode("utf-8", "replace").replace("`", " ")


def _software(png: bytes) -> str:
    """The text chunk "Software" of a picture."""
    at = png.find(SOFTWARE)
    # A chunk is its length in four bytes, its type, and so many bytes, of which the keyword is the beginning.
    stop = at + 4 + int.from_bytes(png[at - 4 : at], "big") if at >= 4 else 0
    return png[at + len(SOFTWARE) : stop].decode("latin-1")


def write_rows(path: Path | None, meta: dict[str, Any], rows: Any, **more: Any) -> None:
    """Write `{"meta": meta, "rows": rows, ...}` as JSON; nothing if `path` is None."""
    if path is not None:
        write_text(path, json.dumps({"meta": meta, "rows": rows, **more}, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either all of it or what it held before.

    Raises:
        OSError: it could not be written there. It then lies in a file of the temporary folder, which the message names,
            or if that is full too, on standard output.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`, for a picture or weights; what can be saved nowhere is not printed, if it is no text."""
    try:
        replace_whole(Path(os.path.realpath(path)), data)  # a link that the user named stays one
    except OSError as error:
        told = f"{path} could not be written ({error.strerror}); the results are {_rescue(path, data)}"
        raise OSError(told) from error


def _rescue(path: Path, data: bytes) -> str:
    """Put `data` where it is not lost; says where."""
    with suppress(OSError):
        number, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=path.suffix)
        with os.fdopen(number, "wb") as file:
            file.write(data)
        return f"in {name}"
    try:
        sys.stdout.write(data.decode("utf-8"))
        return "on standard output"
    except UnicodeDecodeError:
        return "lost: the temporary folder is full too"
