"""How a prompt block's queries lie before the rotary embedding turned them, without keeping one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.positions import RotarySpec


@dataclass(frozen=True)
class QueryMoments:
    """How a block's pre-RoPE queries are spread, per query head. Parts of a block add up with `+`.

    Kept centred: the difference of two large sums would lose a small covariance beside a large mean.

    Attributes:
        count: fp32 [batch], queries counted.
        mean: fp32 [batch, heads, head_dim], 0 where none was counted.
        scatter: fp32 [batch, heads, head_dim, head_dim], sum of outer products of (query - mean).
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, counted: torch.Tensor) -> QueryMoments:
        """Moments of the queries q [batch, heads, m, head_dim] at which `counted` bool [batch, m] is True."""
        out = ~counted[:, None, :, None]
        count = counted.sum(1).float()
        # A row that is all padding has no queries: its moments are 0, not NaN.
        mean = q.float().masked_fill(out, 0).sum(2) / count.clamp(min=1)[:, None, None]
        centred = (q.float() - mean[:, :, None]).masked_fill(out, 0)
        return cls(count, mean, centred.mT @ centred)

    def __add__(self, other: QueryMoments) -> QueryMoments:
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[:, None, None]
        gap = other.mean - self.mean
        # Two centred sums add up with what their means differ by (Chan's formula).
        between = (share * self.count[:, None, None] * gap)[..., None] * gap[..., None, :]
        return QueryMoments(count, self.mean + share * gap, self.scatter + other.scatter + between)

    def part(self, rows: slice, heads: slice) -> QueryMoments:
        """The moments of some rows and query heads."""
        return QueryMoments(self.count[rows], self.mean[rows, heads], self.scatter[rows, heads])

    @property
    def covariance(self) -> torch.Tensor:
        """fp32 [batch, heads, head_dim, head_dim], divided by the count; 0 where at most one was counted."""
        return self.scatter / self.count.clamp(min=1)[:, None, None, None]


@dataclass(frozen=True)
class QueryCentres:
    """Where the pre-RoPE queries of each head lie, and how far they reach: parts of a text add up with `+`.

    Attributes:
        count: fp32 [batch], queries counted.
        mean: fp32 [batch, heads, head_dim], 0 where none was counted.
        lengths: fp32 [batch, heads, R / 2], mean length of the two channels that RoPE turns together, pair by pair.
    """

    count: torch.Tensor
    mean: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, counted: torch.Tensor, rotary: RotarySpec) -> QueryCentres:
        """Centres of the queries q [batch, heads, m, head_dim] at which `counted` bool [batch, m] is True."""
        q = q.float().masked_fill(~counted[:, None, :, None], 0)
        count = counted.sum(1).float()
        share = count.clamp(min=1)[:, None, None]
        return cls(count, q.sum(2) / share, rotary.lengths(q).sum(2) / share)

    def __add__(self, other: QueryCentres) -> QueryCentres:
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[:, None, None]
        return QueryCentres(
            count,
            self.mean + share * (other.mean - self.mean),
            self.lengths + share * (other.lengths - self.lengths),
        )

    def part(self, rows: slice, heads: slice) -> QueryCentres:
        """The centres of some rows and query heads."""
        return QueryCentres(self.count[rows], self.mean[rows, heads], self.lengths[rows, heads])
