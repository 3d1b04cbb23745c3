"""What the tools of today's agents do: `computer_use` and `mobile_use` calls -> typed actions in CSS pixels.

A table says for each action of a tool which arguments it has and what builds it. Slips, one rule each:

| slip | rule |
|---|---|
| further arguments | passed over, flag "ignored"; the text of one is never typed |
| names of actions in other words or spelling: `click`, `right click`, `Left_Click`, `done` | case and blanks do not \
count; synonyms stand in the tables |
| a click without a point | happens where the pointer is; one with a point of another name is refused |
| a `direction` beside signed pixels | is refused where it contradicts them |
| points as text, in a box: `"(1, 2)"`, `["1", 2]`, `[1, 2, 3, 4]` | numbers are read from texts; a box is its centre |
| numbers as text: `"-300"`, `"300px"`, `"2s"` | are numbers |
| keys in any form: `"ctrl+c"`, `["keys=['enter']"]`, `key=` for `keys=` | as in `keys` |
| `wait` without a time, `terminate` without a status | the client's default: `Wait()`, success |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from agentkv.envs.actions import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MiddleClick,
    Move,
    OpenApp,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
    Single,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import Frame, Reject, number_of, shown, some, text_of
from agentkv.grammars.calls import Found
from agentkv.grammars.keys import keys_of
from agentkv.grammars.scanner import point_of

_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,7}(?:\.[0-9]{1,9})?)\s*(?:px|s)?\s*")
_PLACE = re.compile(r"coord|point|pos|box|target|start|end|arguments|^[xy]1?$", re.IGNORECASE)
Actions = tuple[Single, ...]


@dataclass(frozen=True)
class Call:
    """One call with its action `name`, read with a check of its arguments; `known` are those that the action has."""

    found: Found
    name: str
    frame: Frame
    flags: set[str]
    known: tuple[str, ...] = ()

    @property
    def at(self) -> int:
        """Where the call stands in the reply."""
        return self.found.at

    def has(self, *keys: str) -> str | None:
        """The first of `keys` that the call has, None if it has none."""
        return next((key for key in keys if self.found.arguments.get(key) is not None), None)

    def need(self, *keys: str) -> Any:
        """The argument under the first of its names; raises `Reject` if the call has none."""
        key = self.has(*keys)
        if key is None:
            raise Reject(f"{self.name} needs {keys[0]}", self.at)
        return self.found.arguments[key]

    def number(self, *keys: str) -> float:
        """A number, also one that was written as a text."""
        value = self.need(*keys)
        if isinstance(value, str) and (written := _NUMBER.fullmatch(value)):
            value = float(written[1])
        return number_of(value, keys[0], self.at)

    def point(self, *keys: str) -> tuple[float, float]:
        """A point of the frame, by default the argument "coordinate"; what lies outside is clamped and flagged."""
        value = self.need(*(keys or ("coordinate",)))
        if isinstance(value, str):
            return self.frame.clamped(*point_of(value, self.at), self.at, self.flags)
        if not isinstance(value, list) or len(value) not in (2, 4):
            raise Reject(f"coordinate {shown(value)} is not a point; write [x, y]", self.at)
        written = [_NUMBER.fullmatch(v) if isinstance(v, str) else None for v in value]
        numbers = [float(found[1]) if found else v for v, found in zip(value, written, strict=True)]
        axes = [number_of(v, f"coordinate's {'xyxy'[i]}", self.at) for i, v in enumerate(numbers)]
        if len(axes) == 4:
            axes = [(axes[0] + axes[2]) / 2, (axes[1] + axes[3]) / 2]
        return self.frame.clamped(axes[0], axes[1], self.at, self.flags)

    def place(self) -> tuple[float, float] | tuple[None, None]:
        """The point of the call, where the pointer is if it has none; raises `Reject` if it has one by another name."""
        if self.has("coordinate"):
            return self.point()
        self.refuse_strays()
        return None, None

    def refuse_strays(self) -> None:
        """A point under a name that the call does not know: to act at the pointer would not be what was meant."""
        for key, value in self.found.arguments.items():
            if key != "action" and key not in self.known and (_PLACE.search(key) or isinstance(value, list | dict)):
                raise Reject(f"{self.name} has no {key[:40]!r}; its point is called coordinate", self.at)

    def text(self, *keys: str) -> str:
        """A text; a whole number counts as its digits."""
        value = self.need(*keys)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
            value = str(value)
        return text_of(value, keys[0], self.at)

    def word(self, key: str, words: dict[str, str], default: str | None = None) -> str:
        """One of `words`, as what it stands for."""
        if default is not None and not self.has(key):
            return default
        value = self.text(key).strip().lower()
        if value not in words:
            raise Reject(f"{key} {value[:40]!r} is not {' or '.join(words)}", self.at)
        return words[value]

    def flag(self, key: str, default: bool) -> bool:
        """True or false, also as a word or as 1 or 0."""
        value = self.found.arguments.get(key)
        if value is None or isinstance(value, bool) or value in (0, 1):
            return default if value is None else bool(value)
        return self.word(key, {"true": "yes", "false": ""}) == "yes"


Build = Callable[[Call], Actions]
Table = dict[str, tuple[tuple[str, ...], Build]]
_STATUS = {"success": "success", "failure": "failure", "fail": "failure", "failed": "failure", "infeasible": "failure"}


def pointed(kind: Callable[[float | None, float | None], Single]) -> Build:
    """A click of some kind, where the pointer is if the call has no point."""
    return lambda call: (kind(*call.place()),)


def aimed(kind: Callable[[float, float], Single]) -> Build:
    """What needs a point."""
    return lambda call: (kind(*call.point()),)


def typed(call: Call) -> Actions:
    """The text as it stands."""
    return (Type(call.text("text")),)


def pressed(call: Call) -> Actions:
    """Keys together."""
    return (Hotkey(keys_of(call.need("keys", "key", "text"), call.at)),)


def _held(kind: type[KeyDown] | type[KeyUp]) -> Build:
    return lambda call: tuple(kind(key) for key in keys_of(call.need("keys", "key"), call.at))


def _dragged(call: Call) -> Actions:
    start = call.has("start_coordinate") or (call.has("coordinate") if call.has(*_TO) else None)
    if not start:
        call.refuse_strays()
    where = call.point(start) if start else (None, None)
    return (Drag(*where, *call.point(*_TO, "coordinate")),)


_TO = ("end_coordinate", "coordinate2")


def turned(call: Call) -> Actions:
    """The wheel by signed pixels: up and right are positive; a direction that says otherwise is an error."""
    pixels = call.number("pixels")
    sideways = call.name == "hscroll"
    direction = ("right" if sideways else "up") if pixels > 0 else "left" if sideways else "down"
    if call.has("direction") and call.need("direction") != direction:
        raise Reject(f"pixels={pixels:g} is {direction}, but the direction is {shown(call.need('direction'))}", call.at)
    return (Scroll(*call.place(), cast(Literal["up", "down", "left", "right"], direction), abs(pixels)),)


def waited(call: Call) -> Actions:
    """Some seconds, one if the call does not say."""
    if not call.has("time", "duration", "seconds"):
        return (Wait(),)
    seconds = call.number("time", "duration", "seconds")
    if seconds < 0:
        raise Reject(f"time={seconds:g} is not a time to wait", call.at)
    return (Wait(float(seconds)),)


def terminated(call: Call) -> Actions:
    """The end, by default a success."""
    return (Finished(status=cast(Literal["success", "failure"], call.word("status", _STATUS, "success"))),)


def answered(call: Call) -> Actions:
    """The end, with an answer."""
    return (Finished(call.text("text")),)


def asked(call: Call) -> Actions:
    """A question to the user."""
    return (CallUser(call.text("text") if call.has("text") else ""),)


def opened(call: Call) -> Actions:
    """An app of a phone."""
    return (OpenApp(call.text("text", "app_name", "app")),)


def swiped(call: Call) -> Actions:
    """A finger's swipe as a turn of the wheel: what is under the finger goes with it, so the page scrolls against it.

    Without a second point the way is half the viewport.
    """
    width, height = call.frame.css
    if call.has(*_TO):
        (x, y), (to_x, to_y) = call.point("coordinate", "start_coordinate"), call.point(*_TO)
        across, down = x - to_x, y - to_y
        if abs(down) >= abs(across):
            return (Scroll(x, y, "down" if down > 0 else "up", abs(down)),)
        return (Scroll(x, y, "right" if across > 0 else "left", abs(across)),)
    against = call.word("direction", {"up": "down", "down": "up", "left": "right", "right": "left"})
    way = (height if against in ("up", "down") else width) / 2
    return (Scroll(*call.place(), cast(Literal["up", "down", "left", "right"], against), way),)


def _button(call: Call) -> Actions:
    button = call.word("button", {name: name for name in ("back", "home", "enter", "menu")})
    if button == "menu":
        raise Reject("a web page has no menu button", call.at)
    known: dict[str, Single] = {"back": PressBack(), "home": PressHome(), "enter": Hotkey(("Enter",))}
    return (known[button],)


_POINT = ("coordinate",)
_KEYS = ("keys", "key", "text")
_TIME = ("time", "duration", "seconds")
COMPUTER: Table = {
    "key": (_KEYS, pressed),
    "key_down": (_KEYS[:2], _held(KeyDown)),
    "key_up": (_KEYS[:2], _held(KeyUp)),
    "type": (("text",), typed),
    "mouse_move": (_POINT, aimed(Move)),
    "left_click": (_POINT, pointed(Click)),
    "left_click_drag": ((*_POINT, "start_coordinate", *_TO), _dragged),
    "right_click": (_POINT, pointed(RightClick)),
    "middle_click": (_POINT, pointed(MiddleClick)),
    "double_click": (_POINT, pointed(DoubleClick)),
    "triple_click": (_POINT, pointed(TripleClick)),
    "scroll": (("pixels", "coordinate"), turned),
    "hscroll": (("pixels", "coordinate"), turned),
    "wait": (_TIME, waited),
    "terminate": (("status",), terminated),
    "answer": (("text",), answered),
    "interact": (("text",), asked),
    "open_app": (("app_name", "text", "app"), opened),
}
_SYNONYMS = {"click": "left_click", "drag": "left_click_drag", "hover": "mouse_move", "move": "mouse_move"}
_SYNONYMS |= {"keypress": "key", "hotkey": "key", "input_text": "type", "sleep": "wait", "call_user": "interact"}
_SYNONYMS |= {"stop": "terminate", "done": "terminate", "finish": "terminate"}
COMPUTER |= {word: COMPUTER[known] for word, known in _SYNONYMS.items()}

MOBILE: Table = {
    "click": (_POINT, aimed(Click)),
    "long_press": ((*_POINT, *_TIME), aimed(LongPress)),
    "double_click": (_POINT, aimed(DoubleClick)),
    "type": (("text",), typed),
    "swipe": ((*_POINT, "start_coordinate", *_TO, "direction"), swiped),
    "drag": ((*_POINT, "start_coordinate", *_TO), _dragged),
    "open": (("text", "app_name", "app"), opened),
    "key": (_KEYS, pressed),
    "system_button": (("button",), _button),
    "wait": (_TIME, waited),
    "terminate": (("status",), terminated),
    "answer": (("text",), answered),
    "ask_user": (("text",), asked),
}
_SYNONYMS = {"tap": "click", "double_tap": "double_click", "input_text": "type", "open_app": "open"}
_SYNONYMS |= {"interact": "ask_user", "call_user": "ask_user", "stop": "terminate", "done": "terminate"}
MOBILE |= {word: MOBILE[known] for word, known in _SYNONYMS.items()}


def actions_of(found: Found, tools: dict[str, Table], frame: Frame, flags: set[str]) -> Actions:
    """What a call does; raises `Reject` for a tool, an action or a value that there is not."""
    if found.tool not in tools:
        only = f"the only one is {next(iter(tools))}" if len(tools) == 1 else f"known are {', '.join(tools)}"
        raise Reject(f"{found.tool[:40]!r} is not a tool; {only}", found.at)
    table, said = tools[found.tool], found.arguments.get("action")
    name = re.sub(r"[\s-]+", "_", said.strip().lower()) if isinstance(said, str) and len(said) < 80 else said
    if not isinstance(name, str) or name not in table:
        raise Reject(f"{shown(said)} is not an action; known are {some(table)}", found.at)
    parameters, build = table[name]
    if any(key not in ("action", *parameters) for key in found.arguments):
        flags.add("ignored")
    return build(Call(found, name, frame, flags, parameters))
