"""What all action grammars share: the coordinates a model speaks in, the values of a reading, the grammar itself.

A grammar is a `Grammar`, one a module: it reads a reply of a model as typed actions and writes actions as the model
would. Replies are data: they are scanned, never executed. What a reply means is decided by rules that stand in one
table at the head of each module, one rule for each kind of slip that published clients forgive. The rule over all:
no text is typed that the model did not mean as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

from agentkv.envs.actions import Action, Clicking, Drag, Move, Scroll, Several, Single

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
    TO_999 = "whole numbers, 0 to 999 of each side, 999 at the far edge"
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
        return self.resized if self.space is CoordinateSpace.RESIZED else _EXTENTS[self.space]

    def to_css(self, x: float, y: float) -> tuple[float, float]:
        """A point in the model's numbers as CSS pixels, inside the viewport."""
        width, height = self.extent
        return self._onto(x / width, self.css[0]), self._onto(y / height, self.css[1])

    @staticmethod
    def _onto(share: float, size: int) -> float:
        return min(share, 1 - 1e-9) * size

    def from_css(self, x: float, y: float) -> tuple[float, float]:
        """A CSS point in the model's numbers, inside the image: whole numbers (int), or 4 decimals for `SHARE`.

        Undoes `to_css` exactly for such numbers. Raises ValueError for a point that is not finite.
        """
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"({x}, {y}) is not a point; give two finite numbers")
        width, height = self.extent
        return self._rounded(x * width / self.css[0], width), self._rounded(y * height / self.css[1], height)

    def _last(self, size: int) -> float:
        """The greatest number of an axis of that extent."""
        if self.space is CoordinateSpace.SHARE:
            return 0.9999
        return size if self.space is CoordinateSpace.TO_999 else size - 1

    def _rounded(self, value: float, size: int) -> float:
        if self.space is CoordinateSpace.SHARE:
            return min(max(round(value, 4), 0.0), 0.9999)
        return min(max(round(value), 0), int(self._last(size)))

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
        return min(max(value, 0), self._last(size))


_EXTENTS = {CoordinateSpace.PER_MILLE: (1000, 1000), CoordinateSpace.TO_999: (999, 999), CoordinateSpace.SHARE: (1, 1)}


@dataclass(frozen=True)
class ParseError:
    """Why a reply is no action, and at which character; a value that the loop shows and counts, never an exception."""

    reason: str
    position: int = 0


@dataclass(frozen=True)
class Reading:
    """All that a reply says, in order (at least one action), and what was amiss without making it unreadable.

    `left_out` says in words what of the reply is not in `actions`, and why; "" if nothing was left out. Flags:
    "clamped" (a point was outside, by at most 1 %), "cut short" (what follows the actions could not be read), "share"
    (decimals of 0 to 1 from a model that else counts pixels), "unclosed" (the end mark of a call is missing), "ignored"
    (an argument that the call does not have was passed over).
    """

    actions: tuple[Single, ...]
    flags: frozenset[str] = frozenset()
    left_out: str = ""

    @property
    def action(self) -> Action:
        """The actions as one step, a move that only brings the pointer to what follows taken into that."""
        joined: list[Single] = []
        for action in self.actions:
            if joined and isinstance(joined[-1], Move) and (whole := _continued(joined[-1], action)):
                joined[-1] = whole
            else:
                joined.append(action)
        return joined[0] if len(joined) == 1 else Several(tuple(joined))


def _continued(move: Move, then: Single) -> Single | None:
    """`then` at the place of `move`, None if it happens elsewhere."""
    if isinstance(then, Drag | Scroll | Clicking) and then.x is None and then.y is None:
        return replace(then, x=move.x, y=move.y)
    return then if isinstance(then, Clicking) and (then.x, then.y) == (move.x, move.y) else None


class Reject(Exception):
    """Leaves a parser at the first thing that is wrong; `attempt` turns it into its `error`."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.error = ParseError(reason, position)


@dataclass(frozen=True)
class Grammar:
    """How a family of models writes actions: `reader(text, frame)` may raise `Reject`, `writer(action, frame)`
    ValueError for an action that the grammar has no words for.
    """

    name: str
    reader: Callable[[str, Frame], Reading]
    writer: Callable[[Action, Frame], str]

    def read(self, text: str, frame: Frame) -> Reading | ParseError:
        """All actions of a reply, in CSS pixels of `frame`, with what was amiss; or why there is none. Never raises,
        never executes anything.
        """
        if len(text) > MAX_REPLY:
            return ParseError(f"the reply has {len(text)} characters, more than {MAX_REPLY}", MAX_REPLY)
        if "\0" in text:
            return ParseError("the reply contains a NUL character", text.index("\0"))
        try:
            return self.reader(text, frame)
        except Reject as reject:
            return reject.error

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """What a reply says as one step, or why there is nothing to do."""
        reading = self.read(text, frame)
        return reading if isinstance(reading, ParseError) else reading.action

    def parse_all(self, text: str, frame: Frame) -> list[Single] | ParseError:
        """The actions of a reply one by one, for evaluations."""
        reading = self.read(text, frame)
        return reading if isinstance(reading, ParseError) else list(reading.actions)

    def render(self, action: Action, frame: Frame) -> str:
        """The reply that says `action`; points are rounded to the numbers of the frame. Raises ValueError for an
        action or a key that the grammar does not know and for a point that is not finite.
        """
        return self.writer(action, frame)


def thought_end(text: str, call: int) -> int:
    """Where the thought `<think>...</think>` (or `thinking`) in front of the actions ends, 0 if there is none. `call`:
    where the first thing that looks like an action begins; without an opening tag only an end in front of it counts,
    because typed text may contain anything.
    """
    opened = _THOUGHT.match(text)
    ends = [end for mark in ("</think>", "</thinking>") if (end := text.find(mark)) >= 0]
    if opened and not ends:
        raise Reject(f"the {opened[1]} block does not end", 0)
    end = min(ends, default=-1)
    return text.index(">", end) + 1 if end >= 0 and (opened or end < call) else 0


_THOUGHT = re.compile(r"\s*+(<think(?:ing)?>)")


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


def some(names: Iterable[str]) -> str:
    """The first names of a list, for an error."""
    known = list(names)
    return ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")


def text_of(value: object, name: str, position: int) -> str:
    """A text that a model wrote; raises `Reject` for anything else, and for characters that no keyboard types."""
    if not isinstance(value, str):
        raise Reject(f"{name} is {type(value).__name__}, not text", position)
    if _UNTYPABLE.search(value):
        raise Reject(f"{name} contains a NUL character or half a character", position)
    return value


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|(?:about|javascript|data|blob|mailto):", re.IGNORECASE)


def address_of(text: str) -> str:
    """An address as the makers' browsers open it: https:// stands before one without a scheme."""
    text = text.strip()
    return text if _SCHEME.match(text) else f"https://{text}"


def unsayable(grammar: str, action: object) -> ValueError:
    """The error for an action that a grammar has no words for."""
    return ValueError(f"the {grammar} grammar cannot say {action!r}")
