"""Pages of neighbouring tokens under the bounds of their keys (Quest, arXiv 2406.10774).

A page keeps the smallest and the largest value of each key channel. No key of the page can have a larger product with
a query than sum_d max(q_d * min_d, q_d * max_d): pages are ranked by this bound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from textkv.retrievers.base import register_retriever
from textkv.retrievers.buckets import Buckets, grouped


@register_retriever("pages")
class Pages(Buckets):
    """Bounds of the keys of pages.

    Args:
        page: tokens of a page, in the order of their positions.

    Attributes:
        low, high: [batch, kv_heads, pages, head_dim] in the keys' dtype.
    """

    vectors = 2

    def __init__(self, page: int) -> None:
        super().__init__()
        self.page = page
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None

    def build(self, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Bounds of every page."""
        self.length = 0
        self.bucket = torch.empty(*positions.shape[:2], 0, dtype=torch.int64, device=device)
        self.size = self.bucket.clone()
        self.low = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]), device=device)
        self.high = self.low.clone()
        self.update(keys, positions)

    def update(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """The last page of each head is filled up, then new ones begin."""
        new, device = positions[:, :, self.length :], self.bucket.device
        real, known = new >= 0, self.size.sum(-1, keepdim=True).cpu()
        # Tokens are counted, not slots: a row has holes where its neighbours have tokens, and its pages are its own.
        bucket = ((known + real.cumsum(-1) - 1) // self.page).masked_fill(~real, -1)
        first = int((known // self.page).min()) if known.numel() else 0
        more = max(0, int(bucket.max()) + 1 - self.size.shape[-1]) if bucket.numel() else 0
        place = (bucket - first).clamp(min=0)
        count = self.size.shape[-1] + more - first
        size = place.new_zeros(*place.shape[:2], count).scatter_add_(-1, place, real.long())
        self.size = F.pad(self.size, (0, more))
        self.size[..., first:] += size.to(device)
        for name, fill, nearer in (("low", torch.inf, torch.minimum), ("high", -torch.inf, torch.maximum)):
            bounds = F.pad(getattr(self, name), (0, 0, 0, more), value=fill)
            found = _bounds(keys[:, :, self.length :].masked_fill(~real[..., None], fill), place, count, fill)
            bounds[:, :, first:] = nearer(bounds[:, :, first:], found.to(device))
            setattr(self, name, bounds)
        self.bucket, self.length = torch.cat([self.bucket, bucket.to(device)], -1), keys.shape[2]

    def score(self, q: torch.Tensor) -> torch.Tensor:
        """The largest bound over the query heads of a KV head."""
        queries, low, high = grouped(q, self.low.shape[1]), self.low.float(), self.high.float()
        # q_d * max_d is the larger product where q_d > 0, else q_d * min_d; a page of holes has no bound.
        empty = (self.size == 0)[..., None]
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        return (queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT).amax(2)

    def _summaries(self) -> dict[str, torch.Tensor]:
        return {"low": self.low, "high": self.high}


def _bounds(keys: torch.Tensor, page: torch.Tensor, pages: int, fill: float) -> torch.Tensor:
    """[batch, kv_heads, pages, head_dim]: per channel the smallest key of each page if `fill` is inf, the largest if it
    is -inf.

    Args:
        keys: [batch, kv_heads, n, head_dim], `fill` at holes.
        page: int64 [batch, kv_heads, n].
    """
    index = page[..., None].expand(keys.shape)
    found = keys.new_full((*keys.shape[:2], pages, keys.shape[3]), fill)
    return found.scatter_reduce_(2, index, keys, "amin" if fill > 0 else "amax")
