"""MAI-UI: `<thinking>...</thinking>` and a `mobile_use` call <-> typed actions; points 0 to 999, a box its centre.

A grounding answer, `<grounding_think>...` and `<answer>{"coordinate": [x, y]}</answer>`, is a click there. Calls of
other tools (MCP) are refused by name.
"""

from __future__ import annotations

import re

from agentkv.envs.actions import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    LongPress,
    OpenApp,
    PressBack,
    PressHome,
    Scroll,
    Single,
    Type,
    Wait,
)
from agentkv.grammars.base import Frame, Grammar, Reading, Reject, unsayable
from agentkv.grammars.calls import OPEN, Found, object_at
from agentkv.grammars.tool_call import Arguments, Dialect, where
from agentkv.grammars.tools import MOBILE, Call

NAME = "MAI-UI"
_ANSWER = re.compile(r"<answer>")
_AGAINST = {"up": "down", "down": "up", "left": "right", "right": "left"}


def _read(text: str, frame: Frame) -> Reading:
    answer = _ANSWER.search(text) if OPEN not in text else None
    if answer is None:
        return _DIALECT.read(text, frame)
    value, _ = object_at(text, answer.end())
    if not isinstance(value, dict):
        raise Reject("the answer is no object with a coordinate", answer.end())
    flags: set[str] = set()
    call = Call(Found("grounding", value, answer.start()), "grounding", frame, flags)
    return Reading((Click(*call.point()),), frozenset(flags))


def _say(action: Single, frame: Frame) -> Arguments:
    """A scroll has no length in this grammar: parsing gives half the viewport back."""
    match action:
        case Click(x, y) | LongPress(x, y) | DoubleClick(x, y) if x is not None:
            return {"action": _WORDS[type(action)], **where(x, y, frame)}
        case Type(text):
            return {"action": "type", "text": text}
        case Scroll(x, y, direction):
            return {"action": "swipe", "direction": _AGAINST[direction], **where(x, y, frame)}
        case Drag(x, y, to_x, to_y) if x is not None and y is not None:
            ends = {"start_coordinate": (x, y), "end_coordinate": (to_x, to_y)}
            return {"action": "drag", **{key: list(frame.from_css(*point)) for key, point in ends.items()}}
        case OpenApp(name):
            return {"action": "open", "text": name}
        case PressBack() | PressHome() | Hotkey(("Enter",)):
            button = {PressBack: "back", PressHome: "home", Hotkey: "enter"}[type(action)]
            return {"action": "system_button", "button": button}
        case Wait(1.0):
            return {"action": "wait"}
        case Finished("", status):
            return {"action": "terminate", "status": "success" if status == "success" else "fail"}
        case Finished(answer, "success"):
            return {"action": "answer", "text": answer}
        case CallUser(question):
            return {"action": "ask_user", "text": question}
    raise unsayable(NAME, action)


_WORDS = {Click: "click", LongPress: "long_press", DoubleClick: "double_click"}
_DIALECT = Dialect(NAME, {"mobile_use": MOBILE}, _say, lead="<thinking>\nThe next step.\n</thinking>\n")
GRAMMAR = Grammar(NAME, _read, _DIALECT.write)
