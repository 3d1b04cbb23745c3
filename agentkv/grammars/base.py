"""What all action grammars share: the coordinates a model speaks in, the value of a failed parse, key names.

A grammar is a module with `parse(text, frame) -> Action | ParseError` and `render(action, frame) -> str`. Replies are
data: they are scanned, never executed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

MAX_REPLY = 65_536
# A point this far outside the image (as a share of its side) is a slip of rounding and moves to the edge; further out
# it is an error.
OVERSHOOT = 0.01


class CoordinateSpace(Enum):
    """The numbers in which a model names points of a screenshot."""

    RESIZED = "whole pixels of the image that the processor made"
    PER_MILLE = "whole numbers, 0 to 1000 of each side"
    SHARE = "decimal numbers, 0 to 1 of each side"


@dataclass(frozen=True)
class Frame:
    """One screenshot as a model saw it: `css` and `resized` are (width, height), `grid` the (rows, columns) of its
    visual tokens, `space` how the model counts.

    Only the size that the processor made of the screenshot is used to convert pixels, never one computed again.
    """

    css: tuple[int, int]
    resized: tuple[int, int]
    grid: tuple[int, int] = (0, 0)
    space: CoordinateSpace = CoordinateSpace.RESIZED

    def __post_init__(self) -> None:
        for name, size in (("css", self.css), ("resized", self.resized)):
            if min(size) < 1:
                raise ValueError(f"{name}={size} is not a size in pixels; both sides must be at least 1")

    @property
    def extent(self) -> tuple[int, int]:
        """(width, height) of the screenshot in the model's numbers."""
        if self.space is CoordinateSpace.RESIZED:
            return self.resized
        return (1000, 1000) if self.space is CoordinateSpace.PER_MILLE else (1, 1)

    def to_css(self, x: float, y: float) -> tuple[float, float]:
        """A point in the model's numbers as CSS pixels."""
        width, height = self.extent
        return x * self.css[0] / width, y * self.css[1] / height

    def from_css(self, x: float, y: float) -> tuple[float, float]:
        """A CSS point in the model's numbers, inside the image: whole numbers (int), or 4 decimals for `SHARE`.

        Undoes `to_css` exactly for such numbers. Raises ValueError for a point that is not finite.
        """
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"({x}, {y}) is not a point; give two finite numbers")
        width, height = self.extent
        return self._rounded(x * width / self.css[0], width), self._rounded(y * height / self.css[1], height)

    def _rounded(self, value: float, size: int) -> float:
        if self.space is CoordinateSpace.SHARE:
            return min(max(round(value, 4), 0.0), 0.9999)
        return min(max(round(value), 0), size - 1)

    def clamped(self, x: float, y: float, position: int) -> tuple[float, float]:
        """A point of the model as CSS pixels, moved to the edge if it lies a little outside; else raises `Reject`."""
        width, height = self.extent
        return self.to_css(_clamp(x, width, "x", position), _clamp(y, height, "y", position))


def _clamp(value: float, size: int, axis: str, position: int) -> float:
    slack = OVERSHOOT * size
    if not -slack <= value <= size + slack:
        unit = "1" if size == 1 else f"{size} pixels"
        raise Reject(f"{axis}={value:g} is outside the image of {unit}", position)
    return min(max(value, 0.0), size - 1.0 if size > 1 else 0.9999)


@dataclass(frozen=True)
class ParseError:
    """Why a reply is no action, and at which character; a value that the loop shows and counts, never an exception."""

    reason: str
    position: int = 0


class Reject(Exception):
    """Leaves a parser at the first thing that is wrong; `parse` turns it into its `error`."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.error = ParseError(reason, position)


def refuse_size(text: str) -> ParseError | None:
    """The error of a reply that is too long or holds a NUL, None for any other."""
    if len(text) > MAX_REPLY:
        return ParseError(f"the reply has {len(text)} characters, more than {MAX_REPLY}", MAX_REPLY)
    if "\0" in text:
        return ParseError("the reply contains a NUL character", text.index("\0"))
    return None


MODIFIERS = {"ctrl": "Control", "control": "Control", "shift": "Shift", "alt": "Alt", "option": "Alt"}
MODIFIERS |= dict.fromkeys(("meta", "cmd", "command", "win", "super"), "Meta")
NAMED_KEYS = ("Enter", "Escape", "Tab", "Backspace", "Delete", "Space", "Home", "End", "PageUp", "PageDown", "Insert")
NAMED_KEYS += ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "CapsLock") + tuple(f"F{n}" for n in range(1, 13))
# word of a model, lower case -> Playwright's name
KEYS = MODIFIERS | {name.lower(): name for name in NAMED_KEYS}
KEYS |= {"return": "Enter", "esc": "Escape", "del": "Delete", "up": "ArrowUp", "down": "ArrowDown"}
KEYS |= {"left": "ArrowLeft", "right": "ArrowRight", "pgup": "PageUp", "pgdn": "PageDown"}
WORD_OF_KEY = {name: word for word, name in reversed(KEYS.items())}
MAX_KEYS = 5


def key_of(word: str, position: int) -> str:
    """Playwright's name of a key that a model named; raises `Reject` for an unknown one."""
    if len(word) == 1:
        return word
    if word.lower() not in KEYS:
        raise Reject(f"{word[:40]!r} is not a key", position)
    return KEYS[word.lower()]


def word_of(key: str) -> str:
    """The word for one of Playwright's keys. Raises ValueError for a key that no grammar knows."""
    if len(key) == 1 and not key.isspace() and key not in "'\"\\":
        return key
    if key not in WORD_OF_KEY:
        raise ValueError(f"{key!r} is not a key of this grammar; use a character or one of {', '.join(NAMED_KEYS)}")
    return WORD_OF_KEY[key]
