"""Types of arguments, for `add_argument(type=...)`: each names the value, the limit and the mend.

No option of a command has a bare `int`, `float`, `str` or `Path`: what a type here lets through can be worked with.
"""

from __future__ import annotations

import codecs
import difflib
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TypeVar

from textkv.expression import number, split_commas, whole

T = TypeVar("T")

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?i?b)", re.IGNORECASE | re.ASCII)
_UNITS = {"b": 1, "ib": 1} | {
    f"{letter}{middle}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for middle, base in (("", 1000), ("i", 1024))
}
LARGEST = 2**31 - 1  # of a count or a seed: what numpy, torch and Chromium all take
PIECE = 1 << 20  # bytes that are read at once
TOKENS = 10**7  # of a text: more than any model reads, and than memory holds of its caches
QUESTIONS = 100_000  # all are made before the first is asked
ROOM = 10**17  # bytes
LONGEST = 10**9  # seconds, minutes: more than a clock's sleep takes is no time


def checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """A type of argument from a function that raises ValueError or OSError: argparse alone would hide what it says."""

    @wraps(read)
    def check(text: str) -> T:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise ArgumentTypeError(str(error)) from None

    return check


def some_text(text: str) -> str:
    """Some words: a prompt, a name, an address."""
    if not text.strip():
        raise ArgumentTypeError(f"{text!r} says nothing; give some text, or leave the option out")
    if not text.isascii() and text.encode("utf-8", "replace").decode("utf-8") != text:
        raise ArgumentTypeError(f"{text!r} is not UTF-8 text; write it in UTF-8")
    return text


def count(text: str) -> int:
    """A number of things, at least 1."""
    return _whole(text, 1, "a count")


def token_count(text: str) -> int:
    """A number of tokens or words, at least 1."""
    return _whole(text, 1, "a number of tokens", TOKENS)


def question_count(text: str) -> int:
    """A number of questions, problems or conversations, which are made before the work."""
    return _whole(text, 1, "a number of questions", QUESTIONS)


def episodes(text: str) -> int:
    """A number of episodes: each is a folder on disk, so that more are a mistake."""
    return _whole(text, 1, "a number of episodes", 100_000)


def processes(text: str) -> int:
    """A number of processes, each with a model or a browser."""
    return _whole(text, 1, "a number of processes", 256)


def threads(text: str) -> int:
    """A number of threads; 0 leaves the choice to torch."""
    return _whole(text, 0, "a number of threads", 1024)


def natural(text: str) -> int:
    """A number from 0 on."""
    return _whole(text, 0, "a number from 0 on")


def naturals(text: str) -> list[int]:
    """Comma-separated numbers from 0 on, at least one."""
    return [natural(part) for part in names(text)]


def seed(text: str) -> int:
    """A seed, at least 0."""
    return _whole(text, 0, "a seed")


def port(text: str) -> int:
    """A port to listen on."""
    return _whole(text, 1, "a port", 65_535)


def fraction(text: str) -> float:
    """A share in 0..1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        hint = f"; a percentage {text} is {value / 100:g}" if 1.0 < value <= 100.0 else ""
        raise ArgumentTypeError(f"{text} lies outside 0 to 1{hint}")
    return value


def fractions(text: str) -> list[float]:
    """Comma-separated shares in 0..1, at least one."""
    return [fraction(part) for part in names(text)]


def seconds(text: str) -> float:
    """A time of more than 0 seconds."""
    value = _number(text)
    if not 0 < value <= LONGEST:
        raise ArgumentTypeError(f"{text} seconds is no time; use more than 0, up to {LONGEST:,}")
    return value


def scale(text: str) -> float:
    """Device pixels per CSS pixel."""
    value = _number(text)
    if not 0.1 <= value <= 10:
        raise ArgumentTypeError(f"{text} is not a scale; use 0.1 to 10")
    return value


def positive(text: str) -> float:
    """A finite number above 0: a scale, a rate, minutes."""
    value = _number(text)
    if not 0 < value <= LONGEST:
        raise ArgumentTypeError(f"{text} is out of range; use more than 0, up to {LONGEST:,}")
    return value


def finite(text: str) -> float:
    """A finite number."""
    return _number(text)


def weight(text: str) -> float:
    """A finite number from 0 on: what something counts, a temperature."""
    value = _number(text)
    if not 0 <= value <= LONGEST:
        raise ArgumentTypeError(f"{text} is out of range; use 0 to {LONGEST:,}")
    return value


def size(text: str) -> int:
    """A number of bytes, as 512MB, 8GB or 1GiB; at least 1."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no size; write 512MB or 8GB")
    value = int(float(found[1]) * _UNITS[found[2].lower()])
    if value < 1:
        raise ArgumentTypeError(f"{text} is no room at all; write 512MB or 8GB")
    if value > ROOM:
        raise ArgumentTypeError(f"{text} is more than any machine has; use up to {ROOM // _UNITS['tb']:,}TB")
    return value


def names(text: str) -> list[str]:
    """Comma-separated names, at least one, each once; commas inside brackets belong to a name."""
    found = split_commas(text)
    if not any(found):
        raise ArgumentTypeError(f"{text!r} names nothing; give one or more, separated by commas")
    found = found if found[-1] else found[:-1]  # a comma at the end is how some write lists
    if not all(found):  # something was left out, and only who wrote it knows what
        raise ArgumentTypeError(f"{text!r} names nothing before one of its commas; leave that comma out")
    return list(dict.fromkeys(found))


def lengths(text: str) -> list[int]:
    """Comma-separated numbers of tokens, or of what has as many at most; at least one."""
    return [token_count(part) for part in names(text)]


def client_counts(text: str) -> list[int]:
    """Comma-separated numbers of clients, each a thread and a connection; at least one."""
    return [_whole(part, 1, "a number of clients", 1024) for part in names(text)]


def numbers(text: str) -> list[float]:
    """Comma-separated finite numbers, at least one."""
    return [_number(part) for part in names(text)]


def choices(*known: str) -> Callable[[str], list[str]]:
    """The type of comma-separated words, at least one, each of them `known`."""

    def check(text: str) -> list[str]:
        """The words."""
        found = names(text)
        if wrong := [word for word in found if word not in known]:
            near = difflib.get_close_matches(wrong[0], known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ArgumentTypeError(f"{wrong[0]!r} is not known; {hint}")
        return found

    check.__name__ = "choices"
    return check


def readable(text: str) -> Path:
    """An existing file to read."""
    path = Path(text)
    if not text or not path.is_file():
        told = "; that is a folder" if text and path.is_dir() else ""
        raise ArgumentTypeError(f"there is no file {text!r}{told}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ArgumentTypeError(f"{path} cannot be read ({error.strerror}); name another file") from None
    return path


def text_file(text: str) -> Path:
    """An existing file of UTF-8 text."""
    path, decoder = readable(text), codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while piece := file.read(PIECE):
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise ArgumentTypeError(f"{path} is not UTF-8 text; convert it, or name another file") from None
    return path


def readable_folder(text: str) -> Path:
    """An existing folder to read from."""
    path = Path(text)
    if not text or not path.is_dir():
        told = "; that is a file" if text and path.exists() else ""
        raise ArgumentTypeError(f"there is no folder {text!r}{told}")
    return path


def existing_path(text: str) -> Path:
    """A file or folder that is there."""
    if not text or not Path(text).exists():
        raise ArgumentTypeError(f"there is no file or folder {text!r}")
    return Path(text)


def _whole(text: str, least: int, what: str, most: int = LARGEST) -> int:
    try:
        value = whole(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not {what}; use a whole number from {least} on") from None
    if not least <= value <= most:
        raise ArgumentTypeError(f"{text} is not {what}; use {least} to {most:,}")
    return value


def _number(text: str) -> float:
    try:
        value = number(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is not a finite number")
    return value
