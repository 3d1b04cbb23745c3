"""Qwen2.5-VL as it comes from its makers: ChatML, one `computer_use` tool, points in pixels of the resized image.

The chat is ChatML by the tokenizer's own template; a screenshot is a run of `<|image_pad|>` between two vision
markers. What UI-TARS and the embedded mini model do otherwise is in `ui_tars`.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLForConditionalGeneration

from agentkv.grammars import tool_call
from agentkv.models.base import AgentText
from agentkv.models.chat import ChatAdapter
from agentkv.models.computer_use import BASIC, USER, system_text, tool

__all__ = ["AgentText", "QwenVLAdapter"]


class QwenVLAdapter(ChatAdapter):
    """One Qwen2.5-VL model as an agent (`agentkv.models.ModelAdapter`)."""

    model_type = "qwen2_5_vl"
    architecture = Qwen2_5_VLForConditionalGeneration
    words = AgentText(system_text(tool(BASIC)), USER)
    grammar = tool_call.GRAMMAR
    placeholder = "<|image_pad|>"
    markers = (
        placeholder,
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
