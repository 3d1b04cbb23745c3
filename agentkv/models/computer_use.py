"""The words around the `computer_use` tool, with which Qwen2.5-VL and Qwen3-VL operate a screen.

Names, arguments and the tags around calls are the interface that these models were trained on; the prose is ours.
`{width}` and `{height}` become the size of the screen in the numbers that the model speaks.
"""

from __future__ import annotations

import json

_ACTIONS = {
    "key": "press the keys of `keys` together, in order, and let go",
    "type": "type `text` at the cursor",
    "mouse_move": "put the pointer on `coordinate`",
    "left_click": "click on `coordinate`",
    "left_click_drag": "drag from where the pointer is to `coordinate`",
    "right_click": "click on `coordinate` with the right button",
    "middle_click": "click on `coordinate` with the middle button",
    "double_click": "click twice on `coordinate`",
    "scroll": "turn the wheel by `pixels`, positive is up",
    "wait": "do nothing for `time` seconds",
    "terminate": "end the task and say its `status`",
    "triple_click": "click three times on `coordinate`",
    "hscroll": "turn the wheel sideways by `pixels`, positive is right",
    "answer": "end the task with `text` as its answer",
}
NEW_IN_QWEN3 = ("triple_click", "hscroll", "answer")
_NEEDS = {
    "keys": ("array", ("key",)),
    "text": ("string", ("type", "answer")),
    "coordinate": (
        "array",
        ("mouse_move", "left_click", "left_click_drag", "right_click", "middle_click", "double_click", "triple_click"),
    ),
    "pixels": ("number", ("scroll", "hscroll")),
    "time": ("number", ("wait",)),
    "status": ("string", ("terminate",)),
}
_TEXTS = {
    "keys": "Names of keys.",
    "text": "What to type.",
    "coordinate": "[x, y]: pixels from the left edge, pixels from the top edge.",
    "pixels": "How far to scroll.",
    "time": "Seconds.",
    "status": "How the task ended.",
}


def _schema(actions: list[str]) -> dict:
    properties: dict[str, dict] = {
        "action": {
            "type": "string",
            "description": "\n".join(f"* `{name}`: {_ACTIONS[name]}." for name in actions),
            "enum": actions,
        }
    }
    for name, (kind, users) in _NEEDS.items():
        needing = ", ".join(user for user in users if user in actions)
        properties[name] = {"type": kind, "description": f"{_TEXTS[name]} Required by {needing}."}
    properties["status"]["enum"] = ["success", "failure"]
    function = {
        "name": "computer_use",
        "description": (
            "Operates a screen with mouse and keyboard; what it shows after each action comes back as a screenshot.\n"
            "* The screen's resolution is {width}x{height}.\n"
            "* Pages may need time: if nothing has changed yet, wait and look again.\n"
            "* Point at the middle of an element, not at its edge."
        ),
        "parameters": {"type": "object", "properties": properties, "required": ["action"]},
    }
    return {"type": "function", "function": function}


def system_text(*, without: tuple[str, ...] = ()) -> str:
    """The system turn that hands the tool to the model, `without` some of its actions."""
    schema = json.dumps(_schema([name for name in _ACTIONS if name not in without]))
    return f"""You are a helpful assistant.

# Tools

You can call a function to act. Its signature stands within <tools></tools> XML tags:
<tools>
{schema}
</tools>

To call it, write a JSON object with its name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


USER = """The screenshot shows the page as it is now. Make the one call that brings the task forward; before a drag or a
scroll, a mouse_move may come first. Terminate when the task is done or cannot be done.

Task: {goal}"""
