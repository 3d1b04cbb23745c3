"""Sliding window: the last tokens at their original positions. Collapses once the first token leaves, as expected."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from textkv.method import Capabilities, register
from textkv.methods.streaming_llm import StreamingLLM


@register("window")
@dataclass(frozen=True)
class Window(StreamingLLM):
    """StreamingLLM without sinks and without moving positions: the baseline of its paper."""

    sinks: int = 0
    positions: Literal["cache", "original"] = "original"

    capabilities: ClassVar[Capabilities] = Capabilities(decode_eviction=True, crop=False)
