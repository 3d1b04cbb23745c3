"""Holo1, 1.5 and 2: one JSON object `{"note": ..., "thought": ..., "action": {"action": ..., ...}}` <-> typed actions.

Points are `x` and `y`: pixels of the resized image (1, 1.5) or 0 to 1000 (2). `write_element_abs` clicks, writes and
presses Enter; `scroll` names a direction only and turns the wheel by `SCROLL`, a number of ours; `restart` is refused,
since a running task cannot begin anew. Prose or a fence around the object is passed over; keys that an action does not
have are too. Of several objects the first counts, and the step says so. Numbers may be written as texts. The slips of
`calls` for JSON hold here as well.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, cast

from agentkv.envs.actions import (
    Action,
    Click,
    Finished,
    Goto,
    PressBack,
    Reload,
    Scroll,
    Single,
    Type,
    Wait,
    parts,
)
from agentkv.grammars.base import (
    Frame,
    Grammar,
    Reading,
    Reject,
    address_of,
    number_of,
    shown,
    text_of,
    thought_end,
    unsayable,
)
from agentkv.grammars.calls import object_at

NAME = "Holo"
SCROLL = 500.0
WAIT = 2.0
_START = re.compile(r"\{\s*+[\"'](?:note|thought|action)[\"']")
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,7}(?:\.[0-9]{1,9})?\s*")
_DIRECTIONS = ("down", "up", "left", "right")
_KNOWN = ("click_element", "write_element_abs", "scroll", "go_back", "refresh", "goto", "wait", "answer")


def _read(text: str, frame: Frame) -> Reading:
    start = _START.search(text)
    start = _START.search(text, thought_end(text, start.start() if start else len(text)))
    if start is None:
        raise Reject("no object with note, thought and action found", 0)
    value, end = object_at(text, start.start())
    action = value.get("action") if isinstance(value, dict) else None
    if isinstance(action, str) and action in (*_KNOWN, "restart"):  # the action without its frame
        action = value
    if not isinstance(action, dict):
        raise Reject(f"the action is {shown(action)}, not an object", start.start())
    flags: set[str] = set()
    left = "what follows the first object was left out" if _START.search(text, end) else ""
    return Reading(_actions(action, start.start(), frame, flags), frozenset(flags), left)


def _number(value: object, name: str, at: int) -> float:
    """A number, also one that was written as a text, as the makers' schema takes it."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    return number_of(value, name, at)


def _actions(said: dict[str, Any], at: int, frame: Frame, flags: set[str]) -> tuple[Single, ...]:
    name = said.get("action")

    def point() -> tuple[float, float]:
        x, y = (_number(said.get(axis), f"{name}'s {axis}", at) for axis in "xy")
        return frame.clamped(x, y, at, flags)

    match name:
        case "click_element":
            return (Click(*point()),)
        case "write_element_abs":
            return Click(*point()), Type(text_of(said.get("content"), "content", at) + "\n")
        case "scroll":
            direction = said.get("direction")
            if direction not in _DIRECTIONS:
                raise Reject(f"direction {shown(direction)} is not one of {', '.join(_DIRECTIONS)}", at)
            return (Scroll(None, None, cast(Literal["up", "down", "left", "right"], direction), SCROLL),)
        case "go_back":
            return (PressBack(),)
        case "refresh":
            return (Reload(),)
        case "goto":
            return (Goto(address_of(text_of(said.get("url"), "url", at))),)
        case "wait":
            seconds = _number(said.get("seconds", WAIT), "seconds", at)
            if seconds < 0:
                raise Reject(f"seconds={seconds:g} is not a time to wait", at)
            return (Wait(float(seconds)),)
        case "answer":
            return (Finished(text_of(said.get("content"), "content", at)),)
        case "restart":
            raise Reject("'restart' is known but unsupported: a running task cannot begin anew", at)
    raise Reject(f"{shown(name)} is not an action; known are {', '.join(_KNOWN)}", at)


def _write(action: Action, frame: Frame) -> str:
    """One object; only a click and a line written there go together."""
    return json.dumps(
        {"note": "", "thought": "The next step.", "action": _say(parts(action), frame)}, ensure_ascii=False
    )


def _say(actions: tuple[Single, ...], frame: Frame) -> dict[str, Any]:
    match actions:
        case (Click(x, y), Type(text)) if x is not None and y is not None and text.endswith("\n"):
            place = dict(zip("xy", frame.from_css(x, y), strict=True))
            return {"action": "write_element_abs", "content": text[:-1], "element": "the field", **place}
        case (Click(x, y),) if x is not None and y is not None:
            place = dict(zip("xy", frame.from_css(x, y), strict=True))
            return {"action": "click_element", "element": "the element", **place}
        case (Scroll(None, None, direction),):
            return {"action": "scroll", "direction": direction}
        case (PressBack(),) | (Reload(),):
            return {"action": "go_back" if isinstance(actions[0], PressBack) else "refresh"}
        case (Goto(url),):
            return {"action": "goto", "url": url}
        case (Wait(seconds),) if seconds >= 0:
            return {"action": "wait", "seconds": seconds}
        case (Finished(answer, "success"),):
            return {"action": "answer", "content": answer}
    raise unsayable(NAME, actions[0] if len(actions) == 1 else actions)


GRAMMAR = Grammar(NAME, _read, _write)
