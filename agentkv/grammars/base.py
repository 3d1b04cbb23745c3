"""What all action grammars share: the coordinates a model speaks in, the values of a reading, key names.

A grammar is a module with `NAME` and four functions: `parse(text, frame) -> Action | ParseError` for a loop that takes
one action a reply, `parse_all -> list[Action] | ParseError` and `read -> Reading | ParseError` for evaluations,
`render(action, frame) -> str`. Replies are data: they are scanned, never executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from agentkv.envs.actions import MODIFIER_KEYS, NAMED_KEYS, Action, Clicking, Drag, Move, Scroll

MAX_REPLY = 65_536
# No reply of a sane model holds more; the limit keeps the time of a reading short.
MAX_ACTIONS = 50
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

    def clamped(self, x: float, y: float, position: int, flags: set[str]) -> tuple[float, float]:
        """A point of the model as CSS pixels; one that lies a little outside moves to the edge and sets the flag
        "clamped", one further out raises `Reject`.
        """
        width, height = self.extent
        inside = self._inside(x, width, "x", position), self._inside(y, height, "y", position)
        if inside != (x, y):
            flags.add("clamped")
        return self.to_css(*inside)

    def _inside(self, value: float, size: int, axis: str, position: int) -> float:
        slack = OVERSHOOT * size
        if not -slack <= value <= size + slack:
            unit = f"{size} pixels" if self.space is CoordinateSpace.RESIZED else f"extent {size}"
            raise Reject(f"{axis}={value:g} is outside the image of {unit}", position)
        return min(max(value, 0), 0.9999 if self.space is CoordinateSpace.SHARE else size - 1)


@dataclass(frozen=True)
class ParseError:
    """Why a reply is no action, and at which character; a value that the loop shows and counts, never an exception."""

    reason: str
    position: int = 0


@dataclass(frozen=True)
class Reading:
    """All that a reply says, in order (at least one action), and what was amiss without making it unreadable.

    Flags: "clamped" (a point was outside, by at most 1 %), "cut short" (what follows the actions could not be read),
    "share" (decimals of 0 to 1 from a model that else counts pixels), "unclosed" (the end mark of a call is missing).
    """

    actions: tuple[Action, ...]
    flags: frozenset[str] = frozenset()


class Reject(Exception):
    """Leaves a parser at the first thing that is wrong; `attempt` turns it into its `error`."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.error = ParseError(reason, position)


def attempt(reader: Callable[[str, Frame], Reading], text: str, frame: Frame) -> Reading | ParseError:
    """`reader(text, frame)`, or why it was refused: too long, a NUL, or what the reader rejects."""
    if len(text) > MAX_REPLY:
        return ParseError(f"the reply has {len(text)} characters, more than {MAX_REPLY}", MAX_REPLY)
    if "\0" in text:
        return ParseError("the reply contains a NUL character", text.index("\0"))
    try:
        return reader(text, frame)
    except Reject as reject:
        return reject.error


def thought_end(text: str, call: int) -> int:
    """Where the thought `<think>...</think>` in front of the actions ends, 0 if there is none. `call`: where the first
    thing that looks like an action begins; without an opening tag only an end in front of it counts, because typed text
    may contain anything.
    """
    end, opened = text.find("</think>"), text.lstrip().startswith("<think>")
    if opened and end < 0:
        raise Reject("the <think> block does not end", 0)
    return end + len("</think>") if end >= 0 and (opened or end < call) else 0


def first_gesture(actions: tuple[Action, ...]) -> Action:
    """The first action, with the move that only brings the pointer to where it happens taken into it."""
    if len(actions) < 2 or not isinstance(actions[0], Move):
        return actions[0]
    move, then = actions[:2]
    if isinstance(then, Drag | Scroll) and then.x is None:
        return replace(then, x=move.x, y=move.y)
    return then if isinstance(then, Clicking) and (then.x, then.y) == (move.x, move.y) else move


def number_of(value: object, name: str, position: int) -> int | float:
    """A number that a model wrote, finite and below a million; raises `Reject` for anything else, also for a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Reject(f"{name} is {type(value).__name__}, not a number", position)
    if not abs(value) <= 1_000_000:
        raise Reject(f"{name} is not a finite number below a million", position)
    return value


_UNTYPABLE = re.compile("[\0\ud800-\udfff]")


def shown(value: object) -> str:
    """A value of a model for an error: a text in quotes and cut, anything else by its type only (it may be huge)."""
    return repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def text_of(value: object, name: str, position: int) -> str:
    """A text that a model wrote; raises `Reject` for anything else, and for characters that no keyboard types."""
    if not isinstance(value, str):
        raise Reject(f"{name} is {type(value).__name__}, not text", position)
    if _UNTYPABLE.search(value):
        raise Reject(f"{name} contains a NUL character or half a character", position)
    return value


def unsayable(grammar: str, action: Action) -> ValueError:
    """The error for an action that a grammar has no words for."""
    return ValueError(f"the {grammar} grammar cannot say {action!r}")


# word of a model, lower case -> Playwright's name
_WORDS = {name.lower(): name for name in (*MODIFIER_KEYS, *NAMED_KEYS)}
_WORDS |= {"meta": "Meta"} | dict.fromkeys(("cmd", "command", "win", "winleft", "winright", "super"), "Meta")
_WORDS |= {"ctrl": "Control", "ctrlleft": "Control", "ctrlright": "Control", "option": "Alt"}
_WORDS |= {"altleft": "Alt", "altright": "Alt", "optionleft": "Alt", "optionright": "Alt"}
_WORDS |= {"shiftleft": "Shift", "shiftright": "Shift", "return": "Enter", "esc": "Escape", "del": "Delete"}
_WORDS |= {"up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft", "right": "ArrowRight"}
_WORDS |= {"pgup": "PageUp", "pgdn": "PageDown", "\n": "Enter", "\r": "Enter", "\t": "Tab", " ": "Space"}
# what models were taught to say, where a key has several words
_SAID = {
    "Control": "ctrl",
    "Meta": "win",
    "ArrowUp": "up",
    "ArrowDown": "down",
    "ArrowLeft": "left",
    "ArrowRight": "right",
}


def key_of(word: str, position: int) -> str:
    """Playwright's name of a key that a model named; raises `Reject` for an unknown one."""
    if len(word) == 1 and "!" <= word <= "~":
        return word
    if word.lower() not in _WORDS:
        raise Reject(f"{word[:40]!r} is not a key", position)
    return _WORDS[word.lower()]


def word_of(key: str) -> str:
    """The word for one of Playwright's keys. Raises ValueError for a key that no grammar knows."""
    if len(key) == 1 and "!" <= key <= "~":
        return key
    if key not in _WORDS.values():
        raise ValueError(f"{key!r} is not a key of this grammar; use a character or one of {', '.join(NAMED_KEYS)}")
    return _SAID.get(key, key.lower())
