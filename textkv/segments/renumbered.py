"""The renumbered segment: a dense rectangle whose tokens close ranks when tokens between them are dropped.

A kept token moves back by the rotary width of what was dropped before it, to its cache position: for text, its index in
the cache (as LaCache and StreamingLLM ask). Rotary scores depend on distances only, so a drop need not turn every key
behind it: those keep their true phase, only the keys in FRONT of the last drop are turned to their cache positions, and
for these the query is rotated back by the gap. A key is turned, and in bf16 rounded, when the last drop passes it, not
at every drop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from textkv.kernels import decode_attention, merge
from textkv.positions import RotarySpec
from textkv.segments.base import Step, register_segment, shown
from textkv.segments.dense import DenseSegment

_FAR = torch.iinfo(torch.int64).max


@register_segment("renumbered")
class RenumberedSegment(DenseSegment):
    """K and V in one rectangle each; which tokens are kept, and where they sit, is shared by the heads of a row.

    Args:
        rotary: how keys turn, to renumber with; None leaves every key where it was.

    Attributes:
        rope: int32 [batch, slots], the rotary position at which each key sits (the temporal axis under M-RoPE, where
            every axis moves by the same width).
        gap: int64 [batch], rotary width dropped so far: rotary position of the next token minus its cache position.
        front: per row, slots before the last drop. Their keys sit at cache positions, those behind lie `gap` higher.
        row_state: per row, whole numbers of the method's own; they move with their rows.
    """

    def __init__(self, rotary: RotarySpec | None = None) -> None:
        super().__init__()
        self.rotary = rotary
        self.rope: torch.Tensor | None = None
        self.gap: torch.Tensor | None = None
        self.front: list[int] = []
        self.row_state: list[list[int]] = []

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass while no key lies in front of a drop; else two, merged: those in front see queries rotated back."""
        if not any(self.front):
            return super().attend(q, scale, softcap=softcap, hidden=hidden)
        return self._both(q, scale, softcap, hidden)

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots `index` int64 [batch, 1, c]: ascending, with each row's newest token; -1 behind them = hole.

        Raises:
            ValueError: an index per KV head.
        """
        if index.shape[1] != 1:
            raise ValueError(f"index of shape {tuple(index.shape)}: heads of a renumbered layer keep the same tokens")
        if self.rotary is None:
            super().keep(index)
            return
        # Cache positions are reckoned before the slots move, keys turned after it: only those that stay are turned.
        turn = self._renumber(index[:, 0])
        super().keep(index)
        moved = turn.any(0).nonzero()[:, 0].tolist()
        if moved:
            # One slice from the first to the last key that moves: a turn by 0 changes nothing, and a gather costs more.
            part = slice(moved[0], moved[-1] + 1)
            self.k[:, :, part] = self.rotary.turn(self.k[:, :, part], turn[:, part])

    def cache_positions(self) -> torch.Tensor:
        """The cache position of each slot's token, int64 [batch, slots]; for text without padding 0, 1, 2, ..."""
        rope = self.rope[:, : self.used].long()
        return torch.where(self._in_front(), rope, rope - self.gap[:, None])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of a dense segment; "rope" and "gap" once there are tokens, if keys are renumbered."""
        own = {} if self.rope is None else {"rope": self.rope, "gap": self.gap}
        return super().tensors() | own

    def state(self) -> dict:
        """All attributes, the rotary spec as "rotary.name"."""
        state = {name: x for name, x in self.__dict__.items() if name != "rotary"}
        return state | ({} if self.rotary is None else {f"rotary.{k}": x for k, x in self.rotary.state().items()})

    @classmethod
    def from_state(cls, state: dict) -> RenumberedSegment:
        """The segment with its rotary spec put together again from "rotary.name"."""
        rotary = {name.removeprefix("rotary."): x for name, x in state.items() if name.startswith("rotary.")}
        own = {name: x for name, x in state.items() if not name.startswith("rotary.")}
        return super().from_state(own | {"rotary": RotarySpec.from_state(rotary) if rotary else None})

    def take_rows(self, rows: torch.Tensor) -> None:
        """Takes the rows of `front`, `row_state`, `rope` and `gap` too."""
        super().take_rows(rows)
        picked = rows.tolist()
        self.front = [self.front[row] for row in picked]
        self.row_state = [list(self.row_state[row]) for row in picked] if self.row_state else []
        if self.rope is not None:
            rows = rows.to(self.rope.device)
            self.rope, self.gap = self.rope.index_select(0, rows), self.gap.index_select(0, rows)

    def append(self, step: Step) -> None:
        """Notes each new key's rotary position (the logical one if the step has none): it keeps its true phase."""
        old = self.used
        super().append(step)
        if not old:
            self.front = [0] * len(step.k)
        if self.rotary is None:
            return
        rope = step.positions if step.rope_positions is None else step.rope_positions
        if old:
            self.rope[:, old : self.used] = rope
        else:
            self.rope = rope.to(torch.int32, copy=True).expand(len(step.k), -1).contiguous()
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
        at = self.cache_positions().masked_fill(self.positions[:, 0, : self.used] < 0, _FAR)
        # A hole has no width of its own: it takes the position of the token behind it.
        at = at.flip(1).cummin(1).values.flip(1)
        behind = F.pad(pick[:, :-1] + 1, (1, 0)).clamp(max=self.used - 1)
        at, next_at = at.gather(1, pick), at.gather(1, behind)
        # The first token kept behind a drop takes the position of the first token dropped.
        closed = (at - next_at).masked_fill(hole, 0)
        width = closed.cumsum(1)
        column = torch.arange(index.shape[1], device=index.device)
        unmoved = (self._in_front().gather(1, pick) & ~hole).sum(1)
        front = torch.where(width[:, -1] > 0, ((closed > 0) * column).amax(1), unmoved)
        gap = self.gap + width[:, -1]
        phase = at - width + gap[:, None] * (column >= front[:, None])
        turn = (phase - self.rope.gather(1, pick)).masked_fill(hole, 0)
        self.rope, self.gap, self.front = phase.masked_fill(hole, 0).int(), gap, front.tolist()
        return turn

    def _both(
        self, q: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the keys in front, with the query rotated back by the gap, and over those behind."""
        first, last = min(self.front), max(self.front)
        ahead = behind = self._valid(hidden)
        # Rows were last cut at different slots: between the two edges each row needs a mask of its own.
        if first != last:
            real, in_front = shown(self._positions(), hidden)[:, 0], self._in_front()
            ahead, behind = real & in_front, real & ~in_front
        # Distances to keys in front are too large by what was dropped since they were turned.
        rotated_back = self.rotary.turn(q, -self.gap[:, None].expand(-1, q.shape[2]))
        parts = [
            decode_attention(
                query, self._k()[:, :, part], self._v()[:, :, part], scale=scale, softcap=softcap,
                valid=None if valid is None else valid[:, part],
            )
            for query, part, valid in ((rotated_back, slice(0, last), ahead), (q, slice(first, None), behind))
        ]  # fmt: skip
        return merge([out for out, _ in parts], [lse for _, lse in parts])
