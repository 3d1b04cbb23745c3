"""VATP: what is looked at counts by how much it then says (arXiv 2406.12335).

A token's part in the output is its attention times its value, so SnapKV's window score is multiplied by the L1 norm
of the token's value. The first tokens draw much attention with values near zero, and a model breaks without them all
the same: they are kept whatever their score, as the authors do (20 of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.eviction import PROTECTED
from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import register
from textkv.methods.snapkv import SnapKV
from textkv.segments.base import Stored


@register("vatp")
@dataclass(frozen=True)
class Vatp(SnapKV):
    """SnapKV's arguments, and:

    Attributes:
        sinks: first tokens that are kept, at most a quarter of what the budget keeps; 20 in the paper.
    """

    sinks: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: give a number of first tokens, 0 for none")

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """SnapKV's score times the L1 norm of the value: fp32 [batch, kv_heads, n]; window and sinks PROTECTED."""
        sinks = min(self.sinks, keep // 4)
        attention = super().score(layer, held, evidence, keep - sinks)  # the window makes room for them
        weighted = attention * held.values.float().abs().sum(-1)
        # The window is protected already: infinity times a value of zero would be NaN.
        return torch.where(attention == PROTECTED, attention, weighted).masked_fill(held.positions < sinks, PROTECTED)
