"""Qwen3-VL: the chat, the markers and the `computer_use` tool of Qwen2.5-VL with three actions more, but points count
0 to 1000 of each side.

What else differs is in the checkpoint or in transformers' model: patches of 16 pixels (32 to a visual token) and other
pixel limits come with preprocessor_config.json, M-RoPE is interleaved, visual features enter the first text layers a
second time. Time stamps between frames exist for videos only; our screenshots are images.
"""

from __future__ import annotations

from transformers import Qwen3VLForConditionalGeneration

from agentkv.grammars import CoordinateSpace
from agentkv.models.base import AgentText
from agentkv.models.computer_use import QWEN3, USER, system_text, tool
from agentkv.models.qwen_vl import QwenVLAdapter


class Qwen3VLAdapter(QwenVLAdapter):
    """One Qwen3-VL model as an agent (`agentkv.models.ModelAdapter`)."""

    model_type = "qwen3_vl"
    architecture = Qwen3VLForConditionalGeneration
    words = AgentText(system_text(tool(QWEN3)), USER)
    space = CoordinateSpace.PER_MILLE
