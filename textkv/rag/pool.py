"""What to ask: the words before a trigger that matter most to it (layerwise pooling of arXiv 2504.01281, ATLAS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

BETA = 0.7  # share of attention in the relevance


def layer_weights(layers: int) -> torch.Tensor:
    """psi, fp32 [layers], as printed: it jumps at both thirds, and the last layer weighs 0."""
    third = layers / 3
    weights = []
    for layer in range(1, layers + 1):
        if layer < third:
            weights.append(0.2 * layer / third)
        elif layer < 2 * third:
            weights.append(0.5 * (layer - third) / third)
        else:
            weights.append(0.3 * (layers - layer) / third)
    return torch.tensor(weights)


def pooled(hidden: torch.Tensor) -> torch.Tensor:
    """fp32 [n, dim] of hidden states [layers, n, dim]: layers weigh as softmax(layer / 2)."""
    depth = (torch.arange(1, len(hidden) + 1, dtype=torch.float32) / 2.0).softmax(0)
    return torch.einsum("l,lnd->nd", depth, hidden.float())


def relevant(
    attention: torch.Tensor,
    hidden: torch.Tensor,
    candidates: Sequence[int],
    k: int = 6,
    normalize: Literal["minmax", "none"] = "minmax",
) -> list[int]:
    """The k candidates that matter most to the last token, in the order of the text; all where there are fewer.

    Args:
        attention: of the last token, [layers, heads, n].
        hidden: states of all n tokens, [layers, n, dim].
        candidates: positions before the last token; leave out template, special tokens and stopwords.
        normalize: "minmax" brings attention and likeness to 0..1 each (attention alone falls as 1 / n), "none" is the
            paper's own sum.

    Raises:
        ValueError: k below 1, an unknown normalization, or a candidate that is not before the last token.
    """
    last = attention.shape[-1] - 1
    if k < 1 or normalize not in ("minmax", "none"):
        raise ValueError(f"k={k}, normalize={normalize!r}: use k from 1 on, and minmax or none")
    wrong = [place for place in candidates if not 0 <= place < last]
    if wrong:
        raise ValueError(f"candidate {wrong[0]} is not before the last token, {last}")
    if not candidates:
        return []
    places = torch.tensor(list(candidates))
    states = pooled(hidden)
    paid = (layer_weights(len(attention))[:, None] * attention.float().mean(1)).sum(0)[places]
    alike = torch.cosine_similarity(states[places], states[last][None], dim=-1)
    if normalize == "minmax":
        paid, alike = _minmax(paid), _minmax(alike)
    relevance = BETA * paid + (1 - BETA) * alike
    best = relevance.topk(min(k, len(places))).indices
    return sorted(places[best].tolist())


def _minmax(values: torch.Tensor) -> torch.Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp_min(1e-10)
