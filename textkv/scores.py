"""Importance of stored tokens: formulas that several methods share.

Shapes: queries [batch, heads, w, head_dim]; keys [batch, kv_heads, n, head_dim]; scores fp32 [batch, kv_heads, n].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from textkv.eviction import PROTECTED
from textkv.kernels import window_mass
from textkv.softmax import Softmax

Pool = Literal["avg", "max"]


def pool(scores: torch.Tensor, kernel: int, kind: Pool = "avg") -> torch.Tensor:
    """Pools over tokens, stride 1, same length. "avg" counts the zeros of its padding, so borders are scaled down."""
    if kernel == 1:
        return scores
    flat = scores.flatten(0, -2)[:, None]
    if kind == "avg":
        pooled = F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    else:
        pooled = F.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    return pooled[:, 0].view_as(scores)


def group_mean(scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch, heads, n] per query head -> [batch, kv_heads, n], mean over each KV head's group."""
    return scores.unflatten(1, (kv_heads, -1)).mean(2)


def past_mass(queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Attention that the last w tokens pay to each token before them: fp32 [batch, heads, n - w].

    Sum over the window of softmax probabilities over ALL n keys (SnapKV, arXiv 2404.14469): the past columns are not
    normalised again.
    """
    return window_mass(queries, keys, **softmax.options)[..., : keys.shape[2] - queries.shape[2]]


def with_window(past: torch.Tensor, window: int) -> torch.Tensor:
    """Appends the window's own tokens as protected: [.., n - w] -> [.., n]."""
    return F.pad(past, (0, window), value=PROTECTED)


def fit_window(queries: torch.Tensor, stored: int, keep: int, past: int = 1) -> torch.Tensor:
    """The last queries that may serve as the window: of the `keep` tokens it leaves `past` to tokens before it (one
    where the window would be empty else), and there must be one such token.

    A single kept token leaves no window: then all tokens score alike, and the first one, where heads rest, stays.
    """
    width = min(queries.shape[2], max(keep - past, min(keep - 1, 1)), stored - 1)
    return queries[:, :, queries.shape[2] - width :]
