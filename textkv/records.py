"""Records of JSON from a file, read strictly: whatever is wrong with one is a ValueError of one line.

Python's own reader takes NaN and 1e999, gives an int of 4,000 digits, and ends deep nesting with a RecursionError. A
reader of traces, patterns, saved headers or batch files wants none of this, and it wants to know that a field is there
and of its type before it computes with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

DEPTH = 64  # of lists and objects in one another; what this toolkit writes has at most seven
LARGEST = 2**63 - 1  # of a whole number: what torch, numpy and Arrow hold
MAX_BYTES = 256_000_000  # of a file that is read at once
SAID = 40  # characters of a value in a message
Kind = type | tuple[type, ...]
T = TypeVar("T")


def parse(text: bytes | str, finite: bool = True) -> Any:
    """The value of one JSON text.

    Args:
        finite: refuse the text for a number that is not finite or beyond 64 bits; else the number comes back as nan or
            inf, so that it can be refused where it is used and costs nothing beside.

    Raises:
        ValueError: not UTF-8, not JSON, nested deeper than `DEPTH`, or a number that is not finite or beyond 64 bits.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        reading = (
            {"parse_constant": _refuse, "parse_float": _float, "parse_int": _int} if finite else {"parse_int": _lax}
        )
        value = json.loads(text, **reading)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f" in line {error.lineno}" if "\n" in text else ""
        raise ValueError(f"not JSON ({error.msg}{where})") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    if _depth(value) > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    return value


def read(path: Path, limit: int = MAX_BYTES) -> Any:
    """The value in a file.

    Raises:
        ValueError: see `parse`, or more than `limit` bytes; the message names the file.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {size} bytes, more than {limit}")
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_fields(path: Path, must: Mapping[str, Kind], may: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The object in a file, see `read` and `checked`. Raises ValueError, which names the file, for anything else."""
    value = read(path)
    try:
        return checked(value, must, may)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_text(path: Path) -> str:
    """The text in a file. Raises ValueError, which names it, if that is not UTF-8, and OSError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or name another file") from None


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(meta, rows) of a file of results that is to be gone on with. Raises ValueError for what is none."""
    try:
        value = checked(read(path), {"meta": dict, "rows": list})
        return value["meta"], listed(value["rows"], dict, "rows")
    except ValueError as error:
        raise ValueError(f"{path} is no file of results ({error}); give another --json") from None


def checked(value: Any, must: Mapping[str, Kind], may: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The value as an object with all fields of `must`, and those of `may` of their type where they are there.

    A bool is no number here, and an int is good where a float is wanted.

    Raises:
        ValueError: it is no object, or a field is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{_said(value)} where an object belongs")
    for name, kind in must.items():
        if name not in value:
            raise ValueError(f"it has no {name!r}")
        _check(name, value[name], kind)
    for name, kind in (may or {}).items():
        if name in value:
            _check(name, value[name], kind)
    return value


def listed(value: Any, kind: Kind, name: str) -> list[Any]:
    """The value as a list whose entries are all of `kind`. Raises ValueError, which calls it `name`."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_said(value)}, not a list")
    for one in value:
        _check(f"an entry of {name}", one, kind)
    return value


def build(kind: type[T], value: Any) -> T:
    """A dataclass of plain values (numbers, texts, lists, tuples, dicts, None) from the object that its fields made.

    Raises:
        ValueError: no object, a field that the class has not, lacks, or has of another type.
    """
    hints = get_type_hints(kind)
    given = {name: tuple(one) if isinstance(one, list) and _is_tuple(hints.get(name)) else one
             for name, one in checked(value, {}).items()}  # fmt: skip
    for field in fields(kind):
        if field.name in given and not fits(given[field.name], hints[field.name]):
            raise ValueError(f"{kind.__name__} has no {field.name} of {_said(value[field.name])}")
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks {field.name}")
    unknown = next((name for name in given if name not in hints), None)
    if unknown is not None:
        raise ValueError(f"{kind.__name__} has no {_said(unknown)}")
    return kind(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint: a plain type, or a union, a Literal, a tuple, list or dict of such."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None:
        return type(value) is hint or (hint is float and type(value) is int) or (hint is Any)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (tuple, list):
        return type(value) is origin and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return type(value) is dict and all(fits(key, inner[0]) and fits(one, inner[1]) for key, one in value.items())
    return any(fits(value, one) for one in inner)


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _check(name: str, value: Any, kind: Kind) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not any(fits(value, one) for one in kinds):
        raise ValueError(f"{name} is {_said(value)}, not {' or '.join(map(_named, kinds))}")


def _named(kind: Kind) -> str:
    return str(kind) if get_origin(kind) else kind.__name__


def _said(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= SAID else f"{text[:SAID]}..."


def _depth(value: Any) -> int:
    """How many lists and objects lie in one another; breadth first, as recursion would end as the reader's did."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:SAID]} is beyond a number of 64 bits")
    return value


def _int(text: str) -> int:
    value = _lax(text)
    if isinstance(value, float):
        raise ValueError(f"{text[:SAID]} is beyond a number of 64 bits")
    return value


def _lax(text: str) -> int | float:
    # 19 digits and a sign: a longer one is not read at all, as that costs the square of its digits.
    value = int(text) if len(text) <= 20 else LARGEST + 1
    return value if abs(value) <= LARGEST else math.inf
