"""Head scores without training: how far back a head's average query would look among its average keys.

The score of NVIDIA's kvpress, as a stand-in for learned gates: the head's mean query and mean key before the rotary
embedding are repeated over `SPAN` positions and rotated; the last query's attention is cumulated over the positions and
averaged, so attention far back scores near 1 and attention nearby near 0. Scores of query heads are averaged per group.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from textkv.duo.gated import full_attention, gated
from textkv.kinds import describe
from textkv.positions import RotarySpec
from textkv.rotary import proven
from textkv.scores import group_mean

SPAN = 500


class Means:
    """The model as it is; sums up each layer's queries and keys, turned back to position 0."""

    def __init__(self, rotary: dict[int, RotarySpec]) -> None:
        self.rotary = rotary
        self.sums: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, int] = {}
        self.scale = 1.0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        back = -torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
        turned = [self.rotary[layer].turn(x.float(), back).sum((0, 2)) for x in (q, k)]
        known = self.sums.get(layer, [0.0, 0.0])
        self.sums[layer] = [a + b for a, b in zip(known, turned, strict=True)]
        self.tokens[layer] = self.tokens.get(layer, 0) + q.shape[0] * q.shape[2]
        self.scale = scale
        return full_attention(q, k, v, scale)


def far_score(query: torch.Tensor, key: torch.Tensor, rotary: RotarySpec, scale: float) -> torch.Tensor:
    """Scores fp32 [kv_heads] in 0..1 of pre-rotary means `query` [heads, head_dim] and `key` [kv_heads, head_dim]."""
    at = torch.arange(SPAN, device=query.device)[None]
    keys = rotary.turn(key[None, :, None].expand(1, -1, SPAN, -1), at)
    last = rotary.turn(query[None, :, None], at[:, -1:])
    grouped = last.unflatten(1, (key.shape[0], -1)).squeeze(3)
    shares = (grouped @ keys.mT * scale).softmax(-1).flatten(1, 2)
    return group_mean(shares.cumsum(-1).mean(-1, keepdim=True), key.shape[0])[0, :, 0]


@torch.no_grad()
def mean_qk_scores(model: PreTrainedModel, rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Scores fp32 [layers, kv_heads] in 0..1, on the CPU, from `rows` of ids [1, n] of ordinary text.

    Raises:
        ValueError: no rows, or a rotary embedding whose frequencies change with the length.
    """
    rotary = proven(model, [kind.number for kind in describe(model) if kind.governed])
    means = Means(rotary)
    with gated(model) as decoder:
        for ids in rows:
            decoder(ids.to(model.device), use_cache=False, duo=means)
    if not means.sums:
        raise ValueError("mean_qk needs at least one row of text")
    scores = [
        far_score(*(x / means.tokens[layer] for x in means.sums[layer]), rotary[layer], means.scale)
        for layer in sorted(means.sums)
    ]
    # Rounding may carry a cumulated share past 1.
    return torch.stack(scores).clamp(0, 1).cpu()
