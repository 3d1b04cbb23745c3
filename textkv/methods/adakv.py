"""Ada-KV: heads of a layer share one budget, so heads that look widely keep more (arXiv 2407.11550).

Wraps any scorer ("snapkv+adakv"; alone it wraps snapkv, as in the paper). The layer's past tokens of all heads compete
for the layer's slots; a floor keeps every head alive. Heads then hold different numbers of tokens and the freed bytes
are really freed: storage is ragged, not masked.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from textkv.budgets import round_to_sum
from textkv.eviction import PROTECTED, Eviction
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.methods.snapkv import SnapKV
from textkv.segments.base import Stored


@register("adakv")
@dataclass(frozen=True)
class AdaKV(Eviction):
    """Adaptive budgets per head over another scorer.

    Attributes:
        floor: share of the uniform budget that every head keeps. Published code uses 0.2 and 0.5; 0.2 is ours.
        safeguard: "mix" rounds (1-floor) * competition + floor * uniform (the authors' code); "protect" guards each
            head's own top floor share first and lets the rest compete.
        skip_layers: this many first layers stay uniform.
    """

    floor: float = 0.2
    safeguard: Literal["mix", "protect"] = "mix"
    skip_layers: int = 0

    wraps: ClassVar = "scorer"
    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, per_head=True)

    def __post_init__(self) -> None:
        if self.inner is None:
            object.__setattr__(self, "inner", SnapKV(budget=self.budget))
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: a share of the uniform budget lies in [0, 1]")
        if self.safeguard not in ("mix", "protect"):
            raise ValueError(f"safeguard={self.safeguard!r}: use 'mix' or 'protect'")

    def needs(self) -> Needs:
        """What the scorer needs."""
        return self.inner.needs()

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The scorer's scores, fp32 [batch, kv_heads, n]."""
        return self.inner.score(layer, held, evidence, keep)

    def scores(self, layer: Layer, evidence: Evidence, keep: list[int] | None = None) -> torch.Tensor:
        """The scorer's over the whole layer, which it may look at as one: heads that hold different tokens too."""
        return self.inner.scores(layer, evidence, keep)

    def fits(self, layer: Layer, evidence: Evidence) -> bool:
        """By the scorer's word: the heads only share out what it gives the layer."""
        return self.inner.fits(layer, evidence)

    def counts(self, layer: Layer, scores: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        """Each head's part of the layer's slots, by competition over all heads: int64 [batch, kv_heads]."""
        # The layer's sum is the scorer's own; behind pyramidkv it differs from layer to layer.
        uniform = self.inner.counts(layer, scores, evidence)
        if layer.index < self.skip_layers:
            return uniform
        return torch.stack([self._row(s, int(c.max())) for s, c in zip(scores, uniform, strict=True)])

    def _row(self, scores: torch.Tensor, keep: int) -> torch.Tensor:
        """Counts per head for one row: scores [kv_heads, n], `keep` per head if it were uniform."""
        heads = scores.shape[0]
        # Protected tokens that do not fit are not paid for by other heads: every head then keeps the same.
        protected = min(int((scores == PROTECTED).sum(-1).max()), keep)
        budget = keep - protected
        guard = int(self.floor * budget)
        past = scores.masked_fill(scores == PROTECTED, float("-inf"))
        if self.safeguard == "protect":
            # Infinite scores win whatever the other heads have: the competition then runs for the rest alone.
            best = past.topk(min(guard, past.shape[1]), dim=-1).indices
            past = past.scatter(-1, best, PROTECTED)
        flat = past.flatten()
        # Unscaled: the largest scores of all heads together are what loses the layer the least attention.
        winners = flat.sort(descending=True, stable=True).indices[: heads * budget]
        won = torch.bincount(winners // scores.shape[1], minlength=heads).cpu()
        if self.safeguard == "mix":
            won = round_to_sum((1 - self.floor) * won + self.floor * budget, heads * budget)
        return protected + won
