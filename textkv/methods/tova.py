"""TOVA: keep what the newest token looks at (arXiv 2401.06104).

At the end of a prompt and after each decoded token, the tokens of a layer compete by the attention of the last query,
averaged over ALL its heads, so every head keeps the same tokens. Nothing is remembered from step to step. Behind a
wrapper it only scores and does not evict while decoding: see `textkv.decode_eviction`.

The authors' code may drop the newest token itself (`recent=0`); other re-implementations protect it (`recent=1`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.decode_eviction import DecodeEviction, protect
from textkv.evidence import Evidence, Needs
from textkv.kernels import window_mass
from textkv.layer import Layer
from textkv.method import register
from textkv.segments.base import Stored


@register("tova")
@dataclass(frozen=True)
class TOVA(DecodeEviction):
    """Cuts at the end of each prompt block and then drops one token per decoded token.

    Attributes:
        recent: this many newest tokens are always kept; 0 in the paper.
    """

    any_order = True

    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 0:
            raise ValueError(f"recent={self.recent}: may not be negative; 0 protects no token, 1 the newest")

    def needs(self) -> Needs:
        """The last query."""
        return Needs(window=1)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The last query's attention, mean over all heads of the layer, the same for every KV head."""
        # A head that a wrapper gave tokens of its own comes alone, with only its own queries: then these decide.
        row = window_mass(evidence.queries[:, :, -1:], held.keys, **evidence.softmax.options)
        return self._shared(row, held.positions, torch.tensor([keep]))

    def decode_score(self, layer: Layer, row: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """The decoded token's attention, mean over all heads of the layer: fp32 [batch, kv_heads, n]."""
        # The common case: one number for all rows, and nothing has to be asked of the device.
        if isinstance(keep, int):
            shared = row.mean(1, keepdim=True).expand(-1, layer.kv_heads, -1)
            return protect(shared, None, 0, min(keep, self.recent)) if self.recent else shared
        return self._shared(row, layer.held_positions(), keep)

    def _shared(self, row: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """One query's row [batch, heads, n] -> the same scores for every head of `positions` [batch, kv_heads, n]."""
        scores = row.mean(1, keepdim=True).expand(positions.shape)
        return protect(scores, positions, 0, keep.clamp(max=self.recent))
