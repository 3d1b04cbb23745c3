"""StreamingLLM: the first tokens (attention sinks) and a rolling window, in constant memory (arXiv 2309.17453).

Positions are cache slots, not stream indices: the gap between sinks and window is closed. The authors store keys
before the rotary embedding and rotate all of them at every step; we turn the query instead (`segments.ring`), which
gives the same scores. Published "StreamingLLM" baselines often keep original positions: `positions="original"`.

It does not lengthen what a model can use: what left the window is gone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from textkv.collector import rope_of
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.segments.ring import RingSegment


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Sinks plus window; the budget is sinks + recent tokens.

    A budget in tokens holds for the whole stream. A share is taken of the first prompt and then stays that number.

    Attributes:
        sinks: first tokens of each row that stay for ever. The paper finds 4 enough.
        positions: "cache" closes the gap (the paper); "original" leaves every key where it was.
        prefill: "full_then_trim" reads the first prompt with full attention and then drops; "exact_stream" gives each
            prompt token only what a token-by-token stream would have seen (budget in tokens only).
    """

    heads_apart = True

    sinks: int = 4
    positions: Literal["cache", "original"] = "cache"
    prefill: Literal["full_then_trim", "exact_stream"] = "full_then_trim"

    capabilities: ClassVar[Capabilities] = Capabilities(decode_eviction=True, original_positions=False, crop=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: cannot be negative; 0 is a plain window")
        if self.positions not in ("cache", "original"):
            raise ValueError(f"positions={self.positions!r}: use 'cache' or 'original'")
        if self.prefill not in ("full_then_trim", "exact_stream"):
            raise ValueError(f"prefill={self.prefill!r}: use 'full_then_trim' or 'exact_stream'")
        if self.budget.tokens is not None and self.budget.tokens <= self.sinks:
            raise ValueError(
                f"budget={self.budget}: {self.sinks} sinks leave no recent token; use {self.sinks + 1}t or more"
            )
        if self.prefill == "exact_stream" and self.budget.tokens is None:
            raise ValueError("prefill='exact_stream' needs the budget in tokens, e.g. '1024t'")
        if self.positions == "original":
            object.__setattr__(self, "capabilities", replace(self.capabilities, original_positions=True))

    def needs(self) -> Needs:
        """Rotary positions, where queries turn to cache positions."""
        return Needs(rope=self.positions == "cache")

    def on_start(self, layer: Layer) -> None:
        """Warn of a budget beyond the model's positions; prefill="exact_stream" has its ring from the start."""
        limit = getattr(layer.context.config, "max_position_embeddings", None)
        if self.budget.tokens and limit and self.budget.tokens > limit and layer.index == 0:
            warnings.warn(f"budget={self.budget} is longer than the {limit} positions the model knows", stacklevel=2)
        # Else the prompt is read with full attention, as the authors' long prompts are, and trimmed at its end.
        if self.prefill == "exact_stream":
            layer.segments = [self._ring(layer, torch.full_like(layer.real_seen, self.budget.tokens))]

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Take sinks and window of the first prompt into a ring, which then drops by itself."""
        # A ring drops by itself: in later turns there is nothing to do.
        if self.budget.is_full or isinstance(layer.segments[0], RingSegment):
            return
        held = layer.stored()
        total = torch.tensor([max(self.budget.tokens or self.budget.count(int(n)), 1) for n in evidence.tokens])
        # A row without a token yet has no prompt to take a share of: it gets the most that another one gets.
        total = total.where(evidence.tokens > 0, total.max())
        ring = self._ring(layer, total)
        ring.take(held, evidence.scale, rope_of(held.positions[:, 0], evidence))
        layer.replace([ring])

    def _ring(self, layer: Layer, total: torch.Tensor) -> RingSegment:
        # A share of a short prompt may not even cover the sinks: one recent token is the least that can decode.
        recent = (total - self.sinks).clamp(min=1)
        return RingSegment(self.sinks, recent, layer.rotary)
