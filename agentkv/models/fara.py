"""Fara-7B (Microsoft, Qwen2.5-VL): a thought and one `computer_use` call with the verbs of a browser; pixels of the
resized image.

The task stands behind the first screenshot and stays when that is no longer shown; three screenshots are shown, each
later one with its page's address and a sentence behind it. The model was made for a viewport of 1440 x 900.
"""

from __future__ import annotations

from agentkv.grammars import fara
from agentkv.models.base import AgentText
from agentkv.models.chat import Layout
from agentkv.models.computer_use import system_text, tool
from agentkv.models.qwen_vl import QwenVLAdapter

_ACTIONS = ("key", "type", "mouse_move", "left_click", "scroll", "visit_url", "web_search", "history_back", "refresh")
_ACTIONS += ("pause_and_memorize_fact", "wait", "terminate")
_TYPED = ("coordinate", "press_enter", "delete_existing_text")


class FaraAdapter(QwenVLAdapter):
    """One Fara model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("fara7b",)
    words = AgentText(
        system_text(tool(_ACTIONS, _TYPED)),
        "{image}{goal}",
        3,
        later="Current URL: {url}\nThis is the next screenshot. Say what comes next.",
    )
    layout = Layout(words="start")
    grammar = fara.GRAMMAR
