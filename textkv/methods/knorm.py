"""Knorm: keep the keys with small norms, without looking at attention at all (arXiv 2406.11430).

Keys that many queries look at tend to have small norms in models without key normalisation; where a norm layer makes
all norms alike (Qwen3), this says little. Rotation keeps norms, so stored keys serve.
"""

from dataclasses import dataclass

import torch

from textkv.eviction import PROTECTED, Eviction
from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import register
from textkv.segments.base import Stored


@register("knorm")
@dataclass(frozen=True)
class Knorm(Eviction):
    """Compresses at the end of each prompt block; needs no queries.

    Attributes:
        recent: this many last tokens are always kept; 0 in the paper.
        skip_layers: this many first layers keep everything; 2 in the paper, whose bytes then exceed the budget. 0 is
            ours: a budget is a budget.
    """

    heads_apart = True

    recent: int = 0
    skip_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.recent, self.skip_layers) < 0:
            raise ValueError(f"recent={self.recent}, skip_layers={self.skip_layers}: neither may be negative")

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Minus the L2 norm of each key: fp32 [batch, kv_heads, n]."""
        # Small norm = kept: in the paper's models such keys are what queries look at most.
        scores = -held.keys.float().norm(dim=-1)
        recent = min(self.recent, keep)
        if recent:
            scores[..., -recent:] = PROTECTED
        return scores

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Cut the layer, unless it is one of the first that keep everything."""
        # The paper leaves the first layers whole: norms say little there.
        if layer.index >= self.skip_layers:
            super().on_prefill_end(layer, evidence)
