"""Buckets: tokens that are chosen together, by one score for all of them.

A bucket is a run of a head's tokens. A query ranks the buckets, and sees the tokens of the best ones; of the last one
that still has room, the first tokens. What a bucket is, and how it is scored, is for a subclass to say.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from textkv.retrievers.base import Retriever


class Buckets(Retriever):
    """Base of retrievers by bucket, all of whose tensors lie on the model's device.

    Attributes:
        bucket: int64 [batch, kv_heads, n], each slot's bucket, ascending in a head, -1 = hole.
        size: int64 [batch, kv_heads, buckets], tokens in each; 0 = not a bucket of this head.
    """

    vectors = 1
    """Vectors by which one bucket is scored: what a query compares."""

    def __init__(self) -> None:
        super().__init__()
        self.bucket: torch.Tensor | None = None
        self.size: torch.Tensor | None = None

    @abstractmethod
    def score(self, q: torch.Tensor) -> torch.Tensor:
        """How much queries [batch, heads, 1, head_dim] want each bucket: fp32 [batch, kv_heads, buckets]."""

    def query(self, q: torch.Tensor, room: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The tokens of the best buckets, one choice for all query heads of a KV head; equal buckets by their age."""
        scores = self.score(q).masked_fill(self.size == 0, -torch.inf)
        # Each head asks its buckets, each query head of it for itself.
        self.compared = self.vectors * int((self.size > 0).sum()) * (q.shape[1] // self.size.shape[1])
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=q.device).expand_as(order)
        )
        n = self.bucket.shape[-1]
        hole = self.bucket < 0
        place = rank.gather(-1, self.bucket.clamp(min=0)) * n + torch.arange(n, device=q.device)
        place = place.masked_fill(hole, torch.iinfo(place.dtype).max)
        slots = place.topk(min(n, int(room.max())), dim=-1, largest=False, sorted=True).indices
        slots = slots.masked_fill(hole.gather(-1, slots), -1).cpu()
        return slots.masked_fill(torch.arange(slots.shape[-1]) >= room[:, None, None], -1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Buckets and their summaries, as far as they are there: before `build` a retriever may know of tokens too."""
        own = {"bucket": self.bucket, "size": self.size} | self._summaries()
        return {name: x for name, x in own.items() if x is not None}

    def _summaries(self) -> dict[str, torch.Tensor]:
        """Further tensors, first axis the batch."""
        return {}


def grouped(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """fp32 [batch, kv_heads, group, head_dim] of one query per head."""
    return q[:, :, 0].float().unflatten(1, (kv_heads, -1))
