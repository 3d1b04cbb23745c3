"""Pages of neighbouring tokens under the bounds of their keys (Quest, arXiv 2406.10774).

A page keeps the smallest and the largest value of each key channel. No key of the page can have a larger product with
a query than sum_d max(q_d * min_d, q_d * max_d): pages are ranked by this bound.
"""

from __future__ import annotations

import torch

from textkv.retrievers.base import register_retriever
from textkv.retrievers.buckets import Buckets, grouped


@register_retriever("pages")
class Pages(Buckets):
    """Bounds of the keys of pages.

    Args:
        page: tokens of a page, in the order of the slots.

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
        """Bounds of the pages in which there is a new token."""
        whole = self.length // self.page
        first = whole * self.page
        device, n = self.bucket.device, keys.shape[2]
        real = positions[:, :, first:] >= 0
        bucket = (torch.arange(first, n) // self.page).expand(real.shape).masked_fill(~real, -1)
        self.bucket = torch.cat([self.bucket[..., :first], bucket.to(device)], -1)
        low, high = (
            _by_page(keys[:, :, first:].masked_fill(~real[..., None], fill), self.page, fill).to(device)
            for fill in (torch.inf, -torch.inf)
        )
        size = _by_page(real[..., None].long(), self.page, 0)[..., 0].to(device)
        self.low = torch.cat([self.low[:, :, :whole], low.amin(3)], 2)
        self.high = torch.cat([self.high[:, :, :whole], high.amax(3)], 2)
        self.size = torch.cat([self.size[:, :, :whole], size.sum(3)], 2)
        self.length = n

    def score(self, q: torch.Tensor) -> torch.Tensor:
        """The largest bound over the query heads of a KV head."""
        queries, low, high = grouped(q, self.low.shape[1]), self.low.float(), self.high.float()
        # q_d * max_d is the larger product where q_d > 0, else q_d * min_d; a page of holes has no bound.
        empty = (self.size == 0)[..., None]
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        return (queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT).amax(2)

    def _summaries(self) -> dict[str, torch.Tensor]:
        return {"low": self.low, "high": self.high}


def _by_page(x: torch.Tensor, page: int, fill: float) -> torch.Tensor:
    """[batch, kv_heads, n, d] -> [batch, kv_heads, pages, page, d]; the last page is filled up."""
    short = -x.shape[2] % page
    filled = torch.cat([x, x.new_full((*x.shape[:2], short, x.shape[3]), fill)], 2)
    return filled.unflatten(2, (-1, page))
