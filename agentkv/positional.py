"""How much attention over a screenshot tells about places on it, head by head (STaR-KV, arXiv 2606.01790)."""

from __future__ import annotations

from math import ceil, sqrt

import torch

from textkv.screens import Grid

LEVELS = 16
"""Rank bins of attention."""
MOST_BINS = 12
"""Position bins along each side, at most."""


def guessed_grid(tokens: int) -> Grid:
    """The grid that the released code assumes of a frame: nearly a square, whatever the screen was."""
    rows = max(1, round(sqrt(tokens)))
    return rows, ceil(tokens / rows)


def bins_for(tokens: int) -> int:
    """Position bins along each side so that each has nine tokens or more: below, a plug-in estimate counts cells and
    not what attention tells (at 144 tokens in 144 cells every pattern has ln 16)."""
    return max(1, min(MOST_BINS, int(sqrt(tokens / 9))))


def cells(offsets: torch.Tensor, grid: Grid, bins: int) -> torch.Tensor:
    """Position bin of tokens, by their offsets in a frame, int64 [n] -> int64 [n] in [0, bins * bins)."""
    rows, columns = grid
    # The middle of a token decides, in whole numbers: (row + 1/2) / rows * bins.
    down = ((2 * (offsets // columns) + 1) * bins // (2 * rows)).clamp(max=bins - 1)
    right = ((2 * (offsets % columns) + 1) * bins // (2 * columns)).clamp(max=bins - 1)
    return down * bins + right


def mutual_information(attention: torch.Tensor, cell: torch.Tensor, count: int) -> torch.Tensor:
    """Mutual information, in nats, of the rank of a token's attention and its position bin.

    Args:
        attention: [heads, n], non-negative; its order alone matters, ties go by the lower index.
        cell: int64 [n], from `cells`, of `count` bins.

    Returns:
        float64 [heads]; 0 where a head has no attention on the frame.
    """
    heads, n = attention.shape
    order = attention.float().sort(dim=-1, stable=True).indices
    ranks = torch.arange(n, device=order.device).expand_as(order)
    level = torch.empty_like(order).scatter_(1, order, ranks * LEVELS // n)
    joint = torch.zeros(heads, LEVELS * count, dtype=torch.float64, device=attention.device)
    joint.scatter_add_(1, level * count + cell, torch.full_like(level, 1, dtype=torch.float64) / n)
    joint = joint.view(heads, LEVELS, count)
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    told = torch.where(joint > 0, joint * (joint / apart).log(), 0).sum((1, 2)).clamp(min=0)
    return torch.where(attention.sum(1) > 1e-12, told, 0)


def weights(gain: torch.Tensor, tau: float) -> torch.Tensor:
    """Share of each head by its mean information: [heads] -> [heads], sums to 1; equal where all know as much."""
    low, high = gain.min(), gain.max()
    spread = high - low
    scaled = torch.where(spread < 1e-12, 0.5, (gain - low) / spread.clamp(min=1e-12))
    return torch.softmax(scaled / tau, 0)
