"""Typed actions as real input events: the mouse moves and presses, keys go down and up, as if a person did it.

`perform` never raises for a bad action: it returns the text of the error, "" when the action ran. Coordinates are
CSS pixels of the viewport. Nothing here looks at the page.
"""

from __future__ import annotations

import math
import re
import time
from string import ascii_lowercase, digits
from typing import Literal

from playwright.sync_api import Page

from .actions import (
    MAX_KEYS,
    MODIFIER_KEYS,
    NAMED_KEYS,
    Action,
    CallUser,
    Clicking,
    DoubleClick,
    Drag,
    Finished,
    Goto,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MiddleClick,
    Move,
    Note,
    OpenApp,
    Pointing,
    PressBack,
    PressHome,
    Reload,
    RightClick,
    Scroll,
    Several,
    Single,
    TripleClick,
    Type,
    Wait,
)
from .history import travel

MAX_WAIT = 5.0
MAX_TEXT = 5_000
LONG_PRESS = 0.7
MAX_ADDRESS = 2_000
MAX_GESTURES = 50
_DRAG_MOVES = 10
_KEYS = {"\n": "Enter", "\r": "Enter", "\r\n": "Enter", "\t": "Tab"}
# Playwright's names of the keys themselves: only these does a held Shift change
_PLACES = {letter: f"Key{letter.upper()}" for letter in ascii_lowercase} | {digit: f"Digit{digit}" for digit in digits}
_PLACES |= {"-": "Minus", "=": "Equal", "[": "BracketLeft", "]": "BracketRight", "\\": "Backslash", ";": "Semicolon"}
_PLACES |= {"'": "Quote", ",": "Comma", ".": "Period", "/": "Slash", "`": "Backquote"}
_WHEEL = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}


def _bad_point(x: float | None, y: float | None, size: tuple[int, int]) -> str:
    width, height = size
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (x, y))
    if not numbers or not (math.isfinite(x) and math.isfinite(y)):
        return f"({x}, {y}) is not a point; give two finite numbers"
    if not (0 <= x < width and 0 <= y < height):
        return f"({x:g}, {y:g}) is outside the screen of {width} x {height}; nothing was done"
    return ""


def _bad_text(text: str) -> str:
    if not isinstance(text, str):
        return f"text={text!r} is not text"
    if len(text) > MAX_TEXT:
        return f"the text has {len(text)} characters; type at most {MAX_TEXT}"
    # such text cannot be sent to the browser at all
    return "the text holds half a character" if re.search("[\ud800-\udfff]", text) else ""


def _bad_key(key: object) -> str:
    if not isinstance(key, str):
        return f"key={key!r} is not the name of a key"
    if key == "Meta":
        return "'Meta' belongs to the operating system and is not pressed; use Control"
    # what a US keyboard types; Playwright has no key for anything else
    if key in NAMED_KEYS or key in MODIFIER_KEYS or (len(key) == 1 and "!" <= key <= "~"):
        return ""
    return f"{key[:40]!r} is not a key; use names like Enter, Tab, Control, ArrowDown or a"


def _bad_keys(keys: tuple[str, ...]) -> str:
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        return f"keys={keys!r} is not a tuple of key names"
    if not 1 <= len(keys) <= MAX_KEYS:
        return f"{len(keys)} keys were named; press 1 to {MAX_KEYS}"
    return next(filter(None, map(_bad_key, keys)), "")


def _bad_scroll(action: Scroll, size: tuple[int, int]) -> str:
    if action.direction not in _WHEEL:
        return f"direction={action.direction!r} is not one of {', '.join(_WHEEL)}"
    if not (math.isfinite(action.pixels) and 0 <= action.pixels <= 10_000):
        return f"pixels={action.pixels} is not between 0 and 10000"
    return "" if action.x is None and action.y is None else _bad_point(action.x, action.y, size)


def _bad_address(url: str) -> str:
    if (
        not isinstance(url, str)
        or len(url) > MAX_ADDRESS
        or not re.fullmatch(r"https?://[^\s\x00-\x1f]+|file:///[^\s]+", url)
    ):
        return f"{str(url)[:60]!r} is not an address that can be opened; write https://..."
    return ""


def _bad_gestures(actions: tuple[Single, ...]) -> str:
    if not isinstance(actions, tuple) or not 1 <= len(actions) <= MAX_GESTURES:
        return f"an answer has 1 to {MAX_GESTURES} gestures; nothing was done"
    return "" if not any(isinstance(action, Several) for action in actions) else "gestures do not nest"


def check(action: Action, size: tuple[int, int]) -> str:
    """What is wrong with `action` on a viewport of `size` = (width, height) CSS pixels, "" if nothing is."""
    if isinstance(action, Pointing):
        here = isinstance(action, Clicking) and action.x is None and action.y is None
        return "" if here else _bad_point(action.x, action.y, size)
    match action:
        case Drag(None, None, to_x, to_y):
            return _bad_point(to_x, to_y, size)
        case Drag(x, y, to_x, to_y):
            return _bad_point(x, y, size) or _bad_point(to_x, to_y, size)
        case Scroll():
            return _bad_scroll(action, size)
        case Type(text):
            return _bad_text(text)
        case Hotkey(keys):
            return _bad_keys(keys)
        case KeyDown(key) | KeyUp(key):
            return _bad_key(key)
        case Wait(seconds):
            return "" if math.isfinite(seconds) and seconds >= 0 else f"seconds={seconds} is not a time to wait"
        case PressHome():
            return "a web page has no home button; nothing was done"
        case OpenApp(name):
            return f"a web page cannot open apps, {str(name)[:40]!r} neither; nothing was done"
        case Goto(url):
            return _bad_address(url)
        case Several(actions):
            return _bad_gestures(actions)
        case PressBack() | Reload() | Note() | Finished() | CallUser():
            return ""
    return f"{type(action).__name__} is not an action; use one of envs.actions"


def _type(page: Page, text: str) -> None:
    for piece in re.split("(\r\n|[\n\r\t])", text):
        if piece in _KEYS:
            page.keyboard.press(_KEYS[piece])
        elif piece:
            page.keyboard.type(piece)


def _press(page: Page, keys: tuple[str, ...]) -> None:
    """Beside other keys a letter is its key, whatever its case: Control and R is Control and r."""
    held: list[str] = []
    try:
        for key in keys:
            key = _place(key.lower() if len(key) == 1 and len(keys) > 1 else key)
            page.keyboard.down(key)
            held.append(key)
    finally:
        for key in reversed(held):
            page.keyboard.up(key)


def _place(key: str) -> str:
    return _PLACES.get(key, key)


def _click(page: Page, action: Clicking) -> None:
    button: Literal["left", "right", "middle"] = "left"
    if isinstance(action, RightClick | MiddleClick):
        button = "right" if isinstance(action, RightClick) else "middle"
    count = {DoubleClick: 2, TripleClick: 3}.get(type(action), 1)
    if action.x is not None and action.y is not None:
        page.mouse.move(action.x, action.y)
    # a double click is two clicks that count up, as a person's finger makes them
    for click in range(1, count + 1):
        page.mouse.down(button=button, click_count=click)
        page.mouse.up(button=button, click_count=click)


def _long_press(page: Page, action: LongPress) -> None:
    page.mouse.move(action.x, action.y)
    page.mouse.down()
    time.sleep(LONG_PRESS)
    page.mouse.up()


def _drag(page: Page, action: Drag) -> None:
    if action.x is not None and action.y is not None:
        page.mouse.move(action.x, action.y)
    page.mouse.down()
    page.mouse.move(action.to_x, action.to_y, steps=_DRAG_MOVES)
    page.mouse.up()


def _scroll(page: Page, action: Scroll) -> None:
    if action.x is not None and action.y is not None:
        page.mouse.move(action.x, action.y)
    across, down = _WHEEL[action.direction]
    page.mouse.wheel(across * action.pixels, down * action.pixels)


def _goto(page: Page, url: str) -> str:
    session = page.context.new_cdp_session(page)
    try:
        # As a link and not as a typed address, at which going back would end: see `travel`.
        problem = session.send("Page.navigate", {"url": url, "transitionType": "link"}).get("errorText", "")
    finally:
        if not page.is_closed():
            session.detach()
    return f"{url[:100]} was not opened: {problem[:200]}" if problem else ""


def perform(page: Page, action: Action, size: tuple[int, int]) -> str:
    """Do `action` on `page`; returns "" or what was wrong with it. `Finished`, `CallUser` and `Note` do nothing to the
    page.
    """
    problem = check(action, size)
    if problem:
        return problem
    if isinstance(action, Clicking):
        _click(page, action)
    match action:
        case LongPress():
            _long_press(page, action)
        case Move(x, y):
            page.mouse.move(x, y)
        case Drag():
            _drag(page, action)
        case Scroll():
            _scroll(page, action)
        case Type(text):
            _type(page, text)
        case Hotkey(keys):
            _press(page, keys)
        case KeyDown(key):
            page.keyboard.down(_place(key))
        case KeyUp(key):
            page.keyboard.up(_place(key))
        case Wait(seconds):
            time.sleep(min(seconds, MAX_WAIT))
        case PressBack():
            return travel(page, -1)
        case Goto(url):
            return _goto(page, url)
        case Reload():
            page.reload(wait_until="commit")
    return ""
