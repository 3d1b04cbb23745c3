"""The words around the tools with which today's agents operate a screen: `computer_use`, `mobile_use`.

Names, arguments and the tags around calls are the interface that these models were trained on; the prose is ours.
`{width}` and `{height}` become the size of the screen in the numbers that the model speaks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

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
    "key_down": "press the keys of `keys` and hold them",
    "key_up": "let go of the keys of `keys`",
    "interact": "ask the user `text` when only a person can go on",
    "visit_url": "open the address `url`",
    "web_search": "search the web for `query`",
    "history_back": "go back to the page before",
    "refresh": "load the page again",
    "pause_and_memorize_fact": "write down `fact` for later",
}
BASIC = tuple(list(_ACTIONS)[:11])
NEW_IN_QWEN3 = ("triple_click", "hscroll", "answer")
QWEN3 = (*BASIC, *NEW_IN_QWEN3)
_CLICKS = ("left_click", "right_click", "middle_click", "double_click", "triple_click", "mouse_move", "left_click_drag")
# argument -> JSON type, what it is, the actions that have it
_NEEDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "keys": ("array", "Names of keys.", ("key", "key_down", "key_up")),
    "text": ("string", "What to type.", ("type", "answer", "interact")),
    "press_enter": ("boolean", "Whether Enter follows the text.", ()),
    "delete_existing_text": ("boolean", "Whether what stands in the field goes first.", ()),
    "coordinate": ("array", "[x, y]: pixels from the left edge, pixels from the top edge.", _CLICKS),
    "pixels": ("number", "How far to scroll.", ("scroll", "hscroll")),
    "time": ("number", "Seconds.", ("wait",)),
    "url": ("string", "An address.", ("visit_url",)),
    "query": ("string", "What to search for.", ("web_search",)),
    "fact": ("string", "What to remember.", ("pause_and_memorize_fact",)),
    "status": ("string", "How the task ended.", ("terminate",)),
}
_SCREEN = (
    "Operates a screen with mouse and keyboard; what it shows after each action comes back as a screenshot.\n"
    "* The screen's resolution is {width}x{height}.\n"
    "* Pages may need time: if nothing has changed yet, wait and look again.\n"
    "* Point at the middle of an element, not at its edge."
)


def tool(actions: Sequence[str], typed: Sequence[str] = ()) -> dict:
    """The signature of `computer_use` with some of its actions; `typed`: further arguments of `type`."""
    properties: dict[str, dict] = {
        "action": {
            "type": "string",
            "description": "\n".join(f"* `{name}`: {_ACTIONS[name]}." for name in actions),
            "enum": list(actions),
        }
    }
    for name, (kind, meaning, users) in _NEEDS.items():
        having = [user for user in users if user in actions] + (["type"] if name in typed else [])
        if having:
            properties[name] = {"type": kind, "description": f"{meaning} Required by {', '.join(having)}."}
    properties["status"]["enum"] = ["success", "failure"]
    return signature("computer_use", _SCREEN, properties, ("action",))


def signature(name: str, description: str, properties: Mapping[str, dict], required: Sequence[str]) -> dict:
    """A function in the form that Qwen's chats list them."""
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def system_text(
    function: dict, greeting: str = "You are a helpful assistant.\n\n", call: str = "", more: str = ""
) -> str:
    """The system turn that hands a tool to the model. `call`: how a call is written, by default as JSON; `more`: what
    follows.
    """
    return f"""{greeting}# Tools

You can call a function to act. Its signature stands within <tools></tools> XML tags:
<tools>
{json.dumps(function)}
</tools>

{call or _AS_JSON}{more}"""


_AS_JSON = """To call it, write a JSON object with its name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
AS_XML = """To call it, write its name and arguments in this form, without anything after it:
<tool_call>
<function=function_name>
<parameter=parameter_name>
value
</parameter>
</function>
</tool_call>"""
ACTION_FIRST = """

# Response format

For each step write, in this order:
1) Action: one short sentence that says what to do.
2) One <tool_call>...</tool_call> block with the call.
Write nothing else. End the task with action=terminate."""


USER = """The screenshot shows the page as it is now. Make the one call that brings the task forward; before a drag or a
scroll, a mouse_move may come first. Terminate when the task is done or cannot be done.

Task: {goal}"""

# the lines that GUI-Owl and EvoCUA were trained on, the sentence in front is ours
STEPS = """Say the next move for the screenshot, the instruction and what was done before.

Instruction: {goal}

Previous actions:
{steps}"""
