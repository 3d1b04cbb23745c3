"""Qwen3.5 (hybrid: one layer in four has full attention): the `computer_use` tool of Qwen3-VL, called in XML.

Chat, markers, patches and points (0 to 1000) are those of Qwen3-VL; a call is
`<tool_call><function=computer_use><parameter=action>...`. The layers without a KV cache keep their own state, which no
method touches.
"""

from __future__ import annotations

from transformers import Qwen3_5ForConditionalGeneration

from agentkv.grammars import tool_call
from agentkv.models.base import AgentText
from agentkv.models.computer_use import AS_XML, QWEN3, USER, system_text, tool
from agentkv.models.qwen3_vl import Qwen3VLAdapter


class Qwen35Adapter(Qwen3VLAdapter):
    """One Qwen3.5 model as an agent (`agentkv.models.ModelAdapter`)."""

    model_type = "qwen3_5"
    architecture = Qwen3_5ForConditionalGeneration
    words = AgentText(system_text(tool(QWEN3), call=AS_XML), USER)
    grammar = tool_call.XML
