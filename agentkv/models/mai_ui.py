"""MAI-UI (Tongyi, Qwen3-VL): `<thinking>` and one `mobile_use` call, points 0 to 999.

The task is a turn of its own before all screenshots; three screenshots are shown, older answers stay without theirs. It
was made for phones: on a web page a swipe turns the wheel, and the buttons of a phone that a browser lacks say so.
"""

from __future__ import annotations

from agentkv.grammars import CoordinateSpace, mai_ui
from agentkv.models.base import AgentText
from agentkv.models.chat import Layout
from agentkv.models.computer_use import signature, system_text
from agentkv.models.qwen3_vl import Qwen3VLAdapter

_ACTIONS = {
    "click": "tap on `coordinate`",
    "long_press": "hold a finger on `coordinate`",
    "double_click": "tap twice on `coordinate`",
    "type": "type `text` into the field that has the focus",
    "swipe": "swipe towards `direction`, on `coordinate` if it is given",
    "open": "start the app `text`",
    "drag": "drag from `start_coordinate` to `end_coordinate`",
    "system_button": "press `button`",
    "wait": "look again after a moment",
    "terminate": "end the task and say its `status`",
    "answer": "end the task with `text` as its answer",
    "ask_user": "ask the user `text`",
}
_POINT = {"type": "array", "description": "[x, y], 0 to 999 of each side."}
_PROPERTIES = {
    "action": {
        "type": "string",
        "description": "\n".join(f"* `{name}`: {what}." for name, what in _ACTIONS.items()),
        "enum": list(_ACTIONS),
    },
    "coordinate": _POINT,
    "start_coordinate": _POINT,
    "end_coordinate": _POINT,
    "text": {"type": "string"},
    "direction": {"type": "string", "enum": ["up", "down", "left", "right"]},
    "button": {"type": "string", "enum": ["back", "home", "menu", "enter"]},
    "status": {"type": "string", "enum": ["success", "fail"]},
}
_FORM = """

# Response format

<thinking>
What the screen shows and what comes next.
</thinking>
<tool_call>
{"name": "mobile_use", "arguments": <args-json-object>}
</tool_call>"""
_TOOL = signature(
    "mobile_use", "Operates a touch screen; each action brings a new screenshot.", _PROPERTIES, ("action",)
)


class MaiUiAdapter(Qwen3VLAdapter):
    """One MAI-UI model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("maiui",)
    words = AgentText(system_text(_TOOL, more=_FORM), "{goal}", history_frames=3)
    layout = Layout(words="own")
    space = CoordinateSpace.TO_999
    grammar = mai_ui.GRAMMAR
