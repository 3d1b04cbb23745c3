"""Typed actions as real input events: the mouse moves and presses, keys go down and up, as if a person did it.

`perform` never raises for a bad action: it returns the text of the error, "" when the action ran. Coordinates are
CSS pixels of the viewport. Nothing here looks at the page.
"""

from __future__ import annotations

import math
import time

from playwright.sync_api import Error, Page

from envs.actions import Action, CallUser, Click, DoubleClick, Drag, Finished, Hotkey, RightClick, Scroll, Type, Wait

MAX_WAIT = 5.0
MAX_TEXT = 5_000
MAX_KEYS = 5
_DRAG_MOVES = 10
_WHEEL = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}


def _bad_point(x: float, y: float, size: tuple[int, int]) -> str:
    width, height = size
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (x, y))
    if not numbers or not (math.isfinite(x) and math.isfinite(y)):
        return f"({x}, {y}) is not a point; give two finite numbers"
    if not (0 <= x < width and 0 <= y < height):
        return f"({x:g}, {y:g}) is outside the screen of {width} x {height}; nothing was done"
    return ""


def check(action: Action, size: tuple[int, int]) -> str:
    """What is wrong with `action` on a viewport of `size` = (width, height) CSS pixels, "" if nothing is."""
    match action:
        case Click(x, y) | DoubleClick(x, y) | RightClick(x, y):
            return _bad_point(x, y, size)
        case Drag(x, y, to_x, to_y):
            return _bad_point(x, y, size) or _bad_point(to_x, to_y, size)
        case Scroll(x, y, direction, pixels):
            if direction not in _WHEEL:
                return f"direction={direction!r} is not one of {', '.join(_WHEEL)}"
            if not (math.isfinite(pixels) and 0 <= pixels <= 10_000):
                return f"pixels={pixels} is not between 0 and 10000"
            return _bad_point(x, y, size)
        case Type(text):
            if not isinstance(text, str):
                return f"text={text!r} is not text"
            return f"the text has {len(text)} characters; type at most {MAX_TEXT}" if len(text) > MAX_TEXT else ""
        case Hotkey(keys):
            if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
                return f"keys={keys!r} is not a tuple of key names"
            return "" if 1 <= len(keys) <= MAX_KEYS else f"{len(keys)} keys were named; press 1 to {MAX_KEYS}"
        case Wait(seconds):
            return "" if math.isfinite(seconds) and seconds >= 0 else f"seconds={seconds} is not a time to wait"
        case Finished() | CallUser():
            return ""
    return f"{type(action).__name__} is not an action; use one of envs.actions"


def _type(page: Page, text: str) -> None:
    for number, line in enumerate(text.split("\n")):
        if number:
            page.keyboard.press("Enter")
        if line:
            page.keyboard.type(line)


def _press(page: Page, keys: tuple[str, ...]) -> str:
    held: list[str] = []
    try:
        for key in keys:
            page.keyboard.down(key)
            held.append(key)
    except Error as error:
        if "Unknown key" not in error.message:
            raise
        return f"{keys[len(held)]!r} is not a key; use names like Enter, Tab, Control, ArrowDown or a"
    finally:
        for key in reversed(held):
            page.keyboard.up(key)
    return ""


def _drag(page: Page, action: Drag) -> None:
    page.mouse.move(action.x, action.y)
    page.mouse.down()
    page.mouse.move(action.to_x, action.to_y, steps=_DRAG_MOVES)
    page.mouse.up()


def perform(page: Page, action: Action, size: tuple[int, int]) -> str:
    """Do `action` on `page`; returns "" or what was wrong with it. `Finished` and `CallUser` do nothing to the page."""
    problem = check(action, size)
    if problem:
        return problem
    match action:
        case Click(x, y):
            page.mouse.click(x, y)
        case DoubleClick(x, y):
            page.mouse.dblclick(x, y)
        case RightClick(x, y):
            page.mouse.click(x, y, button="right")
        case Drag():
            _drag(page, action)
        case Scroll(x, y, direction, pixels):
            page.mouse.move(x, y)
            across, down = _WHEEL[direction]
            page.mouse.wheel(across * pixels, down * pixels)
        case Type(text):
            _type(page, text)
        case Hotkey(keys):
            if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
                return f"keys={keys!r} is not a tuple of key names"
            return _press(page, keys)
        case Wait(seconds):
            time.sleep(min(seconds, MAX_WAIT))
    return ""
