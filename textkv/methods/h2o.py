"""H2O: keep the heavy hitters and the recent tokens (arXiv 2306.14048).

A token's score is all the attention that it ever got: the column sums of the prompt's attention plus every decoded
token's row. Old tokens had more queries to be seen by and are favoured; that is the method. The sums follow their
tokens in `layer.statistics` and go on over later turns. Behind a wrapper ("h2o+adakv") it only scores, by the sums of
the block that ends, and does not evict while decoding: see `textkv.decode_eviction`.

The authors' code needs the n x n matrix of every layer, stores a copy per query head and sums over the batch; we take
column sums without the matrix and choose per KV head (mean over its query heads) and row. `recent=1.0` is a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from textkv.decode_eviction import DecodeEviction, accumulate, holed, part_of, protect
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.scores import group_mean
from textkv.segments.base import Stored

STATISTIC = "h2o"


@register("h2o")
@dataclass(frozen=True)
class H2O(DecodeEviction):
    """Cuts at the end of each prompt block and then drops one token per decoded token; the budget is heavy + recent.

    Attributes:
        recent: share of the budget that is the newest tokens, at least one token; 0.5 in the paper (0.1 + 0.1 of the
            prompt). The rest are the heavy hitters.
    """

    heads_apart = True
    any_order = True

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.recent <= 1:
            raise ValueError(
                f"recent={self.recent}: give a share of the budget in (0, 1], 0.5 as in the paper; with no recent part "
                "a new token always has the least attention so far and would leave at once"
            )

    def needs(self) -> Needs:
        """The block's column sums of attention."""
        return Needs(columns=True)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The block's column sums; the newest `recent` share of `keep` is PROTECTED."""
        return protect(evidence.columns, held.positions, 0, part_of(keep, self.recent))

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Add the block's column sums to those of earlier turns, then cut by the total."""
        if not self.budget.is_full:
            # Also where nothing has to go yet: a later cut judges by all the attention that a token ever got.
            total = accumulate(layer, STATISTIC, evidence.columns)
            super().on_prefill_end(layer, replace(evidence, columns=total))

    def decode_score(self, layer: Layer, row: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """All attention so far, this token's row included: fp32 [batch, kv_heads, n]; the newest tokens PROTECTED."""
        # Mean over the group, as for the prompt's columns: a sum would give decoded rows more weight than prompt rows.
        total = accumulate(layer, STATISTIC, group_mean(row, layer.kv_heads))
        return protect(total, holed(layer, keep), 0, part_of(keep, self.recent))
