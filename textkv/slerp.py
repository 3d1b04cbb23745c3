"""One direction for two vectors: spherical interpolation, and which pairs are too unlike to share one
(MiniCache, arXiv 2405.14366).

Vectors are one token's keys (or values) of one KV head in two neighbouring layers. Both layers rotate a position alike,
so lengths and angles are those before the rotary embedding, and keys may be merged as they are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Rule = Literal["range", "topk"]
_STRAIGHT = 1e-4
"""Sine of the angle below which the arc is a line (or, beyond a right angle, has no middle)."""


@dataclass(frozen=True)
class Shared:
    """What two vectors x0, x1 [.., head_dim] have in common.

    Attributes:
        direction: fp32 [.., head_dim], unit vectors; 0 where both are 0.
        sizes: fp32 [..] each, |x0| and |x1|.
        distance: fp32 [..], angle / pi in [0, 1]; 0 where one of them is 0, since both are then restored exactly.
    """

    direction: torch.Tensor
    sizes: tuple[torch.Tensor, torch.Tensor]
    distance: torch.Tensor


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> Shared:
    """Interpolates the directions of two equally shaped tensors; t = 0 is the first's, t = 1 the second's."""
    first, second = first.float(), second.float()
    sizes = first.norm(dim=-1), second.norm(dim=-1)
    u, w = (x / size.clamp(min=1e-30)[..., None] for x, size in zip((first, second), sizes, strict=True))
    alone = (sizes[0] == 0) | (sizes[1] == 0)
    # Half the angle from its tangent: the arc cosine of a rounded dot product loses small angles.
    angle = 2 * torch.atan2((u - w).norm(dim=-1), (u + w).norm(dim=-1)).masked_fill(alone, 0)
    sine = angle.sin()
    straight = sine < _STRAIGHT
    sine = sine.masked_fill(straight, 1)
    a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    b = torch.where(straight, t, (t * angle).sin() / sine)
    mixed = torch.where(alone[..., None], u + w, a[..., None] * u + b[..., None] * w)
    direction = mixed / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return Shared(direction, sizes, angle / math.pi)


@dataclass(frozen=True)
class Retention:
    """Which tokens keep both vectors exactly because their layers point apart.

    "range" keeps distances above max - gamma * (max - min) of the tokens so far. (The formula as usually printed, below
    min + gamma * (max - min), keeps the most similar ones: an inequality the wrong way round.) "topk" keeps the share
    `gamma` of largest distances, so many of every block whatever they hold. Under both, gamma = 0 keeps none, gamma = 1
    all, and opposite vectors, between which there is no middle, are always kept.

    Raises:
        ValueError: an unknown rule, or gamma outside [0, 1].
    """

    rule: Rule = "range"
    gamma: float = 0.05

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"retention={self.rule!r}: use 'range' or 'topk'")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: a share lies in [0, 1]; 0.05 as in the paper")

    def dissimilar(self, distance: torch.Tensor, decide: torch.Tensor, extent: Extent) -> torch.Tensor:
        """Which of the tokens to decide on are kept: bool like `distance`.

        Args:
            distance: fp32 [batch, kv_heads, n].
            decide: bool, same shape: tokens that the rule is about (no holes, no sinks).
            extent: of all tokens so far, these included.
        """
        opposite = decide & (distance > 1 - _STRAIGHT / math.pi)
        if self.gamma == 1:
            return decide
        if self.rule == "range":
            low, high = extent.low[..., None], extent.high[..., None]
            return opposite | (decide & (high - distance < self.gamma * (high - low)))
        # The tiny addend undoes binary rounding, as in `Budget.count`; a half rounds up.
        count = (self.gamma * decide.sum(-1, keepdim=True).double() + 0.5 + 1e-9).long()
        order = distance.masked_fill(~decide, -1).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return opposite | (decide & (torch.empty_like(order).scatter_(-1, order, rank) < count))


@dataclass(frozen=True)
class Extent:
    """Smallest and largest distance so far, fp32 [batch, kv_heads] each; +inf and -inf before the first token."""

    low: torch.Tensor
    high: torch.Tensor

    def widened(self, distance: torch.Tensor, decide: torch.Tensor) -> Extent:
        """With further tokens: the largest distance follows them, the smallest stays what the first block set."""
        low = distance.masked_fill(~decide, torch.inf).amin(-1)
        high = distance.masked_fill(~decide, -torch.inf).amax(-1)
        return Extent(torch.where(self.low.isinf(), low, self.low), torch.maximum(self.high, high))
