"""KIVI: keys as small integers per channel, values per token, the newest tokens exact (arXiv 2402.02750).

Key channels differ in size, tokens within a channel hardly do, so keys share a scale along tokens; values have no such
channels and share it along channels. Nothing is evicted: `kivi(2)` behind a scorer ("snapkv+kivi(2)") does both.

Ours: values are packed together with their keys, `residual` tokens at a time, where the authors' code lets one value
leave its window at every step; attention reads the codes; constant groups are no NaN; keys are centred first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.kernels.pack import Packed, pack
from textkv.method import register
from textkv.packing import Packer
from textkv.segments.block_pool import blocks_of


@register("kivi")
@dataclass(frozen=True)
class Kivi(Packer):
    """bits + 32 / 64 bits per element at head_dim 128: 4.5 for `kivi(4)`, 2.5 for `kivi(2)`, 8.5 for `kivi(8)` and for
    `kivi('fp8')`, the same groups in 8-bit floats.

    The authors advise 4 bits for models with grouped query heads, 2 without; their tables use group=32, residual=128.
    """

    heads_apart = True

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, prompt: bool, heads: int = 1
    ) -> tuple[Packed, Packed]:
        """Keys with a scale per channel and block, values with one per token and channel group."""
        # A few key channels are large in every token: a scale along tokens keeps their range to themselves.
        k, v = (blocks_of(x, counts, self.group) for x in (keys, values))
        return pack(k, self.bits, layout="channel"), pack(v, self.bits, layout="token", group=self.channels)
