"""The dense segment: one rectangle [batch, kv_heads, n, head_dim], every head the same number of slots.

Rows of a batch may hold fewer tokens: their missing slots have position -1 and are never seen. The buffer is tight
after an eviction and grows by an eighth when a token no longer fits, so decoding copies rarely.

Where one token leaves for each that comes (`take_out`), nothing else moves: the oldest slot's token takes the place of
the one that leaves, and the slots in use begin one further on. Slots then are in the order of their positions no more,
but for the newest, among which nothing has left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from textkv.kernels import compact, decode_attention
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Step, Stored, compact_storage, register_segment, shown, turned_slots
from textkv.segments.ragged import RaggedSegment


@register_segment("dense")
class DenseSegment(Segment):
    """K and V in one rectangle each.

    Args:
        head_repeat: how many stored heads one incoming KV head becomes (only the official GUI-KV stores query heads).

    Attributes:
        first, used: the slots in use begin and end here.
        in_order: whether positions ascend with the slots.
    """

    first = 0
    in_order = True

    def __init__(self, head_repeat: int = 1) -> None:
        # Heads, dtype and device are the first token's to tell.
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.used = 0
        self.holes = False
        self.head_repeat = head_repeat

    @classmethod
    def of(cls, held: Stored, head_repeat: int = 1) -> DenseSegment:
        """A segment that holds these tokens; positions may be shared by the heads ([batch, 1, n])."""
        segment = cls(head_repeat)
        segment.k, segment.v, segment.positions = held.keys, held.values, held.positions.contiguous()
        segment.used = held.keys.shape[2]
        segment.holes = bool((held.positions < 0).any())
        return segment

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel call over the slots in use, without a mask if there are neither holes nor hidden tokens."""
        return decode_attention(q, self._k(), self._v(), scale=scale, valid=self._valid(hidden), softcap=softcap)

    def rectangle(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views of the slots in use, where they have no hole."""
        return None if self.holes or self.k is None else (self._k(), self._v())

    def stored(self) -> Stored:
        """Views of the slots in use: nothing is copied, positions that heads share are expanded."""
        heads = self.k.shape[1]
        return Stored(self._k(), self._v(), self._positions().expand(-1, heads, -1))

    def held_positions(self) -> torch.Tensor:
        """A view int32 [batch, stored heads, slots in use]."""
        return self._positions().expand(-1, self.k.shape[1], -1)

    def lengths(self) -> torch.Tensor:
        """Without holes the host knows them; with holes they are counted on the device. [0, 0] before any token."""
        batch, heads = self.k.shape[:2] if self.k is not None else (0, 0)
        if not self.holes:
            return torch.full((batch, heads), self.slots)
        return (self._positions() >= 0).sum(-1).expand(batch, heads).cpu()

    @property
    def slots(self) -> int:
        """Slots in use."""
        return self.used - self.first

    def tensors(self) -> dict[str, torch.Tensor]:
        """Whole buffers, idle slots included: "k" and "v" [batch, stored heads, slots, head_dim], "positions" int32
        [batch, 1 or stored heads, slots]."""
        return {} if self.k is None else {"k": self.k, "v": self.v, "positions": self.positions}

    def keep(self, index: torch.Tensor) -> None:
        """Moves what stays to new tight buffers. Heads share positions until an index per head comes."""
        batch, heads = self.k.shape[:2]
        # Positions shared by the heads stay shared, unless the heads keep different slots from now on.
        own = max(index.shape[1], self.positions.shape[1])
        hole = index < 0
        # A hole needs some slot to copy from; its position says that nobody may look.
        index = index.masked_fill(hole, max(0, self.slots - 1))
        rows = compact(self._k(), self._v(), index.expand(batch, heads, -1).contiguous())
        self.k, self.v = rows.k, rows.v
        held = self._positions().expand(-1, own, -1)
        self.positions = held.gather(-1, index.expand(-1, own, -1)).masked_fill(hole, -1)
        self.first, self.used = 0, index.shape[-1]
        self.holes = bool((self.positions < 0).any())

    def pick(self, index: torch.Tensor) -> None:
        """`keep` for slots int64 [batch, kv_heads, c] without a hole among them, in a segment without holes, and in any
        order."""
        # The caller made the index by arithmetic: asking the device whether it is in range would cost more than the
        # move.
        rows = compact(self._k(), self._v(), index, check=False)
        self.positions = self.held_positions().gather(-1, index)
        self.k, self.v, self.first, self.used = rows.k, rows.v, 0, index.shape[-1]

    def take_out(self, slot: torch.Tensor) -> Stored:
        """Lets go of one token of each head, int64 [batch, kv_heads, 1], in a segment without holes; returns them. No
        other token moves but that of the first slot. Asks nothing of the device."""
        if self.in_order:
            # Buffers that others may have views of are left to them.
            self.positions = self.positions.expand(-1, self.k.shape[1], -1)
            self._move_to_front()
            self.in_order = False
        gone = []
        for x in (self._k(), self._v(), self._positions()):
            at = slot if x.dim() == 3 else slot[..., None].expand(-1, -1, -1, x.shape[3])
            gone.append(x.gather(2, at))
            x.scatter_(2, at, x[:, :, :1].clone())
        self.first += 1
        return Stored(*gone)

    def put(self, held: Stored) -> None:
        """Takes tokens in that were in another segment: each head's own, none of them a hole, behind all others."""
        end = self._end_of(held.keys.shape[2])
        for mine, x in ((self.k, held.keys), (self.v, held.values), (self.positions, held.positions)):
            mine[:, :, self.used : end] = x
        self.used = end

    def keep_mask(self, mask: torch.Tensor) -> Segment:
        """Stays a rectangle where that `fills_rectangle`; else what stays becomes a `RaggedSegment`."""
        counts = mask.sum(-1)
        if self.head_repeat > 1 or fills_rectangle(counts):  # ragged rows do not repeat heads
            return super().keep_mask(mask)
        rows = compact(self._k(), self._v(), mask)
        return RaggedSegment(rows.k, rows.v, self.held_positions()[mask], counts.cpu())

    def turn(self, delta: torch.Tensor, rotary: RotarySpec) -> None:
        """Turns them in place."""
        if self.used:
            self._k().copy_(turned_slots(self._k(), self._positions(), delta, rotary))

    def repeat_heads(self, times: int) -> None:
        """Turns each stored KV head into `times` equal heads; later tokens are repeated as they come in."""
        self.k = self._k().repeat_interleave(times, dim=1)
        self.v = self._v().repeat_interleave(times, dim=1)
        if self.positions.shape[1] > 1:
            self.positions = self._positions().repeat_interleave(times, dim=1)
        self.head_repeat *= times

    def take_rows(self, rows: torch.Tensor) -> None:
        """Copies whole buffers, idle slots included; does nothing before the first token."""
        if self.k is not None:
            rows = rows.to(self.k.device)
            self.k, self.v, self.positions = (x.index_select(0, rows) for x in (self.k, self.v, self.positions))

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Moves the end back by `tokens` slots, whatever `real` says: padding has slots too. Buffers stay as large."""
        self.used -= tokens

    def is_empty(self) -> bool:
        """Whether no slot is in use; after `crop` of all tokens the buffers are still there."""
        return self.used == self.first

    def append(self, step: Step) -> None:
        """Writes behind the slots in use; padding becomes holes. A full buffer grows by an eighth, at least by 8 slots.
        A first block's own tensors are taken over, not copied, unless they keep a larger storage alive."""
        k, v, positions = step.k, step.v, step.positions[:, None]
        if self.head_repeat > 1:
            k, v = (x.repeat_interleave(self.head_repeat, dim=1) for x in (k, v))
        self.holes = self.holes or step.padded
        if self.k is None or self.used == 0:
            # The first block is taken over as it is, without a copy, unless it is a view of something larger.
            self.k, self.v, self.positions = compact_storage(k), compact_storage(v), positions.clone()
            self.used = k.shape[2]
            return
        end = self._end_of(k.shape[2])
        self.k[:, :, self.used : end] = k
        self.v[:, :, self.used : end] = v
        self.positions[..., self.used : end] = positions
        self.used = end

    def _end_of(self, coming: int) -> int:
        """Where the slots in use end when so many tokens have come; makes room for them."""
        if self.first and self.used + coming > self.k.shape[2]:
            self._move_to_front()
        end = self.used + coming
        if end > self.k.shape[2]:
            # By an eighth: over a long answer each token is then moved nine times at most, and an eighth is the most
            # that idles.
            self._grow(end + max(8, end // 8))
        return end

    def _move_to_front(self) -> None:
        """To buffers with little room: the next time is when it is used up, if as many tokens leave as come."""
        n = self.slots
        room = max(8, n // 32)
        self.k, self.v = (F.pad(x, (0, 0, 0, room)) for x in (self._k(), self._v()))
        self.positions = F.pad(self._positions(), (0, room), value=-1)
        self.first, self.used = 0, n

    def _k(self) -> torch.Tensor:
        return self.k[:, :, self.first : self.used]

    def _v(self) -> torch.Tensor:
        return self.v[:, :, self.first : self.used]

    def _positions(self) -> torch.Tensor:
        return self.positions[..., self.first : self.used]

    def _valid(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        if not self.holes and hidden is None:
            return None
        valid = shown(self._positions(), hidden)
        return valid[:, 0] if valid.shape[1] == 1 else valid

    def _grow(self, capacity: int) -> None:
        """Moves to larger buffers; the new tail is zeroed because unseen memory may hold NaN."""
        slack = capacity - self.used
        self.k = F.pad(self._k(), (0, 0, 0, slack))
        self.v = F.pad(self._v(), (0, 0, 0, slack))
        self.positions = F.pad(self._positions(), (0, slack), value=-1)


def fills_rectangle(counts: torch.Tensor) -> bool:
    """Whether heads that keep `counts` tokens, int64 [batch, 1 or kv_heads], are better held as one rectangle.

    Every kernel reads that faster than ragged rows. Its missing slots are bytes too: more of them than would idle in
    the pages of a `RaggedSegment` are not worth it.
    """
    if not bool((counts == counts[:, :1]).all()):
        return False
    if not counts.numel():
        return True
    mean = float(counts.float().mean())
    return int(counts.max()) - mean <= max(8.0, mean / 8)
