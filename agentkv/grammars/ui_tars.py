"""The UI-TARS action grammar, desktop and mobile: what a model says <-> typed actions in CSS pixels.

A reply is an optional thought (`<think>` block, `Thought:`, `Reflection:`, `Action_Summary:`) and
`Action: name(key='value', ...)`, perhaps with more calls below it, apart by line breaks or `;`; all are done in order,
as one step. Points are spelled `(x,y)`, `<|box_start|>(x,y)<|box_end|>`, `<point>x y</point>` or `[x1, y1, x2, y2]` (a
box stands for its centre). Calls are scanned, never executed.

| slip | rule |
|---|---|
| further arguments: `click(start_box=.., force='1')` | an argument that the call does not have is passed over, flag \
"ignored"; `scroll(.., amount=200)` and `wait(time=3)` say how much |
| arguments behind a text: `type(content='x', start_box='..')` | the text ends before `, name=` if no quote stands \
before that, or if calls have an argument of that name |
| quotes inside a text: `type(content='it's')` | a quote is text unless the end of the call's line follows `')` |
| a text over several lines: `'f('a')\\ng('b')')` with bare quotes | refused where it may end on more than one line |
| prose or a call behind a call: `type(content='x') now` | the only `')` of the line ends the text, or the one before \
another call; of several, none is guessed |
| a text that ends in a backslash: `type(content='C:\\')` | the quote before the bracket ends it |
| values without quotes: `amount=200`, `start_box=(1,2)` | numbers, words and points may stand bare |
| `select` with one point | a click on it; a value for it is not typed, the step says so |
| `hotkey=`, `keys=` for `key=`; `ctrl + a` | one argument with three names; keys as in `keys` |
| other words: `left_click`, `double_click`, `right_click`, `middle_click`, `mouse_move`, `left_click_drag`, \
`navigate`, `navigate_back`, in any case | synonyms of the makers' later kit |
| Chinese marks: `Action：`, `click（start_box='(1，2)'）` | as the others; values may stand in curly quotes |
| Markdown around it: `**Action:**`, backticks, a fence behind `Action:` | is passed over |
| no `Action:` at all | the first line that begins with a call, if nothing but calls follows |
| the last bracket is missing | the end of the reply closes a call, unless it ends in a text |
| a later call that cannot be read | those before it are done, the step says what was left out |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, cast

from agentkv.envs.actions import (
    Action,
    CallUser,
    Click,
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
    OpenApp,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
    Several,
    Single,
    Type,
    Wait,
)
from agentkv.grammars.base import (
    MAX_ACTIONS,
    Frame,
    Grammar,
    Reading,
    Reject,
    address_of,
    number_of,
    some,
    text_of,
    thought_end,
    unsayable,
)
from agentkv.grammars.keys import keys_in, word_of
from agentkv.grammars.scanner import BRACKET, Call, Scanner, escape, point_of

NAME = "UI-TARS"
MAX_KEYS = 3
# the makers' own clients turn the wheel that far, in CSS pixels, and wait that long, in seconds
SCROLL = 500.0
WAIT = 5.0
_DIRECTIONS = ("up", "down", "left", "right")
_START = ("start_box", "point", "start_point")
_END = ("end_box", "end_point")
# The whole text of `finished` that means "I gave up"; anything longer is an answer, whatever words it contains.
_FAILURES = ("failure", "fail", "failed", "infeasible", "unsuccessful")
_MARK = re.compile(r"^[ \t*_#>]{0,64}+[Aa]ction[*_]{0,3}+[:：][*_]{0,3}+", re.MULTILINE)
_INLINE = re.compile(r"Action(?:: |：)")
_LATER = re.compile(rf"Action[:：]|{BRACKET}")
_BETWEEN = re.compile(r"[\s;,`]*+")
_AGAIN = re.compile(r"[ \t*_#>]{0,64}+[Aa]ction[*_]{0,3}+[:：][*_]{0,3}+[\s`]*+")
_FENCE = re.compile(r"\s*+`{1,3}(?:(?:python|code|plaintext|text)?[ \t]*\r?\n)?")


def _read(text: str, frame: Frame) -> Reading:
    start, unmarked = _start(text)
    scanner = Scanner(text, start, _BUILDERS)
    flags: set[str] = set()
    left: list[str] = []
    actions = [_action(scanner, frame, flags, left)]
    while len(actions) < MAX_ACTIONS:
        begin = scanner.at = _BETWEEN.match(text, scanner.at).end()  # type: ignore[union-attr]
        again = _AGAIN.match(text, begin)
        scanner.at = again.end() if again else begin
        name = scanner.name()
        if name.lower() not in _BUILDERS or scanner.peek() != "(":
            scanner.at = begin
            break
        scanner.at -= len(name)
        try:
            actions.append(_action(scanner, frame, flags, left))
        except Reject as reject:
            left.append(f"{text[begin : begin + 60]!r} was left out: {reject.error.reason}")
            scanner.at = begin
            break
    if scanner.at < len(text) and scanner.peek() not in "<;":
        if unmarked:  # it may be what the model thought of, and then did not do
            raise Reject("there is no `Action:`, and words stand behind the call", scanner.at)
        flags.add("cut short")
        if not left and _LATER.search(text, scanner.at):
            left.append("a later action of the same answer was left out, since words stand before it")
    return Reading(tuple(actions), frozenset(flags), "; ".join(left))


def _start(text: str) -> tuple[int, bool]:
    """Where the first call begins: after the first `Action:` that opens a line behind the thought, else after the last
    one inside a line, else at the first line that begins with a call, else where the reply begins. And whether it is
    such a line, with words before it.
    """
    mark = _MARK.search(text)
    begin = thought_end(text, mark.start() if mark else len(text))
    mark = _MARK.search(text, begin)
    inline = [found.end() for found in _INLINE.finditer(text, begin)]
    bare = None if mark or inline else _CALL.search(text, begin)
    begin = mark.end() if mark else inline[-1] if inline else bare.start() if bare else begin
    fence = _FENCE.match(text, begin)
    return (fence.end() if fence else begin), bool(bare and text[: bare.start()].strip())


def _action(scanner: Scanner, frame: Frame, flags: set[str], left: list[str]) -> Single:
    scanner.spaces()
    begin, said = scanner.at, scanner.name()
    name = said.lower()
    if name not in _BUILDERS:
        known = some(_BUILDERS)
        raise Reject(f"{said[:40]!r} is not an action; known are {known}" if name else "no action found", begin)
    arguments, build = _BUILDERS[name]
    call = Call(name, begin, scanner.arguments())
    for key, (value, _) in call.arguments.items():
        if key not in arguments:
            flags.add("ignored")
            if (name, key) == ("select", "content"):
                left.append(f"select's content {value[:40]!r} was left out")
    return build(call, frame, flags)


def _point(call: Call, keys: tuple[str, ...], frame: Frame, flags: set[str]) -> tuple[float, float]:
    given = [key for key in keys if key in call.arguments]
    if len(given) != 1:
        raise Reject(f"{call.name} needs {keys[0]}" if not given else f"{call.name} has two points", call.at)
    text, position = call.arguments[given[0]]
    return frame.clamped(*point_of(text, position), position, flags)


_Build = Callable[[Call, Frame, set[str]], Single]


def _pointed(kind: type[Clicking] | type[Move] | type[LongPress]) -> _Build:
    return lambda call, frame, flags: kind(*_point(call, _START, frame, flags))


def _drag(call: Call, frame: Frame, flags: set[str]) -> Single:
    return Drag(*_point(call, _START, frame, flags), *_point(call, _END, frame, flags))


def _select(call: Call, frame: Frame, flags: set[str]) -> Single:
    return _drag(call, frame, flags) if call.first(*_END) else Click(*_point(call, _START, frame, flags))


def _amount(call: Call, names: tuple[str, ...], default: float) -> float:
    name = call.first(*names)
    if name is None:
        return default
    text, position = call.arguments[name]
    if not re.fullmatch(r"-?[0-9]{1,7}(?:\.[0-9]{1,4})?(?: ?px| ?s)?", text.strip()):
        raise Reject(f"{name} {text[:40]!r} is not a number", position)
    return abs(float(number_of(float(text.strip().rstrip("pxs ")), name, position)))


def _scroll(call: Call, frame: Frame, flags: set[str]) -> Single:
    where = _point(call, _START, frame, flags) if call.first(*_START) else (None, None)
    direction, position = call.text("direction")
    if direction.lower() not in _DIRECTIONS:
        raise Reject(f"direction {direction[:40]!r} is not one of {', '.join(_DIRECTIONS)}", position)
    pixels = _amount(call, ("amount",), SCROLL)
    return Scroll(*where, cast(Literal["up", "down", "left", "right"], direction.lower()), pixels)


def _keys(call: Call) -> tuple[str, ...]:
    text, position = call.text(call.first(*_KEYS) or "key")
    return keys_in(text, position)


def _hotkey(call: Call, frame: Frame, flags: set[str]) -> Single:
    return Hotkey(_keys(call))


def _held(kind: type[KeyDown] | type[KeyUp]) -> _Build:
    def build(call: Call, frame: Frame, flags: set[str]) -> Single:
        keys = _keys(call)
        if len(keys) != 1:
            raise Reject(f"{call.name} names {len(keys)} keys, not one", call.at)
        return kind(*keys)

    return build


def _type(call: Call, frame: Frame, flags: set[str]) -> Single:
    return Type(text_of(call.text("content")[0], "content", call.at))


def _finished(call: Call, frame: Frame, flags: set[str]) -> Single:
    content = call.text("content", "")[0]
    return Finished(status="failure") if _means_failure(content) else Finished(content)


def _means_failure(content: str) -> bool:
    return len(content) < 40 and content.strip(" .!\n").lower() in _FAILURES


def _navigate(call: Call, frame: Frame, flags: set[str]) -> Single:
    return Goto(address_of(call.text(call.first("url", "content") or "url")[0]))


def _wait(call: Call, frame: Frame, flags: set[str]) -> Single:
    return Wait(_amount(call, ("time", "seconds"), WAIT))


def _bare(kind: type[PressHome] | type[PressBack]) -> _Build:
    return lambda call, frame, flags: kind()


_KEYS = ("key", "hotkey", "keys")
# Name -> its arguments, what builds it. `press` holds a key until `release`, as in the authors' client; a short press
# is a `hotkey` of one key.
_BUILDERS: dict[str, tuple[tuple[str, ...], _Build]] = {
    "click": (_START, _pointed(Click)),
    "left_single": (_START, _pointed(Click)),
    "left_click": (_START, _pointed(Click)),
    "left_double": (_START, _pointed(DoubleClick)),
    "double_click": (_START, _pointed(DoubleClick)),
    "right_single": (_START, _pointed(RightClick)),
    "right_click": (_START, _pointed(RightClick)),
    "hover": (_START, _pointed(Move)),
    "mouse_move": (_START, _pointed(Move)),
    "middle_click": (_START, _pointed(MiddleClick)),
    "long_press": (_START, _pointed(LongPress)),
    "drag": ((*_START, *_END), _drag),
    "left_click_drag": ((*_START, *_END), _drag),
    "select": ((*_START, *_END), _select),
    "hotkey": (_KEYS, _hotkey),
    "press": (_KEYS, _held(KeyDown)),
    "keydown": (_KEYS, _held(KeyDown)),
    "release": (_KEYS, _held(KeyUp)),
    "keyup": (_KEYS, _held(KeyUp)),
    "type": (("content",), _type),
    "scroll": ((*_START, "direction", "amount"), _scroll),
    "wait": (("time", "seconds"), _wait),
    "finished": (("content",), _finished),
    "call_user": (("content",), lambda call, frame, flags: CallUser(call.text("content", "")[0])),
    "open_app": (("app_name",), lambda call, frame, flags: OpenApp(call.text("app_name")[0])),
    "navigate": (("url", "content"), _navigate),
    "navigate_back": ((), _bare(PressBack)),
    "press_home": ((), _bare(PressHome)),
    "press_back": ((), _bare(PressBack)),
}
_CALL = re.compile(rf"^[ \t`]{{0,64}}+(?:{'|'.join(_BUILDERS)})[(（]", re.MULTILINE)


def _render(action: Action, frame: Frame) -> str:
    """`Action: ...` for `action`, one call a line for several.

    The grammar has no words for the length of a wait or of a scroll: parsing gives `WAIT` and `SCROLL` back. An answer
    that it would read as giving up is refused.
    """
    actions = action.actions if isinstance(action, Several) else (action,)
    return "Action: " + "\n\n".join(_call(part, frame) for part in actions)


def _call(action: Single, frame: Frame) -> str:
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
            words = ["plus" if key == "+" and len(keys) > 1 else word_of(key) for key in keys]  # a + joins others
            return f"hotkey(key='{escape(' '.join(words))}')"
        case KeyDown(key) | KeyUp(key):
            return f"{'press' if isinstance(action, KeyDown) else 'release'}(key='{escape(word_of(key))}')"
        case OpenApp(name):
            return f"open_app(app_name='{escape(name)}')"
        case Finished(answer, "success") if not _means_failure(answer):
            return f"finished(content='{escape(answer)}')"
        case Finished("", "failure"):
            return "finished(content='failure')"
        case Click() | DoubleClick() | RightClick() | Move() | LongPress() if action.x is not None:
            return f"{_WORDS[type(action)]}(start_box='{_spell(action.x, action.y, frame)}')"
        case Goto(url):
            return f"navigate(content='{escape(url)}')"
        case CallUser(question) if question:
            return f"call_user(content='{escape(question)}')"
        case Wait() | CallUser() | PressHome() | PressBack():
            return f"{_WORDS[type(action)]}()"
    raise unsayable(NAME, action)


_WORDS = {Click: "click", DoubleClick: "left_double", RightClick: "right_single", Move: "hover"}
_WORDS |= {LongPress: "long_press", Wait: "wait", CallUser: "call_user"}
_WORDS |= {PressHome: "press_home", PressBack: "press_back"}


def _spell(x: float, y: float, frame: Frame) -> str:
    column, row = frame.from_css(x, y)
    return f"({column},{row})"


GRAMMAR = Grammar(NAME, _read, _render)
read, parse, parse_all, render = GRAMMAR.read, GRAMMAR.parse, GRAMMAR.parse_all, GRAMMAR.render
