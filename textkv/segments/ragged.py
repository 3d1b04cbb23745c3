"""The ragged segment: every (row, KV head) holds its own number of tokens, so per-head budgets free real bytes.

Flat storage [slots, head_dim], region by region: r = row * kv_heads + head. What an eviction leaves lies tight, region
r at start[r] : start[r] + length[r]. The first token that comes then moves all into pages of one length, and gives
every region one more page behind all others, its tail: these lie side by side as in a dense segment, so a decoded token
is written to all heads at once, and on a CPU all regions are read in one call (`kernels.paged_attention`). When the
tails are full, all moves again. What idles in a region's pages is on average less than the larger of 8 tokens and an
eighth of the mean length.

Lengths are kept on the host too: they change only by eviction (which waits for the GPU anyway) and by appending.
"""

from __future__ import annotations

import torch

from textkv.kernels import decode_attention, merge, paged_attention
from textkv.kernels.paged_attention import HOLE, Pages
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Step, Stored, attend_stored, register_segment, turned_slots

_FEW = 16  # queries up to which a copy of them for every page costs less than a call for every region


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
        self._lengths = lengths.clone()  # without the tails
        self._size = self._used = 0  # tokens that a page has room for, and that each tail holds
        self._place()

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A decoded token of each row is stored first and then read with all others; no log-sum-exp is made for one
        segment alone."""
        if step.q.shape[2] > 1 or step.padded:
            return super().extend(step, need_lse)
        self.append(step)
        return self._read(step.q, step.scale, step.softcap, step.hidden, need_lse)

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel call over regions as long as they are, or two with tails; with `hidden` over a padded copy."""
        return self._read(q, scale, softcap, hidden, need_lse=True)

    def _read(
        self, q: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None, need_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Kernels for ragged rows know no mask: a masked forward is rare, and reads a padded copy.
        if hidden is not None:
            return attend_stored(self.stored(), q, scale, softcap, hidden)
        if self._pages is not None and (self._used or self._filled) and q.shape[2] <= _FEW:
            return paged_attention(q, *self._rows, self._pages, scale=scale, softcap=softcap, need_lse=need_lse)
        how = {"scale": scale, "softcap": softcap}
        parts = [decode_attention(q, self.k, self.v, start=self.start, length=self.length, **how)]
        if self._used:
            k, v, _ = self._tails
            parts.append(decode_attention(q, k[:, :, : self._used], v[:, :, : self._used], **how))
        return parts[0] if len(parts) == 1 else merge(*zip(*parts, strict=True))

    def keep(self, index: torch.Tensor) -> None:
        """Copies what stays to new tight regions; a hole of the index, or a hole that it names, takes no slot."""
        batch, heads = self._lengths.shape
        index = index.expand(batch, heads, -1).reshape(batch * heads, -1)
        region = torch.arange(batch * heads, device=index.device)[:, None]
        # A slot of `stored` behind a region's end is a hole too.
        real = (index >= 0) & (index < self.length[:, None] + self._used)
        # Region by region, in order: what stays lies tight again.
        flat = self._slots(region, index)[real]
        self._lengths = real.sum(-1).view(batch, heads).cpu()
        self._size = self._used = 0
        self.k, self.v, self.positions = self.k[flat], self.v[flat], self.positions[flat]
        self._place()

    def turn(self, delta: torch.Tensor, rotary: RotarySpec) -> None:
        """Turns the keys of all regions in place."""
        held = self.stored()
        inside = held.positions >= 0
        region, rank = inside.flatten(0, 1).nonzero().unbind(-1)
        self.k[self._slots(region, rank)] = turned_slots(held.keys, held.positions, delta, rotary)[inside]

    def stored(self) -> Stored:
        """A copy padded to the longest region; behind a region's end lies some other token, at position -1."""
        batch, heads = self._lengths.shape
        longest = int(self._lengths.max()) + self._used if self._lengths.numel() else 0
        rank = torch.arange(longest, device=self.k.device)
        region = torch.arange(batch * heads, device=self.k.device)[:, None]
        inside = rank < self.length[:, None] + self._used
        # Slots behind a region's end would be another head's tokens: slot 0 stands in, and is marked as a hole.
        flat = self._slots(region, rank.expand(batch * heads, -1)).where(inside, 0)
        shape = (batch, heads, longest)
        return Stored(
            self.k[flat].view(*shape, -1),
            self.v[flat].view(*shape, -1),
            self.positions[flat].masked_fill(~inside, -1).view(shape),
        )

    def lengths(self) -> torch.Tensor:
        """Tokens of each region, its tail's among them; a copy."""
        return self._lengths + self._used

    def tensors(self) -> dict[str, torch.Tensor]:
        """Slack included: "k" and "v" [slots, head_dim], "positions" int32 [slots], HOLE in the slack; "start" int64
        and "length" int32 [batch * kv_heads] tell where regions lie without their tails, and others their pages."""
        own = {"k": self.k, "v": self.v, "positions": self.positions, "start": self.start, "length": self.length}
        return own if self._pages is None else own | self._pages.tensors()

    def state(self) -> dict:
        """The slots, the regions' lengths, and how far their tails are filled, from which the rest follows; for which
        queries pages were joined, so that what is held is the same again."""
        names = ("k", "v", "positions", "_lengths", "_size", "_used")
        return {name: getattr(self, name) for name in names} | {"joined": self._pages.joined if self._pages else []}

    @classmethod
    def from_state(cls, state: dict) -> RaggedSegment:
        """The segment that had this `state()`."""
        segment = cls.__new__(cls)
        segment.__setstate__(state)
        return segment

    # Tails and pages are views: a pickle would tear them from what they are views of.
    __getstate__ = state

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        joined = state.pop("joined", [])
        self.__dict__.update(state)
        self._lengths = self._lengths.cpu()
        self._place()
        for rows, dim in joined if self._pages else ():
            self._pages.joins(rows, dim)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Copies the rows' regions; their tails begin anew."""
        batch, heads = self._lengths.shape
        regions = (rows.cpu()[:, None] * heads + torch.arange(heads)).reshape(-1)
        self._move(regions, self.lengths().view(-1)[regions].view(-1, heads), self._size)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Shortens each region by its row's `real` tokens (None = by `tokens`): padding had no slot."""
        if real is None and tokens <= self._used:
            self._tails[2][..., self._used - tokens : self._used] = HOLE
            self._used -= tokens
            return
        gone = tokens if real is None else real[:, None]
        self._move(torch.arange(self._lengths.numel()), self.lengths() - gone, self._size)

    def append(self, step: Step) -> None:
        """Writes into the tails; where they have no room for it, or a row has padding, which takes no slot, all moves
        first."""
        m = step.k.shape[2]
        if not step.padded and self._used + m <= self._size:
            self._write(step)
            return
        real = step.positions >= 0
        came = real.sum(1).cpu()[:, None] if step.padded else m
        held, regions = self.lengths(), torch.arange(self._lengths.numel())
        size = _page_size(held + came)
        if not step.padded and m <= size:
            self._move(regions, held, size)
            self._write(step)
            return
        self._move(regions, held, size, came)
        # A row's tokens close up: padding takes no slot.
        offset = real.cumsum(1) - 1 if step.padded else torch.arange(m, device=self.k.device).expand(len(real), m)
        slots = (self.start + self.length).view(*held.shape, 1) + offset[:, None]
        taken = real[:, None].expand(-1, held.shape[1], -1)
        slots = slots[taken]
        self.k[slots], self.v[slots] = step.k[taken], step.v[taken]
        self.positions[slots] = step.positions[:, None].expand_as(taken)[taken]
        self._lengths = held + came
        self._place()

    def _write(self, step: Step) -> None:
        """One token or a few of each row, none of them padding, to the tails of all its heads."""
        k, v, positions = self._tails
        end = self._used + step.k.shape[2]
        k[:, :, self._used : end] = step.k
        v[:, :, self._used : end] = step.v
        positions[..., self._used : end] = step.positions
        self._used = end

    def _slots(self, region: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """The slot of each region's token number `rank`, both int64 on the device; of any where there is no token."""
        start, length = self.start[region], self.length[region]
        tail = self._behind + region * self._size + rank - length
        return torch.where(rank < length, start + rank, tail)

    def _move(self, regions: torch.Tensor, lengths: torch.Tensor, size: int, more: int | torch.Tensor = 0) -> None:
        """New region i gets the first lengths[i] tokens of old region regions[i], and room for `more`; pages of `size`
        (0 = no pages) and empty tails. All on the CPU."""
        device, count = self.k.device, lengths.reshape(-1)
        region = torch.arange(len(count)).repeat_interleave(count)
        rank = torch.arange(len(region)) - (count.cumsum(0) - count)[region]
        source = self._slots(regions[region].to(device), rank.to(device))
        room = _rounded(lengths + more, size).view(-1)
        target = ((room.cumsum(0) - room)[region] + rank).to(device)
        slots = int(room.sum()) + size * len(room)
        for name in ("k", "v", "positions"):
            old = getattr(self, name)
            # Zeros and no unseen memory, which may hold NaN.
            new = old.new_full((slots, *old.shape[1:]), HOLE if name == "positions" else 0)
            new[target] = old[source]
            setattr(self, name, new)
        self._lengths, self._size, self._used = lengths, size, 0
        self._place(lengths + more)

    def _place(self, lengths: torch.Tensor | None = None) -> None:
        """Works out where regions and tails lie, for bodies that have room for `lengths` (None = what they hold)."""
        device, (batch, heads) = self.k.device, self._lengths.shape
        room = _rounded(self._lengths if lengths is None else lengths, self._size).view(-1)
        self.start = (room.cumsum(0) - room).to(device)
        self.length = self._lengths.reshape(-1).to(device, torch.int32)
        self._behind = int(room.sum())
        self._filled = bool(self._lengths.all())
        self._pages = None
        if not self._size:
            return
        k, v, positions = (x[self._behind :].unflatten(0, (batch, heads, -1)) for x in (self.k, self.v, self.positions))
        # Heads first: a token's position is then written to all of them without another view.
        self._tails = k, v, positions.transpose(0, 1)
        if not self.k.is_cuda:  # a GPU's kernel reads regions of any length as they are
            self._pages = Pages.of(self._size, room // self._size, device)
            k, v, positions = (x.unflatten(0, (-1, 1, self._size)) for x in (self.k, self.v, self.positions))
            self._rows = k, v, positions.unsqueeze(1).view(torch.float32)


def _page_size(lengths: torch.Tensor) -> int:
    """Tokens of a page: a power of two, at most a 16th of the mean length and at least 4. A region idles in less than
    two of them."""
    return 1 << max(8, int(lengths.float().mean()) // 8).bit_length() - 2


def _rounded(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Up to whole pages of `size`, 0 = as they are."""
    return (lengths + size - 1) // size * size if size else lengths
