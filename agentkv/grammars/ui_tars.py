"""The UI-TARS action grammar, desktop and mobile: what a model says <-> typed actions in CSS pixels.

A reply is an optional thought (`<think>` block, `Thought:`, `Reflection:`, `Action_Summary:`) and
`Action: name(key='value', ...)`, perhaps with more calls below it, apart by blank lines. Points are spelled `(x,y)`,
`<|box_start|>(x,y)<|box_end|>`, `<point>x y</point>` or `[x1, y1, x2, y2]` (a box stands for its centre). For an agent
only the first action counts: it may change the page, so what was said to follow it was decided without seeing the
result; `parse` ignores everything after it. Calls are scanned, never executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

from agentkv.envs.actions import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    Move,
    OpenApp,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
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
    key_of,
    thought_end,
    unsayable,
    word_of,
)
from agentkv.grammars.scanner import Call, Scanner, escape, point_of

NAME = "UI-TARS"
MAX_KEYS = 3
_DIRECTIONS = ("up", "down", "left", "right")
_START = ("start_box", "point", "start_point")
_END = ("end_box", "end_point")
# The whole text of `finished` that means "I gave up"; anything longer is an answer, whatever words it contains.
_FAILURES = ("failure", "fail", "failed", "infeasible", "unsuccessful")
_MARK = re.compile(r"^[ \t]{0,64}Action:", re.MULTILINE)


def parse(text: str, frame: Frame) -> Action | ParseError:
    """The first action of a reply, in CSS pixels of `frame`, or why there is none. Never raises, never executes
    anything.
    """
    reading = attempt(partial(_read, limit=1), text, frame)
    return reading if isinstance(reading, ParseError) else reading.actions[0]


def read(text: str, frame: Frame) -> Reading | ParseError:
    """All calls of a reply with flags, or why they cannot be read."""
    return attempt(_read, text, frame)


def parse_all(text: str, frame: Frame) -> list[Action] | ParseError:
    """All actions of a reply in order, for evaluations; an agent takes only the first (`parse`)."""
    reading = read(text, frame)
    return reading if isinstance(reading, ParseError) else list(reading.actions)


def _read(text: str, frame: Frame, limit: int = MAX_ACTIONS) -> Reading:
    scanner = Scanner(text, _start(text))
    flags: set[str] = set()
    actions = [_action(scanner, frame, flags)]
    while len(actions) < limit:
        if "\n" not in scanner.spaces():
            break
        if text.startswith("Action:", scanner.at):
            scanner.at += len("Action:")
            scanner.spaces()
        begin, name = scanner.at, scanner.name()
        if name not in _BUILDERS or scanner.peek() != "(":
            scanner.at = begin
            break
        scanner.at = begin
        actions.append(_action(scanner, frame, flags))
    if limit > 1 and scanner.at < len(text) and scanner.peek() not in "<;":
        flags.add("cut short")
    return Reading(tuple(actions), frozenset(flags))


def _start(text: str) -> int:
    """Where the first call begins: after the first `Action:` that opens a line behind the thought, else after the last
    one inside a line, else where the reply begins.
    """
    mark = _MARK.search(text)
    begin = thought_end(text, mark.start() if mark else len(text))
    mark = _MARK.search(text, begin)
    inline = text.rfind("Action: ", begin)
    return mark.end() if mark else inline + len("Action: ") if inline >= 0 else begin


def _action(scanner: Scanner, frame: Frame, flags: set[str]) -> Action:
    scanner.spaces()
    begin, name = scanner.at, scanner.name()
    if name not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise Reject(f"{name[:40]!r} is not an action; known are {known}" if name else "no action found", begin)
    call = Call(name, begin, scanner.arguments(single=name in ("type", "finished", "open_app")))
    return _BUILDERS[name](call, frame, flags)


def _point(call: Call, keys: tuple[str, ...], frame: Frame, flags: set[str]) -> tuple[float, float]:
    given = [key for key in keys if key in call.arguments]
    if len(given) != 1:
        raise Reject(f"{call.name} needs {keys[0]}" if not given else f"{call.name} has two points", call.at)
    text, position = call.arguments[given[0]]
    return frame.clamped(*point_of(text, position), position, flags)


_Build = Callable[[Call, Frame, set[str]], Action]


def _pointed(kind: type[Click] | type[DoubleClick] | type[RightClick] | type[Move] | type[LongPress]) -> _Build:
    def build(call: Call, frame: Frame, flags: set[str]) -> Action:
        call.only(*_START)
        return kind(*_point(call, _START, frame, flags))

    return build


def _drag(call: Call, frame: Frame, flags: set[str]) -> Action:
    call.only(*_START, *_END)
    return Drag(*_point(call, _START, frame, flags), *_point(call, _END, frame, flags))


def _scroll(call: Call, frame: Frame, flags: set[str]) -> Action:
    call.only(*_START, "direction")
    where = _point(call, _START, frame, flags) if call.arguments.keys() & set(_START) else (None, None)
    direction, position = call.text("direction")
    if direction.lower() not in _DIRECTIONS:
        raise Reject(f"direction {direction[:40]!r} is not one of {', '.join(_DIRECTIONS)}", position)
    return Scroll(*where, cast(Literal["up", "down", "left", "right"], direction.lower()))


def _keys(call: Call, most: int) -> tuple[str, ...]:
    call.only("key")
    text, position = call.text("key")
    words = text.split() if len(text) <= 100 else []
    if len(words) == 1 and len(words[0]) > 1:
        words = [word for word in words[0].split("+") if word]
    if not 1 <= len(words) <= most:
        wanted = "one key" if most == 1 else f"1 to {most} keys"
        raise Reject(f"{text[:40]!r} does not name {wanted}", position)
    return tuple(key_of(word, position) for word in words)


def _hotkey(call: Call, frame: Frame, flags: set[str]) -> Action:
    return Hotkey(_keys(call, MAX_KEYS))


def _held(kind: type[KeyDown] | type[KeyUp]) -> _Build:
    return lambda call, frame, flags: kind(*_keys(call, 1))


def _type(call: Call, frame: Frame, flags: set[str]) -> Action:
    call.only("content")
    return Type(call.text("content")[0])


def _finished(call: Call, frame: Frame, flags: set[str]) -> Action:
    call.only("content")
    content = call.text("content", "")[0]
    return Finished(status="failure") if _means_failure(content) else Finished(content)


def _means_failure(content: str) -> bool:
    return len(content) < 40 and content.strip(" .!\n").lower() in _FAILURES


def _open_app(call: Call, frame: Frame, flags: set[str]) -> Action:
    call.only("app_name")
    return OpenApp(call.text("app_name")[0])


def _bare(kind: type[Wait] | type[CallUser] | type[PressHome] | type[PressBack]) -> _Build:
    def build(call: Call, frame: Frame, flags: set[str]) -> Action:
        call.only()
        return kind()

    return build


# `press` holds a key until `release`, as in the authors' client; a short press is a `hotkey` of one key
_BUILDERS: dict[str, _Build] = {
    "click": _pointed(Click),
    "left_single": _pointed(Click),
    "left_double": _pointed(DoubleClick),
    "right_single": _pointed(RightClick),
    "hover": _pointed(Move),
    "long_press": _pointed(LongPress),
    "drag": _drag,
    "select": _drag,
    "hotkey": _hotkey,
    "press": _held(KeyDown),
    "keydown": _held(KeyDown),
    "release": _held(KeyUp),
    "keyup": _held(KeyUp),
    "type": _type,
    "scroll": _scroll,
    "wait": _bare(Wait),
    "finished": _finished,
    "call_user": _bare(CallUser),
    "open_app": _open_app,
    "press_home": _bare(PressHome),
    "press_back": _bare(PressBack),
}


def render(action: Action, frame: Frame) -> str:
    """`Action: ...` for `action`; points are rounded to the numbers of the frame.

    The grammar has no words for the length of a wait or of a scroll: parsing gives the defaults of `envs.actions` back.
    Raises ValueError for an action or a key that the grammar does not know, for a point that is not finite, and for an
    answer that it would read as giving up.
    """
    return f"Action: {_call(action, frame)}"


def _call(action: Action, frame: Frame) -> str:
    match action:
        case Drag(x, y, to_x, to_y) if x is not None and y is not None:
            return f"drag(start_box='{_spell(x, y, frame)}', end_box='{_spell(to_x, to_y, frame)}')"
        case Scroll(None, None, direction):
            return f"scroll(direction='{direction}')"
        case Scroll(x, y, direction) if x is not None and y is not None:
            return f"scroll(start_box='{_spell(x, y, frame)}', direction='{direction}')"
        case Type(text):
            return f"type(content='{escape(text)}')"
        case Hotkey(keys) if 1 <= len(keys) <= MAX_KEYS:
            return f"hotkey(key='{escape(' '.join(word_of(key) for key in keys))}')"
        case KeyDown(key) | KeyUp(key):
            return f"{'press' if isinstance(action, KeyDown) else 'release'}(key='{escape(word_of(key))}')"
        case OpenApp(name):
            return f"open_app(app_name='{escape(name)}')"
        case Finished(answer, "success") if not _means_failure(answer):
            return f"finished(content='{escape(answer)}')"
        case Finished("", "failure"):
            return "finished(content='failure')"
        case Click() | DoubleClick() | RightClick() | Move() | LongPress():
            return f"{_WORDS[type(action)]}(start_box='{_spell(action.x, action.y, frame)}')"
        case Wait() | CallUser() | PressHome() | PressBack():
            return f"{_WORDS[type(action)]}()"
    raise unsayable(NAME, action)


_WORDS = {Click: "click", DoubleClick: "left_double", RightClick: "right_single", Move: "hover"}
_WORDS |= {LongPress: "long_press", Wait: "wait", CallUser: "call_user"}
_WORDS |= {PressHome: "press_home", PressBack: "press_back"}


def _spell(x: float, y: float, frame: Frame) -> str:
    column, row = frame.from_css(x, y)
    return f"({column},{row})"
