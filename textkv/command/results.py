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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HEAD = 2_000  # bytes in which a text names its command
SOFTWARE = b"tEXtSoftware\x00"


def results_file(module: str) -> Callable[[str], Path]:
    """The type of an argument that names a file which `python -m module` will write.

    Refused: no name, a folder, a place that cannot be written to, and a file that another program wrote.
    """

    def check(text: str) -> Path:
        """The path; ArgumentTypeError for what is refused."""
        path = Path(text)
        if not text:
            raise ArgumentTypeError("an empty name is no file")
        if path.is_dir():
            raise ArgumentTypeError(f"{path} is a folder; name a file in it")
        folder = next(place for place in path.absolute().parents if place.exists())
        if not folder.is_dir():
            raise ArgumentTypeError(f"{folder} is a file, so {path} cannot lie in it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise ArgumentTypeError(f"{path} cannot be written; name another file")
        if path.exists() and path.stat().st_size and not is_own(path, module):
            raise ArgumentTypeError(f"{path} is there and not of python -m {module}; name another file, or move it")
        return path

    return check


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
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        told = f"{path} could not be written ({error.strerror}); the results are {_rescue(path, text)}"
        raise OSError(told) from error


def _rescue(path: Path, text: str) -> str:
    """Put `text` where it is not lost; says where."""
    try:
        number, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=path.suffix, text=True)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        return f"in {name}"
    except OSError:
        sys.stdout.write(text)
        return "on standard output"
