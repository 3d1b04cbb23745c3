"""Fara-7B: a thought and a `computer_use` call with the verbs of a browser <-> typed actions; pixels of the resized
image.

Beyond `tool_call`, as its client acts:

| action | rule |
|---|---|
| `type` with a point | clicks there first; `delete_existing_text` marks all and deletes it; Enter follows unless \
`press_enter` is false |
| `scroll` | one viewport up or down, whatever the number |
| `visit_url` | an address; without http:// https is put before it; with blanks in it, it is a search |
| `web_search` | a search with Bing; the run must allow that address |
| `history_back`, `refresh` | the buttons of the browser |
| `pause_and_memorize_fact` | a note; it stays in the chat |
| `terminate` | the thought before it is the answer |
"""

from __future__ import annotations

from urllib.parse import quote_plus

from agentkv.envs.actions import (
    Action,
    Click,
    Finished,
    Goto,
    Hotkey,
    Move,
    Note,
    PressBack,
    Reload,
    Scroll,
    Single,
    Type,
    Wait,
    parts,
)
from agentkv.grammars.base import Frame, Grammar, address_of, unsayable
from agentkv.grammars.keys import word_of
from agentkv.grammars.tool_call import Arguments, Dialect, where
from agentkv.grammars.tools import COMPUTER, Actions, Call, Table, terminated, turned, waited

NAME = "Fara"
SEARCH = "https://www.bing.com/search?q={}&FORM=QBLH"
WAIT = 3.0
_CLEAR = (Hotkey(("Control", "a")), Hotkey(("Delete",)))


def _typed(call: Call) -> Actions:
    there: Actions = (Click(*call.point()),) if call.has("coordinate") else ()
    end = "\n" if call.flag("press_enter", True) else ""
    clear = _CLEAR if call.flag("delete_existing_text", False) else ()
    return (*there, *clear, Type(call.text("text", "text_value") + end))


def _scrolled(call: Call) -> Actions:
    (turn,) = turned(call)
    assert isinstance(turn, Scroll)
    return (Scroll(turn.x, turn.y, turn.direction, float(call.frame.css[1])),)


def _visited(call: Call) -> Actions:
    url = call.text("url").strip()
    return (Goto(SEARCH.format(quote_plus(url)) if " " in url else address_of(url)),)


def _waited(call: Call) -> Actions:
    return waited(call) if call.has("time", "duration") else (Wait(WAIT),)


def _ended(call: Call) -> Actions:
    (end,) = terminated(call)
    failed = isinstance(end, Finished) and end.status == "failure"
    return (end,) if failed else (Finished(call.found.prose),)


TOOL: Table = COMPUTER | {
    "type": (("text", "text_value", "coordinate", "press_enter", "delete_existing_text"), _typed),
    "scroll": (("pixels", "coordinate"), _scrolled),
    "visit_url": (("url",), _visited),
    "web_search": (("query",), lambda call: (Goto(SEARCH.format(quote_plus(call.text("query")))),)),
    "history_back": ((), lambda call: (PressBack(),)),
    "refresh": ((), lambda call: (Reload(),)),
    "pause_and_memorize_fact": (("fact",), lambda call: (Note(call.text("fact")),)),
    "wait": (("time", "duration"), _waited),
    "terminate": (("status",), _ended),
    "stop": (("status",), _ended),
}
TOOL["input_text"] = TOOL["type"]


def _say(action: Single, frame: Frame) -> Arguments:
    match action:
        case Click(x, y):
            return {"action": "left_click", **where(x, y, frame)}
        case Move(x, y):
            return {"action": "mouse_move", **where(x, y, frame)}
        case Type(text):
            enter = text.endswith("\n")
            return {"action": "type", "text": text.removesuffix("\n"), "press_enter": enter}
        case Hotkey(keys):
            return {"action": "key", "keys": [word_of(key) for key in keys]}
        case Scroll(x, y, "up" | "down" as direction):
            pixels = frame.css[1] if direction == "up" else -frame.css[1]
            return {"action": "scroll", "pixels": pixels, **where(x, y, frame)}
        case Goto(url):
            return {"action": "visit_url", "url": url}
        case Note(fact):
            return {"action": "pause_and_memorize_fact", "fact": fact}
        case PressBack() | Reload():
            return {"action": "history_back" if isinstance(action, PressBack) else "refresh"}
        case Wait(seconds):
            return {"action": "wait", "time": seconds}
        case Finished(_, status):
            return {"action": "terminate", "status": status}
    raise unsayable(NAME, action)


_DIALECT = Dialect(NAME, {"computer_use": TOOL}, _say)


def _write(action: Action, frame: Frame) -> str:
    """A scroll is one viewport; an answer stands before the call that ends the task."""
    answers = [part.answer for part in parts(action) if isinstance(part, Finished)]
    if any("<" in answer or answer != answer.strip() for answer in answers):
        raise ValueError(f"the {NAME} grammar cannot say an answer that begins or ends with blanks or holds a tag")
    return "\n".join([*filter(None, answers), _DIALECT.write(action, frame)])


GRAMMAR = Grammar(NAME, _DIALECT.read, _write)
