"""The OpenCUA action grammar: pyautogui calls in a fenced block <-> typed actions in CSS pixels.

A reply is `## Thought:` and `## Action:` prose and `## Code:` with one fenced block, language python or code; the last
block counts. Its statements are read as data (`python_calls`), never executed, and one that is not allowed rejects the
whole reply. All are done in order, as one step.

Numbers are pixels of the resized image. Two decimals of at most 1 are shares of the sides, as the family's models on
Qwen2 write them; a frame in `CoordinateSpace.SHARE` says so outright.

| slip | rule |
|---|---|
| further arguments: `click(1, 2, force=1)`, `_pause=False` | a named argument that the call does not have is passed \
over, flag "ignored"; a click that has a number by another name and no x and y is refused |
| several fenced blocks | the last one counts, as in the client; the step says that another was left out |
| other names: `write(text=..)`, `press(key=..)`, `typewrite`, `tripleClick`, `pyautogui.sleep` | synonyms |
| counted presses: `press('down', presses=3)`, `press(['a', 'b'])` | every press is one |
| keys: `hotkey('ctrl+a')`, `hotkey(keys=[..])`, `hotkey(key1=..)` | as in `keys` |
| a tab or a line break in a text | the key is pressed (`envs.act`) |
| a block without its closing fence, no fence at all | flag "unclosed"; the lines that look like calls |
| a block that is no Python | its leading good lines are done, flag "cut short", the step says what was left out |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from agentkv.envs.actions import (
    MAX_KEYS,
    Action,
    Click,
    Clicking,
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
    Several,
    Single,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import (
    MAX_ACTIONS,
    CoordinateSpace,
    Frame,
    Grammar,
    Reading,
    Reject,
    number_of,
    shown,
    some,
    text_of,
    thought_end,
    unsayable,
)
from agentkv.grammars.keys import keys_of, word_of
from agentkv.grammars.python_calls import Literal, Statement, statements

NAME = "OpenCUA"
# CSS pixels that one click of the wheel stands for, about what desktop browsers scroll
WHEEL_CLICK = 100.0
MAX_WHEEL = 10_000
MAX_PRESSES = 20
_MODULES = ("pyautogui", "computer", "time", "browser", "mobile")
_FENCE = "```"
_LANGUAGE = re.compile(r"[ \t]{0,8}([A-Za-z0-9_+-]{0,20})[ \t]{0,8}(?:\r?\n|\Z)")
_A_CALL = re.compile(r"^[ \t]{0,64}(?:pyautogui|computer)\.", re.MULTILINE)
_PROSE = re.compile(r"^(?![ \t]{0,64}(?:pyautogui|computer)\.).*", re.MULTILINE)


def _read(text: str, frame: Frame) -> Reading:
    flags: set[str] = set()
    code, offset, earlier = _block(text, flags)
    found, rest = statements(code, offset, _MODULES)
    if rest:
        flags.add("cut short")
    reader = _Reader(frame, flags)
    actions = [action for statement in found for action in reader.actions(statement)]
    if not actions:
        raise Reject("the code does nothing", offset)
    if len(actions) > MAX_ACTIONS:
        raise Reject(f"the code has {len(actions)} actions, more than {MAX_ACTIONS}", offset)
    left = "an earlier block of code was left out: the last one counts" if earlier else ""
    return Reading(tuple(actions), frozenset(flags), "; ".join(filter(None, (left, rest))))


def _block(text: str, flags: set[str]) -> tuple[str, int, bool]:
    """The code of the last fenced block, where it begins, and whether an earlier one has calls; without a fence, the
    lines that look like calls.
    """
    begin = thought_end(text, text.find(_FENCE) if _FENCE in text else len(text))
    parts = text[begin:].split(_FENCE)
    blocks = [number for number in range(1, len(parts), 2) if parts[number].strip()]
    if not blocks:
        code = _PROSE.sub(lambda line: " " * len(line[0]), text[begin:])
        if not code.strip():
            raise Reject("no code found; write a fenced block of pyautogui calls", begin)
        return code, begin, False
    last = blocks[-1]
    code, offset = parts[last], begin + sum(map(len, parts[:last])) + last * len(_FENCE)
    if last == len(parts) - 1:
        flags.add("unclosed")
    language = _LANGUAGE.match(code)
    if language and language[1].lower() not in ("", "python", "py", "code"):
        raise Reject(f"the last block is {language[1]!r}, not python or code", offset)
    skip = language.end() if language else 0
    return code[skip:], offset + skip, any(_A_CALL.search(parts[number]) for number in blocks[:-1])


@dataclass
class _Reader:
    """Turns statements into actions; `pointer` is where the reply has brought the pointer so far, in CSS pixels."""

    frame: Frame
    flags: set[str]
    pointer: tuple[float, float] | tuple[None, None] = (None, None)

    def actions(self, statement: Statement) -> list[Single]:
        """The actions of one statement; raises `Reject` if it is none, or one that no browser can do."""
        if statement.name in _UNSUPPORTED or statement.module in ("browser", "mobile"):
            raise Reject(f"{statement.name[:40]!r} is known but unsupported", statement.at)
        if statement.name not in _TABLE:
            raise Reject(f"{statement.name[:40]!r} is not an action; known are {some(_TABLE)}", statement.at)
        parameters, build = _TABLE[statement.name]
        return build(self, statement, _bind(statement, parameters.split(), self.flags))

    def point(self, statement: Statement, values: dict[str, Literal]) -> tuple[float, float] | None:
        """x and y as CSS pixels; None if neither is given."""
        if values.get("x") is None and values.get("y") is None:
            return None
        x, y = (number_of(values.get(name), f"{statement.name}'s {name}", statement.at) for name in ("x", "y"))
        frame = self.frame
        if frame.space is CoordinateSpace.RESIZED and isinstance(x, float) and isinstance(y, float):
            if 0 <= x <= 1 and 0 <= y <= 1:
                self.flags.add("share")
                frame = replace(frame, space=CoordinateSpace.SHARE)
        self.pointer = frame.clamped(x, y, statement.at, self.flags)
        return self.pointer


def _bind(statement: Statement, names: list[str], flags: set[str]) -> dict[str, Literal]:
    """The arguments by name; unknown names are flagged. `*name` takes all positional ones, `name|other` may be called
    either.
    """
    aliases = {alias: name.lstrip("*").split("|")[0] for name in names for alias in name.lstrip("*").split("|")}
    order = list(dict.fromkeys(aliases.values()))
    values: dict[str, Literal] = {}
    positional = statement.positional
    if names and names[0].startswith("*") and positional:
        values[order[0]], positional = _all_text(statement), ()
    if len(positional) > len(order):
        raise Reject(f"{statement.name} takes at most {len(order)} arguments, not {len(positional)}", statement.at)
    values |= dict(zip(order, positional, strict=False))
    for key, value in statement.named.items():
        if key not in aliases:
            flags.add("ignored")
            continue
        if aliases[key] in values:
            raise Reject(f"argument {aliases[key]!r} is given twice", statement.at)
        values[aliases[key]] = value
    return values


def _all_text(statement: Statement) -> tuple[str, ...]:
    first = statement.positional[0]
    keys = first if isinstance(first, tuple) and len(statement.positional) == 1 else statement.positional
    return tuple(_text(key, statement) for key in keys)


def _text(value: Literal, statement: Statement) -> str:
    return text_of(value, f"the text of {statement.name}", statement.at)


def _count(value: Literal, name: str, statement: Statement, least: int, most: int) -> int:
    number = number_of(value, name, statement.at)
    number = int(number) if number == int(number) else number
    if not isinstance(number, int) or not least <= number <= most:
        raise Reject(f"{name}={number} is not a whole number from {least} to {most}", statement.at)
    return number


_Build = Callable[[_Reader, Statement, dict[str, Literal]], list[Single]]
_CLICKS: dict[object, type[Clicking]] = {("left", 1): Click, ("left", 2): DoubleClick, ("left", 3): TripleClick}
_CLICKS |= {("right", 1): RightClick, ("middle", 1): MiddleClick}
_CLICK_WORDS = ("clicks", "interval", "duration")


def _is_number(value: Literal) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _clicked(button: str, clicks: int) -> _Build:
    def build(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
        """The click of one statement; its own words for button and clicks win."""
        times = _count(values.get("clicks", clicks), "clicks", statement, 1, 3)
        which = _text(values.get("button", button), statement).lower()
        if (which, times) not in _CLICKS:
            raise Reject(f"{times} clicks of the button {shown(which)} are not an action", statement.at)
        place = reader.point(statement, values)
        strange = [key for key, value in statement.named.items() if key not in _CLICK_WORDS and _is_number(value)]
        if place is None and strange:
            raise Reject(f"{statement.name} needs x and y, not {strange[0][:40]!r}", statement.at)
        return [_CLICKS[which, times](*(place or reader.pointer))]

    return build


def _moved(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    place = reader.point(statement, values)
    if place is None:
        raise Reject(f"{statement.name} needs x and y", statement.at)
    if statement.function == "moveTo":
        return [Move(*place)]
    if values.get("button", "left") != "left":
        raise Reject(f"{statement.name} with the button {shown(values['button'])} is not an action", statement.at)
    return [Drag(None, None, *place)]


def _written(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    message = values.get("message")
    if isinstance(message, tuple):  # names of keys, one after the other
        return [Hotkey(keys_of(word, statement.at)) for word in message]
    return [Type(_text(message, statement))]


def _pressed(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    presses = _count(values.get("presses", 1), "presses", statement, 1, MAX_PRESSES)
    keys = values.get("keys")
    words = keys if isinstance(keys, tuple) else (keys,)
    if not words:
        raise Reject(f"{statement.name} names no key", statement.at)
    return [Hotkey(keys_of(word, statement.at)) for word in words] * presses


def _held(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    kind = KeyDown if statement.function == "keyDown" else KeyUp
    return [kind(key) for key in keys_of(values.get("key"), statement.at)]


def _together(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    numbered = [values[f"key{n}"] for n in range(1, MAX_KEYS + 1) if f"key{n}" in values]
    if numbered and "keys" in values:
        raise Reject(f"{statement.name} has keys and key1", statement.at)
    return [Hotkey(keys_of(numbered or values.get("keys"), statement.at))]


def _scrolled(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    clicks = _count(values.get("clicks"), "clicks", statement, -MAX_WHEEL, MAX_WHEEL)
    x, y = reader.point(statement, values) or (None, None)
    sideways = statement.function == "hscroll"
    if clicks > 0:
        return [Scroll(x, y, "right" if sideways else "up", clicks * WHEEL_CLICK)]
    return [Scroll(x, y, "left" if sideways else "down", -clicks * WHEEL_CLICK)]


def _waited(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    if statement.module == "computer" and values.get("seconds") is None:
        return [Wait()]
    seconds = number_of(values.get("seconds"), "seconds", statement.at)
    if seconds < 0:
        raise Reject(f"seconds={seconds:g} is not a time to wait", statement.at)
    return [Wait(float(seconds))]


def _terminated(reader: _Reader, statement: Statement, values: dict[str, Literal]) -> list[Single]:
    status = values.get("status")
    word = status.strip().lower() if isinstance(status, str) else ""
    if word == "success":
        return [Finished()]
    if word in ("failure", "fail"):
        return [Finished(status="failure")]
    raise Reject(f"status {shown(status)} is not success or failure", statement.at)


# name -> parameters in the order of their positions, what builds the actions
_TABLE: dict[str, tuple[str, _Build]] = {
    "pyautogui.click": ("x y clicks interval button duration", _clicked("left", 1)),
    "pyautogui.rightClick": ("x y interval duration", _clicked("right", 1)),
    "pyautogui.middleClick": ("x y interval duration", _clicked("middle", 1)),
    "pyautogui.doubleClick": ("x y interval button duration", _clicked("left", 2)),
    "pyautogui.tripleClick": ("x y interval button duration", _clicked("left", 3)),
    "pyautogui.moveTo": ("x y duration", _moved),
    "pyautogui.dragTo": ("x y duration button", _moved),
    "pyautogui.write": ("message|text|content interval", _written),
    "pyautogui.typewrite": ("message|text|content interval", _written),
    "pyautogui.press": ("keys|key|button presses interval", _pressed),
    "pyautogui.keyDown": ("key", _held),
    "pyautogui.keyUp": ("key", _held),
    "pyautogui.hotkey": ("*keys key1 key2 key3 key4 key5 interval", _together),
    "pyautogui.scroll": ("clicks x y", _scrolled),
    "pyautogui.hscroll": ("clicks x y", _scrolled),
    "computer.triple_click": ("x y", _clicked("left", 3)),
    "computer.tripleClick": ("x y", _clicked("left", 3)),
    "computer.wait": ("seconds|time", _waited),
    "computer.terminate": ("status", _terminated),
    "time.sleep": ("seconds|secs", _waited),
    "pyautogui.sleep": ("seconds|secs", _waited),
}
_UNSUPPORTED = ("pyautogui.mouseDown", "pyautogui.mouseUp")


def _render(action: Action, frame: Frame) -> str:
    """`## Code:` with a line for each call (two for a drag from a point).

    A scroll is rounded to clicks of the wheel, at least one.
    """
    actions = action.actions if isinstance(action, Several) else (action,)
    code = "\n".join(_code(part, frame) for part in actions)
    return f"## Code:\n```python\n{code}\n```"


def _code(action: Single, frame: Frame) -> str:
    match action:
        case Click() | DoubleClick() | RightClick() | MiddleClick() | TripleClick() | Move():
            where = "" if action.x is None or action.y is None else _spell(action.x, action.y, frame)
            return f"{_CALLS[type(action)]}({where})"
        case Drag(x, y, to_x, to_y):
            start = f"pyautogui.moveTo({_spell(x, y, frame)})\n" if x is not None and y is not None else ""
            return f"{start}pyautogui.dragTo({_spell(to_x, to_y, frame)})"
        case Scroll(x, y, direction, pixels) if 0 <= pixels <= MAX_WHEEL * WHEEL_CLICK:
            clicks = max(round(pixels / WHEEL_CLICK), 1) * (1 if direction in ("up", "right") else -1)
            name = "scroll" if direction in ("up", "down") else "hscroll"
            where = f", {_spell(x, y, frame)}" if x is not None and y is not None else ""
            return f"pyautogui.{name}({clicks}{where})"
        case Type(text):
            return f"pyautogui.write(message={_quote(text)})"
        case Hotkey((key,)):
            return f"pyautogui.press({_quote(word_of(key))})"
        case Hotkey(keys) if 1 <= len(keys) <= MAX_KEYS:
            return f"pyautogui.hotkey({', '.join(_quote(word_of(key)) for key in keys)})"
        case KeyDown(key) | KeyUp(key):
            return f"pyautogui.{'keyDown' if isinstance(action, KeyDown) else 'keyUp'}({_quote(word_of(key))})"
        case Wait(seconds) if 0 <= seconds <= 1_000_000:
            return "computer.wait()" if action == Wait() else f"time.sleep({seconds!r})"
        case Finished("", status):
            return f"computer.terminate(status={status!r})"
    raise unsayable(NAME, action)


_CALLS = {Click: "pyautogui.click", DoubleClick: "pyautogui.doubleClick", RightClick: "pyautogui.rightClick"}
_CALLS |= {MiddleClick: "pyautogui.middleClick", TripleClick: "computer.triple_click", Move: "pyautogui.moveTo"}


def _spell(x: float, y: float, frame: Frame) -> str:
    column, row = frame.from_css(x, y)
    return f"x={column}, y={row}"


def _quote(text: str) -> str:
    # three backticks would end the block
    return repr(text).replace(_FENCE, "\\x60" * 3)


GRAMMAR = Grammar(NAME, _read, _render)
read, parse, parse_all, render = GRAMMAR.read, GRAMMAR.parse, GRAMMAR.parse_all, GRAMMAR.render
