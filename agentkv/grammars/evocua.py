"""EvoCUA's two grammars <-> typed actions. S2: a line `Action: ...` and one `computer_use` call; S1: pyautogui code, as
OpenCUA writes it (`opencua`). Points count 0 to 999.

Beyond `tool_call`: keys may be held (`key_down`, `key_up`), and the text of `type` is escaped: its `\\n` is a line
break, as the authors' client reads it.
"""

from __future__ import annotations

from dataclasses import replace

from agentkv.envs.actions import Single, Type
from agentkv.grammars import opencua
from agentkv.grammars.base import Frame
from agentkv.grammars.scanner import escape, unescape
from agentkv.grammars.tool_call import Arguments, Dialect, say_held
from agentkv.grammars.tools import COMPUTER, Actions, Call, Table

TOOL: Table = COMPUTER | {"type": (("text",), lambda call: _typed(call))}


def _typed(call: Call) -> Actions:
    return (Type(unescape(call.text("text"))),)


def _say(action: Single, frame: Frame) -> Arguments:
    return say_held(Type(escape(action.text)) if isinstance(action, Type) else action, frame)


S2 = Dialect("EvoCUA S2", {"computer_use": TOOL}, _say, lead="Action: Do the next step.\n").grammar()
S1 = replace(opencua.GRAMMAR, name="EvoCUA S1")
