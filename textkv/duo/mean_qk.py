"""Head scores without training: how far back a head's average query over some text would look among its average keys
(`textkv.duo.far_score`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from textkv.duo.far_score import far_score
from textkv.duo.gated import full_attention, gated
from textkv.kinds import describe
from textkv.positions import RotarySpec
from textkv.rotary import proven


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
    return torch.stack(scores).cpu()
