"""Attention of a few queries over regions of different lengths, which are cut into pages of one length.

    out, lse as `decode_attention` over each region alone; region b * G + g is (batch row b, kv head g)

All pages are rows of one rectangle, whichever region they belong to, so that one call of the dense kernel reads them,
each with the queries of its region; the pages of a region are then joined by their log-sum-exp.

Floor in bytes: every K and V row is read once, those of a page without a token too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ._backend import check_tensor
from ._fused import _ATTEND, fused_applies
from .decode_attention import decode_attention

HOLE = int(torch.tensor(-1e30).view(torch.int32))
"""What stands for a position where a page holds no token. It is negative, and the bits of a float that no score of a
softmax survives; the bits of a real position are those of a float below 1e-30, which changes no score. So positions
are their own additive mask, and no second one has to be kept or made for each token."""


@dataclass(frozen=True)
class Pages:
    """Which page belongs to which region.

    Attributes:
        size: tokens of a page.
        owner: int64 [pages], the region of each page.
        table: int64 [regions, most], the pages of each region, filled up with -1.
        asked: what `joins` has made so far.
    """

    size: int
    owner: torch.Tensor
    table: torch.Tensor
    asked: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, size: int, counts: torch.Tensor, device: torch.device) -> Pages:
        """Regions of counts[r] pages each, int64 [regions] on the CPU, one behind the other; behind them all one more
        page for every region."""
        regions, place = torch.arange(len(counts)), torch.arange(int(counts.max()) + 1)
        owner = regions.repeat_interleave(counts)
        table = (counts.cumsum(0) - counts)[:, None] + place
        table[place == counts[:, None]] = len(owner) + regions
        table[place > counts[:, None]] = -1
        return cls(size, torch.cat([owner, regions]).to(device), table.to(device))

    def joins(self, rows: int, dim: int) -> tuple[torch.Tensor, ...]:
        """What gathers for `rows` queries of `dim` channels of each region, made once.

        Returns:
            `owner` int64 [pages, rows * dim]; where the rows' parts lie among those of all pages, int64 [regions * rows
            * most], and as [.., dim]; fp32 [regions * rows, 1, most], -inf where a part is of no page.
        """
        if (rows, dim) not in self.asked:
            index = self.table[:, None].clamp(min=0) * rows + torch.arange(rows, device=self.table.device)[:, None]
            absent = torch.zeros(index.shape, device=index.device).masked_fill_(self.table[:, None] < 0, -torch.inf)
            owner, index = self.owner[:, None].expand(-1, rows * dim), index.view(-1)
            self.asked[rows, dim] = owner, index, index[:, None].expand(-1, dim), absent.flatten(0, 1)[:, None]
        return self.asked[rows, dim]

    @property
    def joined(self) -> list[list[int]]:
        """The arguments for which `joins` was asked."""
        return [list(asked) for asked in self.asked]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, by name."""
        made = {f"{i}.{rows}": x for (rows, _), parts in self.asked.items() for i, x in enumerate(parts)}
        return {"owner": self.owner, "table": self.table} | made


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages,
    *,
    scale: float,
    softcap: float | None = None,
    need_lse: bool = True,
    _backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to all tokens of each region; return `(out, lse)`.

    Args:
        q: queries [B, H, m, D], float16, bfloat16 or float32; copied once for every page.
        k: [pages, 1, size, D] of q's dtype, finite everywhere.
        v: as k.
        positions: int32 [pages, 1, 1, size] seen as float32, below 2**27, HOLE where there is no token. Every region
            has a token.
        pages: which page belongs to which region.
        scale: factor on q . k, usually D ** -0.5.
        softcap: as `decode_attention`.
        need_lse: False for a caller who has no other part to join.

    Returns:
        out [B, H, m, D] in q's dtype and lse [B, H, m] in float32, or None if not needed.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    regions, shape = pages.table.shape[0], (pages.owner.shape[0], 1, pages.size, q.shape[3])
    B, H, m, D = q.shape
    if B * H % regions or k.shape != shape or v.shape != shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q is {list(q.shape)} in {q.dtype}, k {list(k.shape)} in {k.dtype}, v {list(v.shape)} in {v.dtype}; "
            f"{regions} regions need k and v {list(shape)} in the dtype of q, and B * H a multiple of {regions}"
        )
    check_tensor("positions", positions, (shape[0], 1, 1, pages.size), (torch.float32,), q)
    rows = B * H // regions * m
    # Rows are gathered and not indexed, joined by a product and not by a sum: fewer calls for each token.
    owner, index, channels, absent = pages.joins(rows, D)
    asked = (q.view if q.is_contiguous() else q.reshape)(regions, rows * D)
    asked = asked.gather(0, owner).view(-1, 1, rows, D)
    if fused_applies(q, k, v, softcap, _backend):
        out, lse = _ATTEND(asked, k, v, 0.0, False, attn_mask=positions, scale=scale)
    else:
        valid = (positions.view(torch.int32) >= 0).view(shape[0], pages.size)
        out, lse = decode_attention(asked, k, v, scale=scale, softcap=softcap, valid=valid, _backend=_backend)
    lse = lse.view(-1).gather(0, index).view(absent.shape) + absent
    weights = torch._softmax(lse, 2, False)
    parts = out.view(-1, D).gather(0, channels).view(regions * rows, -1, D)
    if parts.dtype != weights.dtype:
        parts = parts.float()
    joined = torch.bmm(weights, parts).view(B, H, m, D)
    joined = joined if joined.dtype == q.dtype else joined.to(q.dtype)
    if not need_lse:
        return joined, None
    # The heaviest page tells the sum of all: its own share of it is known.
    return joined, (lse.amax(2) - weights.amax(2).log()).view(B, H, m)
