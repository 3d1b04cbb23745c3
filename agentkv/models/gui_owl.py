"""GUI-Owl-1.5 (mPLUG, Qwen3-VL): a line `Action: ...` and one `computer_use` call, points 0 to 1000.

The task stands in the turn of the earliest screenshot that is shown, in front of it; four earlier steps are shown with
their answers, older ones as the lines `Step i:` of the task's turn, as in the published client (X-PLUG/MobileAgent,
Mobile-Agent-v3.5). Its `browser_use`, which points at labels drawn on the screenshot, is not offered.
"""

from __future__ import annotations

from agentkv.grammars import gui_owl
from agentkv.models.base import AgentText
from agentkv.models.chat import Layout
from agentkv.models.computer_use import ACTION_FIRST, QWEN3, STEPS, system_text, tool
from agentkv.models.qwen3_vl import Qwen3VLAdapter


class GuiOwlAdapter(Qwen3VLAdapter):
    """One GUI-Owl-1.5 model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("guiowl",)
    words = AgentText(system_text(tool((*QWEN3, "interact")), greeting="", more=ACTION_FIRST), STEPS + "{image}")
    layout = Layout(words="first", older="lines")
    grammar = gui_owl.GRAMMAR
