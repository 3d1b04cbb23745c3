"""The ragged segment: every (row, KV head) holds its own number of tokens, so per-head budgets free real bytes.

Flat storage [slots, head_dim]: region r = row * kv_heads + head owns slots start[r] : start[r] + length[r]. Regions are
tight after an eviction; the first token that no longer fits gives every region some slack, which decoding then fills.
Lengths are kept on the host too: they change only by eviction (which waits for the GPU anyway) and by appending.
"""

from __future__ import annotations

import torch

from textkv.kernels import decode_attention
from textkv.segments.base import Segment, Step, Stored, attend_stored, register_segment


@register_segment("ragged")
class RaggedSegment(Segment):
    """K and V as flat rows, one region per (row, KV head).

    Args:
        k, v: [slots, head_dim], tight regions in order.
        positions: int32 [slots].
        lengths: int64 [batch, kv_heads] on the CPU.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> None:
        self.k, self.v, self.positions = k, v, positions
        self._lengths = lengths.clone()
        self._capacity = lengths.clone()
        self._place()

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel call over regions as long as they are; with `hidden` over a padded copy."""
        # The kernel for ragged rows knows no mask: a masked forward is rare, and reads a padded copy.
        if hidden is not None:
            return attend_stored(self.stored(), q, scale, softcap, hidden)
        return decode_attention(q, self.k, self.v, scale=scale, start=self.start, length=self.length, softcap=softcap)

    def keep(self, index: torch.Tensor) -> None:
        """Copies what stays to new tight regions; a hole of the index takes no slot."""
        batch, heads = self._lengths.shape
        index = index.expand(batch, heads, -1)
        # Region by region, in order: what stays lies tight again.
        flat = (self.start.view(batch, heads, 1) + index)[index >= 0]
        self._lengths = (index >= 0).sum(-1).cpu()
        self._capacity = self._lengths.clone()
        self.k, self.v, self.positions = self.k[flat], self.v[flat], self.positions[flat]
        self._place()

    def stored(self) -> Stored:
        """A copy padded to the longest region; behind a region's end lies some other token, at position -1."""
        batch, heads = self._lengths.shape
        longest = int(self._lengths.max()) if self._lengths.numel() else 0
        slot = torch.arange(longest, device=self.k.device)
        inside = slot < self.length[:, None]
        # Slots behind a region's end would be another head's tokens: slot 0 stands in, and is marked as a hole.
        flat = (self.start[:, None] + slot).where(inside, self.start[:, None] * 0)
        shape = (batch, heads, longest)
        return Stored(
            self.k[flat].view(*shape, -1),
            self.v[flat].view(*shape, -1),
            self.positions[flat].masked_fill(~inside, -1).view(shape),
        )

    def lengths(self) -> torch.Tensor:
        """The host's own table: replaced when a length changes, so what was given out keeps its numbers."""
        return self._lengths

    def tensors(self) -> dict[str, torch.Tensor]:
        """Slack included: "k" and "v" [slots, head_dim], "positions" int32 [slots]; "start" int64 and "length"
        int32 [batch * kv_heads] tell where regions lie."""
        return {
            "k": self.k, "v": self.v, "positions": self.positions, "start": self.start, "length": self.length,
        }  # fmt: skip

    def take_rows(self, rows: torch.Tensor) -> None:
        """Copies the rows' regions with the room that each had."""
        batch, heads = self._lengths.shape
        regions = (rows.cpu()[:, None] * heads + torch.arange(heads)).reshape(-1)
        self._move(regions, self._capacity.view(-1)[regions].view(-1, heads))

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Shortens each region by its row's `real` tokens (None = by `tokens`): padding had no slot."""
        gone = torch.full((len(self._lengths), 1), tokens) if real is None else real[:, None]
        self._lengths = self._lengths - gone
        self.length = self._lengths.view(-1).to(self.length.device, torch.int32)
        self._slack = int((self._capacity - self._lengths).min())

    def append(self, step: Step) -> None:
        """Writes behind each region; padding takes no slot. When one region is full, all move and get room for
        an eighth of the mean length, at least 8 tokens."""
        batch, heads, m, _ = step.k.shape
        if m == 1 and not step.padded and self._slack > 0:
            # Every region has room for one more, as the host knows: one row for each.
            slots = self.start + self.length
            self.k[slots], self.v[slots] = step.k.flatten(0, 2), step.v.flatten(0, 2)
            self.positions[slots] = step.positions.expand(batch, heads).reshape(-1)
            self.length += 1
            self._lengths = self._lengths + 1
            self._slack -= 1
            return
        real = step.positions >= 0
        came = real.sum(1).cpu()[:, None] if step.padded else torch.full((batch, 1), m)
        if bool((self._lengths + came > self._capacity).any()):
            # All regions move at once, so that they get room for some tokens at once.
            slack = max(8, int(self._lengths.float().mean()) // 8)
            self._move(torch.arange(batch * heads), self._lengths + came + slack)
        # A row's tokens close up: padding takes no slot.
        offset = real.cumsum(1) - 1 if step.padded else torch.arange(m, device=self.k.device).expand(batch, m)
        slots = (self.start + self.length).view(batch, heads, 1) + offset[:, None]
        taken = real[:, None].expand(-1, heads, -1) if step.padded else torch.ones_like(slots, dtype=torch.bool)
        slots = slots[taken]
        self.k[slots], self.v[slots] = step.k[taken], step.v[taken]
        self.positions[slots] = step.positions[:, None].expand(batch, heads, m)[taken]
        self._lengths = self._lengths + came
        self.length = self._lengths.view(-1).to(self.k.device, torch.int32)
        self._slack = int((self._capacity - self._lengths).min())

    def _move(self, regions: torch.Tensor, capacity: torch.Tensor) -> None:
        """New region i is a copy of old region regions[i], with room for capacity[i] tokens."""
        lengths = self._lengths.view(-1)[regions]
        old_start = self.start.cpu()[regions]
        source = torch.cat(
            [torch.arange(s, s + n) for s, n in zip(old_start.tolist(), lengths.tolist(), strict=True)]
        ).to(self.k.device)
        self._lengths, self._capacity = lengths.view(capacity.shape), capacity.clone()
        old = self.k, self.v, self.positions
        self._place()
        target = torch.cat(
            [torch.arange(s, s + n) for s, n in zip(self.start.tolist(), lengths.tolist(), strict=True)]
        ).to(self.k.device)
        slots = int(self._capacity.sum())
        for name, x in zip(("k", "v", "positions"), old, strict=True):
            room = x.new_zeros((slots, *x.shape[1:]))
            room[target] = x[source]
            setattr(self, name, room)

    def _place(self) -> None:
        """Regions one after another, by capacity."""
        self._slack = int((self._capacity - self._lengths).min()) if self._lengths.numel() else 0
        ends = self._capacity.view(-1).cumsum(0)
        self.start = (ends - self._capacity.view(-1)).to(self.k.device)
        self.length = self._lengths.view(-1).to(self.k.device, torch.int32)
