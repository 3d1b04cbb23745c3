"""The UI-TARS action grammar: what a model says <-> typed actions in CSS pixels. Parsed by a scanner, never executed.

A reply is an optional thought and `Action: name(key='value', ...)`. Points are spelled `(x,y)`,
`<|box_start|>(x,y)<|box_end|>`, `<point>x y</point>` or `[x1, y1, x2, y2]` (a box stands for its centre). Only the
first action counts: it may change the page, so what was said to follow it was decided without seeing the result;
everything after it is ignored. The scan is linear in the length of the reply, which is limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from agentkv.grammars.base import MAX_KEYS, Frame, ParseError, Reject, key_of, refuse_size, word_of
from envs.actions import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    RightClick,
    Scroll,
    Type,
    Wait,
)

_DIRECTIONS = ("up", "down", "left", "right")
_ESCAPES = {"n": "\n", "t": "\t", "'": "'", '"': '"', "\\": "\\"}
_START = ("start_box", "point", "start_point")
_END = ("end_box", "end_point")


class _Scanner:
    """A cursor over the reply; every method moves forward only."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def spaces(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def name(self) -> str:
        start = self.at
        while self.peek() == "_" or (self.peek().isalnum() and self.peek().isascii()):
            self.at += 1
        return self.text[start : self.at]

    def expect(self, char: str) -> None:
        self.spaces()
        if self.peek() != char:
            found = repr(self.peek()) if self.peek() else "the end of the reply"
            raise Reject(f"expected {char!r}, found {found}", self.at)
        self.at += 1

    def string(self) -> tuple[str, int]:
        """A quoted string and where it starts. A quote inside that does not close the call is taken as text."""
        self.spaces()
        quote, start = self.peek(), self.at
        if quote not in ("'", '"') or not quote:
            raise Reject("expected a quoted value", start)
        self.at += 1
        parts: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in _ESCAPES and self.at + 1 < len(self.text):
                parts.append(_ESCAPES[self.text[self.at + 1]])
                self.at += 2
            elif char == quote and self._closes():
                self.at += 1
                return "".join(parts), start
            else:
                parts.append(char)
                self.at += 1
        raise Reject("the quoted value does not end", start)

    def _closes(self) -> bool:
        """Does the quote at the cursor end its string: is it followed by `)` and the end of the line, or by `,
        key=`?
        """
        rest = _Scanner(self.text, self.at + 1)
        rest.spaces()
        if rest.peek() == ")":
            return _LINE_ENDS.match(self.text, rest.at + 1) is not None
        if rest.peek() != ",":
            return False
        rest.at += 1
        rest.spaces()
        named = rest.name() != ""
        rest.spaces()
        return named and rest.peek() == "="


# what may follow a call on its line: blanks, or the next token of a chat template
_LINE_ENDS = re.compile(r"[ \t]{0,64}(?:$|[\r\n<;])")
_MARK = re.compile(r"^[ \t]{0,64}Action:", re.MULTILINE)
_THINK_END = "</think>"


def parse(text: str, frame: Frame) -> Action | ParseError:
    """The first action of a reply, in CSS pixels of `frame`, or why there is none. Never raises, never executes
    anything.
    """
    refused = refuse_size(text)
    if refused:
        return refused
    try:
        scanner = _Scanner(text, _start(text))
        scanner.spaces()
        begin, name = scanner.at, scanner.name()
        if name not in _BUILDERS:
            known = ", ".join(_BUILDERS)
            raise Reject(f"{name[:40]!r} is not an action; known are {known}" if name else "no action found", begin)
        return _BUILDERS[name](_Call(name, begin, _arguments(scanner), frame))
    except Reject as reject:
        return reject.error


def _start(text: str) -> int:
    """Where the call begins: after the first line-opening `Action:` behind any <think> block, else where the reply
    begins.
    """
    thought = text.find(_THINK_END)
    begin = 0 if thought < 0 else thought + len(_THINK_END)
    mark = _MARK.search(text, begin)
    return mark.end() if mark else begin


def _arguments(scanner: _Scanner) -> dict[str, tuple[str, int]]:
    scanner.expect("(")
    found: dict[str, tuple[str, int]] = {}
    scanner.spaces()
    while scanner.peek() != ")":
        if found:
            scanner.expect(",")
            scanner.spaces()
        begin, key = scanner.at, scanner.name()
        if not key or key in found:
            raise Reject(f"argument {key!r} is given twice" if key else "expected an argument `key='value'`", begin)
        scanner.expect("=")
        found[key] = scanner.string()
        scanner.spaces()
    scanner.at += 1
    return found


@dataclass(frozen=True)
class _Call:
    """A scanned call: its name, where it is, its arguments as (text, position)."""

    name: str
    at: int
    arguments: dict[str, tuple[str, int]]
    frame: Frame

    def only(self, *keys: str) -> None:
        for key, (_, position) in self.arguments.items():
            if key not in keys:
                allowed = ", ".join(keys) or "no arguments"
                raise Reject(f"{self.name} has no argument {key[:40]!r}; it takes {allowed}", position)

    def text(self, key: str, default: str | None = None) -> tuple[str, int]:
        if key in self.arguments:
            return self.arguments[key]
        if default is None:
            raise Reject(f"{self.name} needs {key}", self.at)
        return default, self.at

    def point(self, keys: tuple[str, ...]) -> tuple[float, float]:
        given = [key for key in keys if key in self.arguments]
        if len(given) != 1:
            raise Reject(f"{self.name} needs {keys[0]}" if not given else f"{self.name} has two points", self.at)
        text, position = self.arguments[given[0]]
        return self.frame.clamped(*_point(text, position), position)


_NUMBER = re.compile(r"[+-]?\d{1,9}(?:\.\d{1,9})?(?![\w.])", re.ASCII)
_WRAPPERS = (("<|box_start|>", "<|box_end|>"), ("<point>", "</point>"), ("<bbox>", "</bbox>"), ("(", ")"), ("[", "]"))


def _point(text: str, position: int) -> tuple[float, float]:
    """`(x,y)` and its other spellings -> (x, y); four numbers are a box and give its centre."""
    inner = text.strip()
    for opening, closing in _WRAPPERS:
        if inner.startswith(opening) and inner.endswith(closing) and len(inner) >= len(opening) + len(closing):
            inner = inner[len(opening) : len(inner) - len(closing)].strip()
    pieces = inner.replace(",", " ").split() if len(inner) <= 80 else []
    if len(pieces) not in (2, 4) or not all(_NUMBER.fullmatch(piece) for piece in pieces):
        raise Reject(f"{text[:40]!r} is not a point; write (x,y)", position)
    numbers = [float(piece) for piece in pieces]
    if len(numbers) == 4:
        return (numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2
    return numbers[0], numbers[1]


def _pointed(kind: type[Click] | type[DoubleClick] | type[RightClick]) -> Callable[[_Call], Action]:
    def build(call: _Call) -> Action:
        call.only(*_START)
        return kind(*call.point(_START))

    return build


def _drag(call: _Call) -> Action:
    call.only(*_START, *_END)
    return Drag(*call.point(_START), *call.point(_END))


def _scroll(call: _Call) -> Action:
    call.only(*_START, "direction")
    x, y = call.point(_START)
    direction, position = call.text("direction")
    if direction.lower() not in _DIRECTIONS:
        raise Reject(f"direction {direction[:40]!r} is not one of {', '.join(_DIRECTIONS)}", position)
    return Scroll(x, y, cast(Literal["up", "down", "left", "right"], direction.lower()))


def _hotkey(call: _Call) -> Action:
    call.only("key")
    text, position = call.text("key")
    words = text.split() if len(text) <= 100 else []
    if len(words) == 1 and len(words[0]) > 1:
        words = [word for word in words[0].split("+") if word]
    if not 1 <= len(words) <= MAX_KEYS:
        raise Reject(f"{text[:40]!r} does not name 1 to {MAX_KEYS} keys", position)
    return Hotkey(tuple(key_of(word, position) for word in words))


def _type(call: _Call) -> Action:
    call.only("content")
    return Type(call.text("content")[0])


def _finished(call: _Call) -> Action:
    call.only("content")
    return Finished(call.text("content", "")[0])


def _bare(kind: type[Wait] | type[CallUser]) -> Callable[[_Call], Action]:
    def build(call: _Call) -> Action:
        call.only()
        return kind()

    return build


_BUILDERS: dict[str, Callable[[_Call], Action]] = {
    "click": _pointed(Click),
    "left_single": _pointed(Click),
    "left_double": _pointed(DoubleClick),
    "right_single": _pointed(RightClick),
    "drag": _drag,
    "select": _drag,
    "hotkey": _hotkey,
    "press": _hotkey,
    "type": _type,
    "scroll": _scroll,
    "wait": _bare(Wait),
    "finished": _finished,
    "call_user": _bare(CallUser),
}


def render(action: Action, frame: Frame) -> str:
    """`Action: ...` for `action`; points are rounded to whole pixels of the resized image.

    The grammar has no words for the length of a wait or of a scroll: parsing gives the defaults of `envs.actions` back.
    Raises ValueError for a key that the grammar does not know and for a point that is not finite.
    """
    match action:
        case Click(x, y):
            return f"Action: click(start_box='{_spell(x, y, frame)}')"
        case DoubleClick(x, y):
            return f"Action: left_double(start_box='{_spell(x, y, frame)}')"
        case RightClick(x, y):
            return f"Action: right_single(start_box='{_spell(x, y, frame)}')"
        case Drag(x, y, to_x, to_y):
            return f"Action: drag(start_box='{_spell(x, y, frame)}', end_box='{_spell(to_x, to_y, frame)}')"
        case Scroll(x, y, direction):
            return f"Action: scroll(start_box='{_spell(x, y, frame)}', direction='{direction}')"
        case Type(text):
            return f"Action: type(content='{_escape(text)}')"
        case Hotkey(keys):
            return f"Action: hotkey(key='{' '.join(word_of(key) for key in keys)}')"
        case Wait():
            return "Action: wait()"
        case Finished(answer):
            return f"Action: finished(content='{_escape(answer)}')"
        case CallUser():
            return "Action: call_user()"
    raise ValueError(f"{action!r} is not an action; use one of envs.actions")


def _spell(x: float, y: float, frame: Frame) -> str:
    column, row = frame.from_css(x, y)
    return f"({column},{row})"


def _escape(text: str) -> str:
    for char, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("'", "\\'")):
        text = text.replace(char, escaped)
    return text
