"""Calls of a tool <-> typed actions in CSS pixels; the `computer_use` tool of Qwen2.5-VL and Qwen3-VL.

A reply is prose and `<tool_call>{"name": "computer_use", "arguments": {"action": ..., ...}}</tool_call>`, perhaps with
more calls after it; all are done in order, as one step: a `mouse_move` and the `left_click` after it are one click,
since the tool's clicks and drags begin where the pointer is. Coordinates count in the frame's numbers. How calls are
found, and which slips are forgiven there, stands in `calls`; what they do in `tools`. A later call that cannot be read
is left out, and the step says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentkv.envs.actions import (
    MAX_KEYS,
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    Single,
    TripleClick,
    Type,
    Wait,
    parts,
)
from agentkv.grammars.base import MAX_ACTIONS, Frame, Grammar, Reading, Reject, thought_end, unsayable
from agentkv.grammars.calls import CLOSE, OPEN, calls
from agentkv.grammars.keys import word_of
from agentkv.grammars.tools import COMPUTER, Table, actions_of

NAME = "computer_use"
Arguments = dict[str, Any]
Say = Callable[[Single, Frame], Arguments]


@dataclass(frozen=True)
class Dialect:
    """How one family calls its tools.

    tools: those that are read, by name; the first is the one that is written. say: the arguments of an action. xml:
    written in the XML form of Qwen3.5. lead: what a reply begins with, before its calls.
    """

    name: str
    tools: dict[str, Table]
    say: Say
    xml: bool = False
    lead: str = ""

    def grammar(self) -> Grammar:
        """The grammar of this dialect."""
        return Grammar(self.name, self.read, self.write)

    def read(self, text: str, frame: Frame) -> Reading:
        """All calls of a reply; raises `Reject` if not even the first can be read."""
        flags: set[str] = set()
        actions: list[Single] = []
        first = text.find(OPEN)
        begin = thought_end(text, first if first >= 0 else len(text))
        left = ""
        try:
            for found in calls(text, begin, flags):
                actions += actions_of(found, self.tools, frame, flags)
                if len(actions) > MAX_ACTIONS:
                    del actions[MAX_ACTIONS:]
                    left = f"what follows the first {MAX_ACTIONS} actions was left out"
                    break
        except Reject as reject:
            if not actions:
                raise
            flags.add("cut short")
            left = f"a later call was left out: {reject.error.reason}"
        return Reading(tuple(actions), frozenset(flags), left)

    def write(self, action: Action, frame: Frame) -> str:
        """A call for each gesture, two for a drag from a point where the tool drags from the pointer."""
        said = [self._call(self.say(part, frame)) for whole in parts(action) for part in _from_pointer(whole, self)]
        return self.lead + "\n".join(said)

    def _call(self, arguments: Arguments) -> str:
        tool = next(iter(self.tools))
        if self.xml:
            words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
            if any("</parameter>" in word for word in words.values()):
                raise ValueError(f"the {self.name} grammar cannot say a text that holds </parameter>")
            inside = "".join(f"<parameter={key}>\n{word}\n</parameter>\n" for key, word in words.items())
            return f"{OPEN}\n<function={tool}>\n{inside}</function>\n{CLOSE}"
        return f"{OPEN}\n{json.dumps({'name': tool, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"


def _from_pointer(action: Single, dialect: Dialect) -> tuple[Single, ...]:
    if isinstance(action, Drag) and action.x is not None and "mouse_move" in next(iter(dialect.tools.values())):
        return Move(action.x, action.y), Drag(None, None, action.to_x, action.to_y)  # type: ignore[arg-type]
    return (action,)


def where(x: float | None, y: float | None, frame: Frame) -> Arguments:
    """The argument for a point, none for where the pointer is."""
    return {} if x is None or y is None else {"coordinate": list(frame.from_css(x, y))}


def say_computer(action: Single, frame: Frame) -> Arguments:
    """The arguments of a `computer_use` call. A task that was finished with an answer is an `answer`, one without a
    `terminate`. Raises ValueError for what the tool has no words for.
    """
    match action:
        case Click() | DoubleClick() | TripleClick() | RightClick() | MiddleClick() | Move():
            return {"action": _WORDS[type(action)], **where(action.x, action.y, frame)}
        case Drag(None, None, x, y):
            return {"action": "left_click_drag", "coordinate": list(frame.from_css(x, y))}
        case Scroll(x, y, direction, pixels) if 0 <= pixels <= 1_000_000:
            name = "scroll" if direction in ("up", "down") else "hscroll"
            return {"action": name, "pixels": pixels if direction in ("up", "right") else -pixels, **where(x, y, frame)}
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


def say_held(action: Single, frame: Frame) -> Arguments:
    """As `say_computer`, with keys that are held, as EvoCUA has them, and questions, as GUI-Owl has them."""
    match action:
        case KeyDown(key) | KeyUp(key):
            return {"action": "key_down" if isinstance(action, KeyDown) else "key_up", "keys": [word_of(key)]}
        case CallUser(question):
            return {"action": "interact", "text": question}
    return say_computer(action, frame)


_WORDS = {Click: "left_click", DoubleClick: "double_click", TripleClick: "triple_click", RightClick: "right_click"}
_WORDS |= {MiddleClick: "middle_click", Move: "mouse_move"}

GRAMMAR = Dialect(NAME, {NAME: COMPUTER}, say_computer).grammar()
XML = Dialect(f"{NAME} (XML)", {NAME: COMPUTER}, say_computer, xml=True).grammar()
read, parse, parse_all, render = GRAMMAR.read, GRAMMAR.parse, GRAMMAR.parse_all, GRAMMAR.render
