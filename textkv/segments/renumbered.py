"""The renumbered segment: a dense rectangle whose tokens close ranks when tokens between them are dropped.

A kept token moves back by the rotary width of what was dropped before it, so text tokens sit at their cache slots (as
LaCache and StreamingLLM ask). Rotary scores depend on distances only, so a drop need not turn every key behind it:
those keys keep their true phase, only the keys in FRONT of the last drop are turned to their places, and for these the
query is turned back by the gap. A key is turned, and in bf16 rounded, when the last drop passes it, not at every drop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import decode_attention, merge, rotate
from textkv.segments.base import NewTokens
from textkv.segments.dense import DenseSegment


class RenumberedSegment(DenseSegment):
    """K and V in one rectangle each; which tokens are kept, and where they sit, is shared by the heads of a row.

    Args:
        inv_freq: rotary frequencies to renumber with; None leaves every key where it was.

    Attributes:
        rope: int32 [batch, slots], the rotary position at which each key sits (the temporal axis under M-RoPE, where
            every axis moves by the same width).
        gap: int64 [batch], rotary width dropped so far: the place of the next token is this far behind its position.
        front: per row, slots before the last drop. Their keys sit at their places, those behind at place + gap.
        ledger: per row, whole numbers of the method's own; they move with their rows.
    """

    def __init__(self, inv_freq: torch.Tensor | None = None) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        self.rope: torch.Tensor | None = None
        self.gap: torch.Tensor | None = None
        self.front: list[int] = []
        self.ledger: list[list[int]] = []

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not any(self.front):
            return super().extend(new, need_lse)
        self._append(new)
        return self._both(new.q, new.scale, causal=True)

    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return self._both(q, scale, causal=False) if any(self.front) else super().attend(q, scale)

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots `index` int64 [batch, 1, c]: ascending, with each row's newest token; -1 behind them = hole.

        Raises:
            ValueError: an index per KV head.
        """
        if index.shape[1] != 1:
            raise ValueError(f"index of shape {tuple(index.shape)}: heads of a renumbered layer keep the same tokens")
        if self.inv_freq is None:
            super().keep(index)
            return
        turn = self._renumber(index[:, 0])
        super().keep(index)
        moved = turn.any(0).nonzero()[:, 0].tolist()
        if moved:
            part = slice(moved[0], moved[-1] + 1)
            self.k[:, :, part] = rotate(self.k[:, :, part], turn[:, part], self.inv_freq)

    def places(self) -> torch.Tensor:
        """The place of each slot's token, int64 [batch, slots]; for text without padding this is 0, 1, 2, ..."""
        rope = self.rope[:, : self.used].long()
        return torch.where(self._in_front(), rope, rope - self.gap[:, None])

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {} if self.rope is None else {"rope": self.rope, "gap": self.gap, "inv_freq": self.inv_freq}
        return super().tensors() | own

    def take_rows(self, rows: torch.Tensor) -> None:
        super().take_rows(rows)
        picked = rows.tolist()
        self.front = [self.front[row] for row in picked]
        self.ledger = [list(self.ledger[row]) for row in picked] if self.ledger else []
        if self.rope is not None:
            rows = rows.to(self.rope.device)
            self.rope, self.gap = self.rope.index_select(0, rows), self.gap.index_select(0, rows)

    def _append(self, new: NewTokens) -> None:
        old = self.used
        super()._append(new)
        if not old:
            self.front = [0] * len(new.k)
        if self.inv_freq is None:
            return
        rope = new.positions if new.rope_positions is None else new.rope_positions
        if old:
            self.rope[:, old : self.used] = rope
        else:
            self.rope = rope.to(torch.int32, copy=True)
            self.gap = torch.zeros(len(rope), dtype=torch.int64, device=rope.device)

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        if self.rope is not None:
            self.rope = F.pad(self.rope[:, : self.used], (0, capacity - self.used))

    def _in_front(self) -> torch.Tensor:
        """bool [batch, slots]: the slots before the last drop."""
        front = torch.tensor(self.front, device=self.k.device)
        return torch.arange(self.used, device=self.k.device) < front[:, None]

    def _renumber(self, index: torch.Tensor) -> torch.Tensor:
        """Moves rope, gap and front on to the slots `index` [batch, c]; returns how far each kept key must turn."""
        hole, pick = index < 0, index.clamp(min=0)
        place = self.places().masked_fill(self.positions[:, 0, : self.used] < 0, _FAR)
        # A hole has no width of its own: it takes the place of the token behind it.
        place = place.flip(1).cummin(1).values.flip(1)
        behind = F.pad(pick[:, :-1] + 1, (1, 0)).clamp(max=self.used - 1)
        place, next_place = place.gather(1, pick), place.gather(1, behind)
        # The first token kept behind a drop takes the place of the first token dropped.
        closed = (place - next_place).masked_fill(hole, 0)
        width = closed.cumsum(1)
        column = torch.arange(index.shape[1], device=index.device)
        unmoved = (self._in_front().gather(1, pick) & ~hole).sum(1)
        front = torch.where(width[:, -1] > 0, ((closed > 0) * column).amax(1), unmoved)
        gap = self.gap + width[:, -1]
        phase = place - width + gap[:, None] * (column >= front[:, None])
        turn = (phase - self.rope.gather(1, pick)).masked_fill(hole, 0)
        self.rope, self.gap, self.front = phase.masked_fill(hole, 0).int(), gap, front.tolist()
        return turn

    def _both(self, q: torch.Tensor, scale: float, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the keys in front, with the query turned back by the gap, and over those behind."""
        first, last = min(self.front), max(self.front)
        ahead = behind = self._valid()
        if first != last:
            real, in_front = self.positions[:, 0, : self.used] >= 0, self._in_front()
            ahead, behind = real & in_front, real & ~in_front
        turned = rotate(q, -self.gap[:, None].expand(-1, q.shape[2]), self.inv_freq)
        old = decode_attention(
            turned, self._k()[:, :, :last], self._v()[:, :, :last], scale=scale, causal=False,
            valid=None if ahead is None else ahead[:, :last],
        )  # fmt: skip
        new = decode_attention(
            q, self._k()[:, :, first:], self._v()[:, :, first:], scale=scale, causal=causal,
            valid=None if behind is None else behind[:, first:],
        )  # fmt: skip
        return merge([old[0], new[0]], [old[1], new[1]])


_FAR = torch.iinfo(torch.int64).max
