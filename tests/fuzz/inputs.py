"""Random texts, values and bytes near those that are right: mutations go deeper into a reader than noise does."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Sequence
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", "0", "nan", "..", "/etc/hostname", "a\0b", "\ud800", "\u2028", "é" * 50, "x" * 5_000, [], {}, [[]], [None],
    {"": ""}, [1, "a"], {"type": "Click"},
]  # fmt: skip
PIECES = [
    *"(),=+.-%et'\"[]{}:\\\n\0 ",
    "  ",
    "nan",
    "inf",
    "1e999",
    "-1",
    "0",
    "1",
    "0.5",
    "64t",
    "9" * 20,
    "None",
    "True",
]
PIECES += ["٣", "１", "é", "\ud800", "\\u0000", "\\ud800"]


def noise(rng: random.Random, most: int = 24) -> str:
    """Pieces of the languages read here, and characters of any kind."""
    return "".join(
        rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.choice((rng.randrange(128), rng.randrange(0x3100))))
        for _ in range(rng.randint(0, most))
    )


def edited(rng: random.Random, text: str, words: Sequence[str] = ()) -> str:
    """`text` after up to three small edits; `words` are put in as often as pieces are."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        a = rng.randint(0, len(text))
        b = min(a + rng.randint(1, 5), len(text))
        piece = rng.choice(words) if words and rng.random() < 0.5 else rng.choice(PIECES)
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:a] + piece + text[a:]
        elif kind == 1:
            text = text[:a] + text[b:]
        elif kind == 2:
            text = text[:a] + piece + text[b:]
        elif kind == 3:
            text = text[:b] + text[a:]
        elif kind == 4:
            text = text[:a] + text[a:b] * rng.choice((2, 3, 50)) + text[b:]
        else:
            text = text[:a] + rng.choice(string.printable) + text[b:]
    return text


def bent(rng: random.Random, value: Any) -> Any:
    """A JSON value of which one to three parts are odd, gone, twice there or in another's place."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holders = list(_holders(value))
        if not holders:
            return rng.choice(ODD)
        holder = rng.choice(holders)
        place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = rng.randrange(5)
        if kind == 0:
            del holder[place]
        elif kind == 1:
            other = rng.choice(holders)
            holder[place] = copy.deepcopy(next(iter(other.values())) if isinstance(other, dict) else other[0])
        elif kind == 2 and isinstance(holder, list):
            holder.insert(place, copy.deepcopy(holder[place]))
        elif kind == 3 and isinstance(holder[place], int | float):
            holder[place] = rng.choice((holder[place] + 1, -holder[place], holder[place] * 10**6, str(holder[place])))
        else:
            holder[place] = copy.deepcopy(rng.choice(ODD))
    return value


def _holders(value: Any) -> list[Any]:
    """All lists and objects in a value that hold something."""
    found, level = [], [value]
    while level:
        one = level.pop()
        if isinstance(one, dict | list) and one:
            found.append(one)
            level += one.values() if isinstance(one, dict) else one
    return found


def spelled(rng: random.Random, value: Any) -> bytes:
    """JSON of a bent value, now and then with bent characters or bytes, or something deep or huge in its middle."""
    text = json.dumps(bent(rng, value) if rng.random() < 0.85 else value)
    kind = rng.random()
    if kind < 0.15:
        text = edited(rng, text)
    elif kind < 0.16:
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(("[" * 3_000, '{"a":' * 3_000, "9" * 5_000, "1e" + "9" * 50)) + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    return mangled(rng, data) if 0.16 <= kind < 0.22 else data


def mangled(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Bytes of which a few are changed, or with an end that is cut or too long."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        kind, at = rng.randrange(5), rng.randrange(len(out)) if out else 0
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
        elif out:
            out[at] = rng.randrange(256)
    return bytes(out)
