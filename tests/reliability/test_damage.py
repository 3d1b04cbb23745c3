"""Everything that reads JSON meets everything that a damaged file holds: one line that names the file, or the damaged
part alone is lost and told.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from textkv.command.ending import one_line

from .commands import FOLDERS, ROOT
from .readers import READERS

NOT = object()
VALUES = {
    "missing field": NOT, "null": None, "a list for a value": [], "an object for a value": {}, "huge number": 10**400,
    "NaN": float("nan"), "overflowing number": "\x00", "deep nesting": "\x01", "negative": -1,
    "text for a value": "x" * 2_000,
}  # fmt: skip


def spots(value: Any, depth: int = 3) -> Iterator[tuple]:
    """Paths of fields; of a list its first entry stands for all."""
    if isinstance(value, dict) and depth:
        for name, one in value.items():
            yield (name,)
            yield from ((name, *rest) for rest in spots(one, depth - 1))
    elif isinstance(value, list) and value and depth:
        yield (0,)
        yield from ((0, *rest) for rest in spots(value[0], depth - 1))


def changed(value: Any, path: tuple, new: Any) -> bytes:
    """JSON with another value at a place, or without it."""
    copied = json.loads(json.dumps(value))
    holder = copied
    for name in path[:-1]:
        holder = holder[name]
    if new is NOT:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return json.dumps(copied).replace('"\\u0000"', "1e999").replace('"\\u0001"', "[" * 2_000 + "]" * 2_000).encode()


def damage(right: Any) -> Iterator[tuple[str, bytes, bool]]:
    """(fault, bytes, whether nobody can read them)."""
    whole = json.dumps(right).encode()
    yield "truncated", whole[: len(whole) // 2], True
    yield "not UTF-8", whole.replace(b'"', b'"\xff', 1), True
    yield "deep nesting", b"[" * 100_000, True
    yield "deep nesting", b'{"a":' * 3_000 + b"1" + b"}" * 3_000, True
    yield "a number for the whole", b"7", True
    yield "a list for an object", (b"{}" if isinstance(right, list) else b"[]"), True
    yield "null for the whole", b"null", True
    yield "a number of 5,000 digits", b"9" * 5_000, True
    for path in spots(right):
        for fault, new in VALUES.items():
            if new is NOT and isinstance(path[-1], int):
                continue  # a list with an entry less
            yield fault, changed(right, path, new), False


@pytest.mark.parametrize("name", READERS)
def test_damage_is_one_line_or_local(name, tmp_path, capsys, reliability):
    reader = READERS[name]
    path, right = reader.right(tmp_path)
    whole = path.read_bytes() if path.exists() else None
    put = reader.put or (lambda path, data: path.write_bytes(data))
    put(path, json.dumps(right).encode())
    first = reader.read(tmp_path)
    capsys.readouterr()
    for fault, data, surely in damage(right):
        if reader.text and fault == "not UTF-8":
            continue  # it lies in another file as text
        if whole is not None:
            path.write_bytes(whole)
        put(path, data)
        try:
            parts, told = reader.read(tmp_path) if reader.local else (None, None)
            found = None if reader.local else reader.read(tmp_path)
        except (ValueError, OSError) as error:
            assert not reader.local, (fault, error)
            assert "\n" not in str(error), (fault, data[:200])
            line = one_line(error)  # as a command tells it
            # A folder stands for its only file.
            assert path.name in line or str(tmp_path) in line or path.parent.name in line, (fault, data[:200], line)
            outcome = "one line that names the file"
        except Exception as error:
            raise AssertionError(f"{fault}: {data[:200]!r}") from error
        else:
            line = "\n".join(told) if told is not None else capsys.readouterr().err
            if reader.local:
                assert first[0] - 1 <= parts <= first[0] and parts >= 1, (fault, data[:200])
                named = path.name.partition(".")[0] in line or str(path.parent) in line
                assert (parts < first[0]) == named, (fault, data[:200], line)
                outcome = "that part alone is lost, and told" if parts < first[0] else "a value that it may have"
                assert not surely or parts < first[0], (fault, data[:200])
            else:
                assert not surely, (fault, data[:200], found)
                outcome = "a value that it may have"
        reliability(4, fault, name, outcome)


def test_no_json_is_read_past_the_strict_reader():
    """What a file holds goes through textkv.records; what is left reads what this process itself was given."""
    found = set()
    for path in sorted(x for folder in FOLDERS for x in (ROOT / folder).rglob("*.py")):
        if re.search(r"json\.loads?\(", path.read_text(encoding="utf-8")):
            found.add(str(path.relative_to(ROOT)))
    assert found == {
        "envs/pickers/__init__.py",  # from the world of our own script in a page
        "envs/sites/packages.py",  # a registry's answer, any fault of which is one line
        "eval/peers/kvpress_side.py",  # its parent's request
        "eval/serving.py",  # an answer of the server that it measures
        "textkv/command/results.py",  # whose file it is: any fault means a stranger's
        "textkv/records.py",
        "training/agent/tokenizer.py",  # a tokenizer made just before
        "training/text/tokenizer.py",
    }
