"""Holo1, Holo1.5 (H Company, Qwen2.5-VL) and Holo2 (Qwen3-VL): a JSON object with note, thought and action.

A turn is `<task>` and `<observation step=n>` around one screenshot, as in the authors' cookbook. Points are pixels of
the resized image (1, 1.5) or 0 to 1000 (2). How the authors' runtime shows earlier notes to the model is not published:
here earlier answers stay as turns of their own. The tool schema of Holo3 and later is in a closed runtime and is not
guessed; such a checkpoint is refused by name.
"""

from __future__ import annotations

import json

from agentkv.grammars import CoordinateSpace, holo
from agentkv.models.base import AgentText
from agentkv.models.qwen3_vl import Qwen3VLAdapter
from agentkv.models.qwen_vl import QwenVLAdapter

_POINT = {"element": "what the element is", "x": "from the left edge", "y": "from the top edge"}
_ACTIONS = {
    "click_element": _POINT,
    "write_element_abs": {"content": "what to write there before Enter", **_POINT},
    "scroll": {"direction": "down, up, left or right"},
    "go_back": {},
    "refresh": {},
    "goto": {"url": "an address"},
    "wait": {"seconds": "0 to 10"},
    "answer": {"content": "the answer that ends the task"},
}
_SYSTEM = f"""You operate a web browser to carry out a task. Each turn shows a screenshot. Answer with one JSON object:
{{"note": <what of the last screenshot matters, or empty>, "thought": <a few lines>, "action": <one action>}}

An action is an object with its name as "action" and these keys:
{chr(10).join(f"- {name}: {json.dumps(keys)}" for name, keys in _ACTIONS.items())}

When the task is done, answer it; the answer holds all that was asked for."""
_PROMPT = "<task>\n{goal}\n</task>\n<observation step={step}>\n<screenshot>\n{image}\n</screenshot>\n\n</observation>\n"
HOLO = AgentText(_SYSTEM, _PROMPT, history_frames=1)


class HoloAdapter(QwenVLAdapter):
    """One Holo1 or Holo1.5 model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("holo1",)
    words = HOLO
    grammar = holo.GRAMMAR


class Holo2Adapter(Qwen3VLAdapter):
    """One Holo2 model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("holo2",)
    words = HOLO
    space = CoordinateSpace.PER_MILLE
    grammar = holo.GRAMMAR
