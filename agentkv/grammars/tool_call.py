"""The `computer_use` tool call of Qwen2.5-VL and Qwen3-VL <-> typed actions in CSS pixels.

A reply is prose and `<tool_call>{"name": "computer_use", "arguments": {"action": ..., ...}}</tool_call>`, strict JSON,
perhaps with more calls after it. For an agent the first call counts; only a `mouse_move` is one with the drag, scroll
or click that continues it, since the tool's drags begin where the pointer is. `parse_all` gives one action a call.
Coordinates count in the frame's numbers: pixels of the resized image (2.5) or 0 to 1000 (3).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from agentkv.envs.actions import (
    MAX_KEYS,
    Action,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import (
    MAX_ACTIONS,
    Frame,
    ParseError,
    Reading,
    Reject,
    attempt,
    first_gesture,
    key_of,
    number_of,
    shown,
    text_of,
    thought_end,
    unsayable,
    word_of,
)

NAME = "computer_use"
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def parse(text: str, frame: Frame) -> Action | ParseError:
    """The first gesture of a reply, in CSS pixels of `frame`, or why there is none. Never raises, never executes
    anything.
    """
    one = attempt(partial(_read, limit=1), text, frame)
    if isinstance(one, ParseError) or not isinstance(one.actions[0], Move):
        return one if isinstance(one, ParseError) else one.actions[0]
    two = attempt(partial(_read, limit=2), text, frame)
    return first_gesture(one.actions if isinstance(two, ParseError) else two.actions)


def parse_all(text: str, frame: Frame) -> list[Action] | ParseError:
    """All actions of a reply in order, one a call, for evaluations."""
    reading = read(text, frame)
    return reading if isinstance(reading, ParseError) else list(reading.actions)


def read(text: str, frame: Frame) -> Reading | ParseError:
    """All actions of a reply with flags, or why they cannot be read."""
    return attempt(_read, text, frame)


def _read(text: str, frame: Frame, limit: int = MAX_ACTIONS) -> Reading:
    flags: set[str] = set()
    actions: list[Action] = []
    opening = text.find(_OPEN)
    opening = text.find(_OPEN, thought_end(text, opening if opening >= 0 else len(text)))
    if opening < 0:
        raise Reject(f"no {_OPEN} found", 0)
    while opening >= 0 and len(actions) < limit:
        value, end = _json(text, opening + len(_OPEN))
        actions.append(_action(value, opening, frame, flags))
        closing = _skip(text, end)
        if text.startswith(_CLOSE, closing):
            closing += len(_CLOSE)
        elif closing == len(text):
            flags.add("unclosed")
        else:
            raise Reject(f"expected {_CLOSE}, found {text[closing : closing + 20]!r}", closing)
        opening = text.find(_OPEN, closing)
    return Reading(tuple(actions), frozenset(flags))


def _skip(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _json(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, _skip(text, at))
    except json.JSONDecodeError as error:
        raise Reject(f"the call is not JSON: {error.msg}", error.pos) from None
    except ValueError as error:  # a hook's, or an integer of thousands of digits
        raise Reject(f"the call is not JSON: {str(error)[:60]}", at) from None
    except RecursionError:
        raise Reject("the call is not JSON: nested too deeply", at) from None


def _action(value: Any, at: int, frame: Frame, flags: set[str]) -> Action:
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        raise Reject("the call is not an object with a name and arguments", at)
    if value["name"] != NAME:
        raise Reject(f"{shown(value['name'])} is not a tool; the only one is {NAME}", at)
    arguments = value["arguments"]
    name = arguments.get("action") if isinstance(arguments, dict) else None
    if not isinstance(name, str) or name not in _TABLE:
        raise Reject(f"{shown(name)} is not an action; known are {', '.join(_TABLE)}", at)
    parameters, build = _TABLE[name]
    for key in arguments:
        if key not in ("action", *parameters):
            raise Reject(f"{name} has no argument {key[:40]!r}; it takes {', '.join(parameters)}", at)
    return build(_Call(name, arguments, at, frame, flags))


class _Call:
    """The arguments of one call, read with a check of their types."""

    def __init__(self, name: str, arguments: dict[str, Any], at: int, frame: Frame, flags: set[str]) -> None:
        self.name, self.arguments, self.at, self.frame, self.flags = name, arguments, at, frame, flags

    def need(self, key: str) -> Any:
        """The argument `key`; raises `Reject` if the call has none."""
        if key not in self.arguments:
            raise Reject(f"{self.name} needs {key}", self.at)
        return self.arguments[key]

    def point(self) -> tuple[float, float]:
        """The argument "coordinate" as a point of the frame; what lies outside is clamped and flagged."""
        value = self.need("coordinate")
        if not isinstance(value, list) or len(value) != 2:
            raise Reject(f"coordinate {shown(value)} is not a point; write [x, y]", self.at)
        x, y = (number_of(number, f"coordinate's {axis}", self.at) for axis, number in zip("xy", value, strict=True))
        return self.frame.clamped(x, y, self.at, self.flags)

    def text(self, key: str) -> str:
        """The argument `key`, which must be a string."""
        return text_of(self.need(key), key, self.at)


def _pointed(
    kind: type[Click] | type[RightClick] | type[MiddleClick] | type[DoubleClick] | type[TripleClick] | type[Move],
) -> Callable[[_Call], Action]:
    return lambda call: kind(*call.point())


def _key(call: _Call) -> Action:
    keys = call.need("keys")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Reject(f"keys {shown(keys)} is not a list of key names", call.at)
    if not 1 <= len(keys) <= MAX_KEYS:
        raise Reject(f"{len(keys)} keys were named, not 1 to {MAX_KEYS}", call.at)
    return Hotkey(tuple(key_of(key, call.at) for key in keys))


def _scroll(call: _Call) -> Action:
    pixels = number_of(call.need("pixels"), "pixels", call.at)
    x, y = call.point() if "coordinate" in call.arguments else (None, None)
    sideways = call.name == "hscroll"
    if pixels > 0:
        return Scroll(x, y, "right" if sideways else "up", pixels)
    return Scroll(x, y, "left" if sideways else "down", -pixels)


def _wait(call: _Call) -> Action:
    seconds = number_of(call.need("time"), "time", call.at)
    if seconds < 0:
        raise Reject(f"time={seconds:g} is not a time to wait", call.at)
    return Wait(float(seconds))


def _terminate(call: _Call) -> Action:
    status = call.text("status")
    if status not in ("success", "failure"):
        raise Reject(f"status {status[:40]!r} is not success or failure", call.at)
    return Finished(status=status)  # type: ignore[arg-type]


_POINT = ("coordinate",)
# action -> its arguments, what builds it; `triple_click`, `hscroll` and `answer` came with Qwen3-VL
_TABLE: dict[str, tuple[tuple[str, ...], Callable[[_Call], Action]]] = {
    "key": (("keys",), _key),
    "type": (("text",), lambda call: Type(call.text("text"))),
    "mouse_move": (_POINT, _pointed(Move)),
    "left_click": (_POINT, _pointed(Click)),
    "left_click_drag": (_POINT, lambda call: Drag(None, None, *call.point())),
    "right_click": (_POINT, _pointed(RightClick)),
    "middle_click": (_POINT, _pointed(MiddleClick)),
    "double_click": (_POINT, _pointed(DoubleClick)),
    "triple_click": (_POINT, _pointed(TripleClick)),
    "scroll": (("pixels", "coordinate"), _scroll),
    "hscroll": (("pixels", "coordinate"), _scroll),
    "wait": (("time",), _wait),
    "terminate": (("status",), _terminate),
    "answer": (("text",), lambda call: Finished(call.text("text"))),
}


def render(action: Action, frame: Frame) -> str:
    """The call for `action`, or the two for a drag from a point; points are rounded to the frame's numbers.

    A task that was finished with an answer is an `answer`, one without a `terminate`. Raises ValueError for an action
    or a key that the grammar does not know and for a point that is not finite.
    """
    if isinstance(action, Drag) and action.x is not None and action.y is not None:
        start = Move(action.x, action.y)
        return f"{render(start, frame)}\n{render(Drag(None, None, action.to_x, action.to_y), frame)}"
    call = json.dumps({"name": NAME, "arguments": _arguments(action, frame)}, ensure_ascii=False)
    return f"{_OPEN}\n{call}\n{_CLOSE}"


def _arguments(action: Action, frame: Frame) -> dict[str, Any]:
    match action:
        case Click() | DoubleClick() | TripleClick() | RightClick() | MiddleClick() | Move():
            return {"action": _WORDS[type(action)], "coordinate": list(frame.from_css(action.x, action.y))}
        case Drag(None, None, x, y):
            return {"action": "left_click_drag", "coordinate": list(frame.from_css(x, y))}
        case Scroll(x, y, direction, pixels) if 0 <= pixels <= 1_000_000:
            name = "scroll" if direction in ("up", "down") else "hscroll"
            where = {"coordinate": list(frame.from_css(x, y))} if x is not None and y is not None else {}
            return {"action": name, "pixels": pixels if direction in ("up", "right") else -pixels, **where}
        case Type(text):
            return {"action": "type", "text": text}
        case Hotkey(keys) if 1 <= len(keys) <= MAX_KEYS:
            return {"action": "key", "keys": [word_of(key) for key in keys]}
        case Wait(seconds) if 0 <= seconds <= 1_000_000:
            return {"action": "wait", "time": seconds}
        case Finished("", status):
            return {"action": "terminate", "status": status}
        case Finished(answer, "success"):
            return {"action": "answer", "text": answer}
    raise unsayable(NAME, action)


_WORDS = {Click: "left_click", DoubleClick: "double_click", TripleClick: "triple_click", RightClick: "right_click"}
_WORDS |= {MiddleClick: "middle_click", Move: "mouse_move"}
