"""EvoCUA (Meituan, Qwen3-VL), points 0 to 999, in its two styles.

S2: a line `Action: ...` and one `computer_use` call; the task stands in the turn of the earliest screenshot that is
shown, behind it; four earlier steps are shown with their answers, older ones as lines. S1: pyautogui code as OpenCUA
writes it; its chat is taken to be OpenCUA's too. Checkpoints do not say which style they speak: S2 is taken, S1 is
chosen by name.
"""

from __future__ import annotations

from agentkv.grammars import CoordinateSpace, evocua
from agentkv.models.base import AgentText
from agentkv.models.chat import Layout
from agentkv.models.computer_use import ACTION_FIRST, BASIC, STEPS, system_text, tool
from agentkv.models.opencua import OPENCUA, step_answer
from agentkv.models.qwen3_vl import Qwen3VLAdapter

_ACTIONS = (*BASIC, "key_down", "key_up", "triple_click")


class EvoCuaAdapter(Qwen3VLAdapter):
    """One EvoCUA model in the S2 style as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("evocua",)
    words = AgentText(
        system_text(tool(_ACTIONS), greeting="", more=ACTION_FIRST).replace("{width}x{height}", "1000x1000"),
        "{image}" + STEPS,
    )
    layout = Layout(words="first", older="lines")
    space = CoordinateSpace.TO_999
    grammar = evocua.S2


class EvoCuaS1Adapter(Qwen3VLAdapter):
    """One EvoCUA model in the S1 style as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("evocuas1",)
    words = OPENCUA
    space = CoordinateSpace.TO_999
    grammar = evocua.S1

    def _answer(self, answer: str, age: int, number: int) -> str | None:
        return step_answer(answer, age, number)
