"""What to ask for: layer-wise representation pooling of ATLAS (arXiv 2504.01281, 2B).

    relevance_j = beta * Att_j + (1 - beta) * Rep_j,  beta = 0.7

Att_j is what token i gives to token j, averaged over heads and weighted over layers; Rep_j is the cosine of their
pooled hidden states. Att is of the order of 1/n and Rep of 1, so that in a long context the sum as printed is Rep
alone: both are brought to 0..1 first, unless the paper's own is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from textkv.rag.words import Word

BETA, WORDS = 0.7, 6


def layer_weights(layers: int) -> torch.Tensor:
    """psi_l for l = 1 .. L, fp32 [layers]: ramps to 0.2, 0.5 and from 0.3; 0 at the last layer, as printed."""
    number, third = torch.arange(1, layers + 1, dtype=torch.float32), layers / 3
    rising, middle = 0.2 * number / third, 0.5 * (number - third) / third
    falling = 0.3 * (layers - number) / third
    return torch.where(number < third, rising, torch.where(number < 2 * third, middle, falling))


def relevance(
    row: torch.Tensor,
    pooled: torch.Tensor,
    own: torch.Tensor,
    words: Sequence[Word],
    beta: float = BETA,
    normalize: Literal["minmax", "none"] = "minmax",
) -> torch.Tensor:
    """fp32 [words]: how much each word is what the token is about. A word has the attention of all its tokens and the
    mean of their cosines.

    Args:
        row: the token's attention, [layers, heads, n].
        pooled: [n, hidden], of the n tokens read so far.
        own: [hidden], the token's.
        words: places within those n tokens.

    Raises:
        ValueError: a share outside 0 to 1, or another way to normalize.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is no share; use {BETA}")
    if normalize not in ("minmax", "none"):
        raise ValueError(f"normalize={normalize!r} is not known; use minmax or none")
    attention = layer_weights(len(row)).to(row) @ row.mean(1)
    cosine = F.cosine_similarity(pooled.float(), own.float()[None], dim=-1)
    attended = torch.stack([attention[word.start : word.stop].sum() for word in words])
    alike = torch.stack([cosine[word.start : word.stop].mean() for word in words])
    if normalize == "minmax":
        attended, alike = _unit(attended), _unit(alike)
    return beta * attended + (1 - beta) * alike


def pick(words: Sequence[Word], scores: torch.Tensor, k: int = WORDS) -> list[str]:
    """The k best words in the order of the text, each once; all of them where there are fewer.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: a query has at least 1 word; use {WORDS}")
    chosen: dict[str, int] = {}
    for number in scores.argsort(descending=True, stable=True).tolist():
        if len(chosen) == k:
            break
        chosen.setdefault(words[number].text.lower(), number)
    return [words[number].text for number in sorted(chosen.values())]


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Linearly to 0..1; equal numbers become 0."""
    return (x - x.min()) / (x.max() - x.min()).clamp(min=torch.finfo(x.dtype).tiny)
