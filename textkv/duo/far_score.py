"""How far back a head looks, from its mean query and its mean key alone.

The score of NVIDIA's kvpress, as a stand-in for learned gates: both means, taken before the rotary embedding, are
repeated over `SPAN` positions and rotated; the last query's attention is cumulated over the positions and averaged, so
attention far back scores near 1 and attention nearby near 0. Scores of query heads are averaged per group.
"""

from __future__ import annotations

import torch

from textkv.positions import RotarySpec
from textkv.scores import group_mean

SPAN = 500


def far_score(query: torch.Tensor, key: torch.Tensor, rotary: RotarySpec, scale: float) -> torch.Tensor:
    """Scores fp32 [kv_heads] in 0..1 of pre-rotary means `query` [heads, head_dim] and `key` [kv_heads, head_dim]."""
    at = torch.arange(SPAN, device=query.device)[None]
    keys = rotary.turn(key[None, :, None].expand(1, -1, SPAN, -1), at)
    last = rotary.turn(query[None, :, None], at[:, -1:])
    grouped = last.unflatten(1, (key.shape[0], -1)).squeeze(3)
    shares = (grouped @ keys.mT * scale).softmax(-1).flatten(1, 2)
    # Rounding may carry a cumulated share past 1.
    return group_mean(shares.cumsum(-1).mean(-1, keepdim=True), key.shape[0])[0, :, 0].clamp(0, 1)
