"""The ring segment: the first `sinks` tokens and the last `recent` ones of each row, in constant memory.

A new token overwrites the slot of the oldest; nothing else moves. With a rotary spec the gap between sinks and ring is
closed as StreamingLLM asks (arXiv 2309.17453): rotary scores depend on distances only, so recent keys are right as
they are, and for the sinks the QUERY is rotated back by the width of the gap (no key is ever rotated again).

As long as all rows are of one length and nothing was padded or forgotten, the host knows every slot by arithmetic and
asks the device nothing; `even` is that length. Else slots are found by the positions that they hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from textkv.kernels import decode_attention, merge
from textkv.kernels.merge import joined
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Step, Stored, register_segment, shown

QUERY_BLOCK = 128
"""Rows per step of the banded prompt attention: bounds its memory to QUERY_BLOCK x (recent + QUERY_BLOCK)."""
_FAR = torch.iinfo(torch.int32).max
_TENSORS = ("k", "v", "positions", "end", "rope", "gap_start")


@register_segment("ring")
class RingSegment(Segment):
    """Sinks in the first slots, the ring behind them; positions are shared by the heads of a row.

    Args:
        sinks: tokens kept from each row's start, S >= 0.
        recent: int64 [batch], tokens kept from each row's end, R >= 1. A step still sees R + 1 of them: the oldest
            leaves after it, as in the authors' evaluation.
        rotary: how keys turn, to close the gap with; None leaves original positions.
    """

    def __init__(self, sinks: int, recent: torch.Tensor, rotary: RotarySpec | None = None) -> None:
        self.sinks, self.recent, self.rotary = sinks, recent, rotary
        # Fixed for good: a slot is a position modulo this size, also when the row with the largest window leaves.
        self.size = int(recent.max()) + 1
        self.even: int | None = 0 if bool((recent == recent[0]).all()) else None
        # Nothing is allocated yet: keys tell dtype, heads and device only when the first tokens come.
        self.k: torch.Tensor | None = None
        self.rope: torch.Tensor | None = None
        self.gap_start: torch.Tensor | None = None

    # ---- taking in ---------------------------------------------------------------------------------------------

    def is_empty(self) -> bool:
        """Whether no token ever came: the ring keeps its memory when all have left."""
        return self.k is None

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A block's queries see the sinks and `recent` tokens back; one token sees itself and `recent` older ones. The
        log-sum-exp is always given."""
        if self.k is None:
            self._allocate(step.k, step.v)
        if step.q.shape[2] > 1:
            self._write_sinks(step)
            # Before the block is written: that would overwrite what its early queries still see.
            out = self._banded(step)
            self.append(step)
            return out
        # One token sees itself and `recent` older ones: the oldest of these still needs its slot during this step.
        self._store(step, spare=1)
        out = self._attend(step.q, step.scale, step.softcap, step.hidden, within=True)
        self._trim()
        return out

    def append(self, step: Step) -> None:
        """Writes only the sinks and the last `recent` tokens of each row; padding has no slot."""
        if self.k is None:
            self._allocate(step.k, step.v)
        self._store(step, spare=0)
        self._trim()

    def take(self, held: Stored, scale: float, rope_positions: torch.Tensor | None = None) -> None:
        """Takes over tokens that another segment held: of each row the sinks and the last `recent`."""
        at = held.positions[:, 0]
        # Only a row without a hole, from its first token on, lets the host know all slots.
        whole = bool((at == torch.arange(at.shape[1], device=at.device)).all())
        # A step without queries: only its keys and values are of interest.
        nothing = held.keys[:, :, :0]
        self.append(Step(nothing, held.keys, held.values, at, scale, padded=not whole, rope_positions=rope_positions))

    def _store(self, step: Step, spare: int) -> None:
        """Writes sinks and the last recent + spare of the others; what the window left behind is overwritten."""
        m = step.k.shape[2]
        if self.even is not None and not step.padded:
            start, self.even = self.even, self.even + m
            if self.rope is not None and start <= self.sinks < self.even:
                # The token right behind the sinks tells where the gap begins; it is seen once, and leaves the ring
                # later.
                self.gap_start = self._rope_of(step)[:, self.sinks - start].to(torch.int32)
            self._write_even(step, start, spare)
            return
        self._uneven()
        # The first `sinks` tokens of a row keep their slots for good; the ring starts behind them.
        self._write_sinks(step)
        end = torch.maximum(self.end, step.positions.amax(1).long() + 1)
        keep = (step.positions >= self.sinks) & (step.positions >= (end - self._recent() - spare)[:, None])
        self._room(int(end.max()) - self.sinks)
        # Rows differ in their slots, so that tokens are scattered one by one instead of in runs.
        row, column = keep.nonzero(as_tuple=True)
        slot = self.sinks + (step.positions[row, column].long() - self.sinks) % self.size
        self._scatter(step, row, column, slot)
        self.end = end

    def _write_even(self, step: Step, start: int, spare: int) -> None:
        """Columns of a step whose first token has position `start`, in runs of neighbouring slots."""
        behind = min(self.even, max(start, self.sinks))
        if behind > start:
            self._put(start, step, 0, behind - start)
        # Of a block longer than the window only its end is worth writing.
        begin = max(behind, self.even - (self.size - 1) - spare)
        self._room(self.even - self.sinks)
        while begin < self.even:
            slot = self._slot(begin)
            # A run ends at the end of the buffer and goes on at the ring's first slot.
            count = min(self.even - begin, self.sinks + self.size - slot)
            self._put(slot, step, begin - start, count)
            begin += count

    def _slot(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.size

    def _put(self, slot: int, step: Step, column: int, count: int) -> None:
        """Columns of the step into neighbouring slots."""
        into, of = slice(slot, slot + count), slice(column, column + count)
        self.k[:, :, into] = step.k[:, :, of]
        self.v[:, :, into] = step.v[:, :, of]
        self.positions[:, into] = step.positions[:, of]
        if self.rope is not None:
            self.rope[:, into] = self._rope_of(step)[:, of]

    def _scatter(self, step: Step, row: torch.Tensor, column: torch.Tensor, slot: torch.Tensor) -> None:
        self.k[row, :, slot] = step.k[row, :, column]
        self.v[row, :, slot] = step.v[row, :, column]
        self.positions[row, slot] = step.positions[row, column]
        if self.rope is not None:
            self.rope[row, slot] = self._rope_of(step)[row, column].to(torch.int32)

    def _write_sinks(self, step: Step) -> None:
        """The sinks among the tokens of a step, and the rotary position right behind them: where the ring would start
        if nothing had left."""
        if self.even is not None and not step.padded and self.even > self.sinks:
            return
        row, column = ((step.positions >= 0) & (step.positions < self.sinks)).nonzero(as_tuple=True)
        self._scatter(step, row, column, step.positions[row, column].long())
        if self.rope is not None:
            row, column = (step.positions == self.sinks).nonzero(as_tuple=True)
            self.gap_start[row] = self._rope_of(step)[row, column].to(torch.int32)

    def _trim(self) -> None:
        """Lets go of what has left the window: its slot is the next to be written."""
        if self.even is None:
            # Each row has a window of its own, so that each drops by its own end.
            gone = self.positions[:, self.sinks :] < (self.end - self._recent())[:, None]
            self.positions[:, self.sinks :].masked_fill_(gone, -1)
        elif self.even >= self.sinks + self.size:
            self.positions[:, self._slot(self.even)] = -1

    def _uneven(self) -> None:
        """From now on rows differ: what the host knew goes to the device."""
        if self.even is not None:
            self.end.fill_(self.even)
            self.even = None

    def _allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        batch, slots = len(k), self.sinks + 1
        self.k, self.v = (x.new_zeros(batch, x.shape[1], slots, x.shape[3]) for x in (k, v))
        self.positions = torch.full((batch, slots), -1, dtype=torch.int32, device=k.device)
        self.end = torch.zeros(batch, dtype=torch.int64, device=k.device)
        if self.rotary is not None:
            self.rope = self.positions.clone()
            self.gap_start = torch.full((batch,), -1, dtype=torch.int32, device=k.device)

    def _room(self, needed: int) -> None:
        """Grows the ring up to its final size; before it wraps, a token's slot does not depend on the size."""
        have = self.k.shape[2] - self.sinks
        if needed <= have or have == self.size:
            return
        # By an eighth at a time, as all growing segments: a short answer need not pay for the whole window.
        more = min(self.size, needed + max(8, needed // 8)) - have
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.positions = F.pad(self.positions, (0, more), value=-1)
        self.rope = None if self.rope is None else F.pad(self.rope, (0, more), value=-1)

    # ---- attending ---------------------------------------------------------------------------------------------

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass if nothing can have left between sinks and ring, or keys are not renumbered; else two, merged, with
        queries rotated back for the sinks."""
        return self._attend(q, scale, softcap, hidden, within=False)

    def _attend(
        self, q: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None, within: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`within` a step the slot that is written next still holds the oldest token."""
        used, valid = self._visible(hidden, within)
        how = {"scale": scale, "softcap": softcap}
        # Without a gap all distances are true, and one pass reads everything.
        if self.rotary is None or not self.sinks or not self._has_gap():
            return decode_attention(q, self.k[:, :, :used], self.v[:, :, :used], valid=valid, **how)
        parts = []
        back = self._rotated_back(q, hidden, within)
        for query, part in ((back, slice(0, self.sinks)), (q, slice(self.sinks, used))):
            seen = None if valid is None else valid[:, part]
            parts.append(decode_attention(query, self.k[:, :, part], self.v[:, :, part], valid=seen, **how))
        if valid is None and not q.is_cuda:
            # Two parts that both saw a token need none of the guards of `merge`, which cost more than the sum itself.
            return joined(parts[0][0], parts[1][0], parts[0][1], parts[1][1])
        return merge([out for out, _ in parts], [lse for _, lse in parts])

    def _visible(self, hidden: torch.Tensor | None, within: bool) -> tuple[int, torch.Tensor | None]:
        """Slots in use, and which of them hold a token (None = all)."""
        slots = self.k.shape[2]
        if self.even is None or hidden is not None:
            return slots, shown(self.positions[:, None], hidden)[:, 0]
        if self.even < slots:
            return self.even, None
        # A full ring has no empty slot while the step runs; after it, one waits for the next token.
        return slots, None if within else self.positions >= 0

    def _has_gap(self) -> bool:
        """Whether anything can lie between the sinks and the ring."""
        return self.even is None or self.even > self.sinks + self.size - 1

    def _rotated_back(self, q: torch.Tensor, hidden: torch.Tensor | None, within: bool) -> torch.Tensor:
        """The queries, each rotated back by the gap of its row."""
        if within and self.even is not None and hidden is None and q.shape[2] == 1:
            # The oldest token of a full ring lies where the next one will be written.
            first = self.rope[:, self._slot(self.even) : self._slot(self.even) + 1]
            return self.rotary.turn_query(q, self.gap_start[:, None] - first)
        # Rows differ: the oldest token of each is looked for.
        held = self.positions[:, self.sinks :] >= 0
        first = self.rope[:, self.sinks :].masked_fill(~held, _FAR).amin(1, keepdim=True)
        return self.rotary.turn(q, -self._gap(first).expand(-1, q.shape[2]))

    def _gap(self, first_rope: torch.Tensor) -> torch.Tensor:
        """Rotary width between the sinks and the first recent token that a query sees: [batch, m]."""
        gap = (first_rope - self.gap_start[:, None]).clamp(min=0)
        return gap.masked_fill((first_rope == _FAR) | (self.gap_start < 0)[:, None], 0)

    def _banded(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's queries over sinks, ring and the block itself, each seeing at most `recent` tokens back."""
        ring = slice(self.sinks, None)
        k, v = (torch.cat([x[:, :, ring], new], 2) for x, new in ((self.k, step.k), (self.v, step.v)))
        positions = torch.cat([self.positions[:, ring], step.positions], 1)
        rope = positions
        if self.rope is not None:
            rope = torch.cat([self.rope[:, ring], self._rope_of(step).to(torch.int32)], 1)
        # Keys of the ring come in the order of slots, not of time: the band below goes by positions.
        old, widest = self.k.shape[2] - self.sinks, self.size - 1
        outs, lses = [], []
        for start in range(0, step.q.shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, step.q.shape[2])
            first = 0 if start <= widest else old + start - widest
            # What is seen both ways (the tokens of an image) may lie behind the query.
            cols = slice(first, old + (stop if step.visible is None else step.k.shape[2]))
            part = k[:, :, cols], v[:, :, cols], positions[:, cols], rope[:, cols]
            out, lse = self._rows(step, slice(start, stop), max(0, first - old), *part)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _rows(
        self,
        step: Step,
        rows: slice,
        skipped: int,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        rope: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some queries of a step over keys that end with those of the step, but for its first `skipped` ones."""
        q, at = step.q[:, :, rows], step.positions[:, rows, None].long()
        # Sinks are attended to by a part of their own, so the band leaves them out.
        key, limit = positions[:, None].long(), self._recent()[:, None, None]
        before = key <= at
        if step.visible is not None:
            seen = step.visible[:, rows, skipped:]
            before = torch.cat([before[..., : before.shape[-1] - seen.shape[-1]], seen.expand(len(q), -1, -1)], -1)
        band = (key >= self.sinks) & before & (at - key <= limit)
        band &= shown(positions[:, None], step.hidden)
        sink_at = self.positions[:, None, : self.sinks]
        seen = shown(sink_at, step.hidden) & (sink_at <= at if step.visible is None else self._sinks_seen(step, rows))
        query = q
        if self.rope is not None:
            first = rope[:, None].expand_as(band).masked_fill(~band, _FAR).amin(-1)
            query = self.rotary.turn(q, -self._gap(first))
        sinks = decode_attention(
            query, self.k[:, :, : self.sinks], self.v[:, :, : self.sinks], scale=step.scale, visible=seen,
            softcap=step.softcap,
        )  # fmt: skip
        near = decode_attention(q, k, v, scale=step.scale, visible=band, softcap=step.softcap)
        return merge([sinks[0], near[0]], [sinks[1], near[1]]) if self.sinks else near

    def _sinks_seen(self, step: Step, rows: slice) -> torch.Tensor:
        """Which sinks some queries see by the step's own mask, bool [batch, rows, sinks]; all that were here before."""
        # A sink that came with this block is seen as the block's mask says; an older one by every query.
        among = self.positions[:, : self.sinks, None] == step.positions[:, None]
        looked = step.visible[:, rows].float() @ among.float().mT > 0
        return looked | ~among.any(-1)[:, None]

    # ---- the rest ----------------------------------------------------------------------------------------------

    def keep(self, index: torch.Tensor) -> None:
        """As every segment's `keep`. A ring's memory is constant: slots of tokens that go are masked until they are
        written again.

        Raises:
            ValueError: an index per KV head: the heads of a row share their positions.
        """
        if index.shape[1] != 1 and bool((index != index[:, :1]).any()):
            raise ValueError(f"index of shape {tuple(index.shape)}: the heads of a ring keep the same tokens")
        self._uneven()
        # `stored` shows tokens in the order of time, slots are in the order of the ring.
        order, kept = self._order(), index[:, 0]
        stays = torch.zeros_like(self.positions, dtype=torch.bool)
        slots = order.gather(1, kept.clamp(min=0))
        # A row with fewer kept tokens names slot 0 besides: adding tells whether anybody really wants it.
        wanted = torch.zeros_like(self.positions).scatter_add(1, slots, (kept >= 0).to(torch.int32))
        stays |= wanted > 0
        self.positions = self.positions.masked_fill(~stays, -1)

    def stored(self) -> Stored:
        """A copy in the order of time, slots without a token last."""
        heads, order = self.k.shape[1], self._order()
        pick = order[:, None, :, None].expand(-1, heads, -1, self.k.shape[-1])
        at = self.positions.gather(1, order)[:, None].expand(-1, heads, -1)
        return Stored(self.k.gather(2, pick), self.v.gather(2, pick), at)

    def _order(self) -> torch.Tensor:
        """Slots by position, empty ones last: int64 [batch, slots]."""
        return self.positions.masked_fill(self.positions < 0, _FAR).sort(dim=1, stable=True).indices

    def lengths(self) -> torch.Tensor:
        """The same for all heads; zeros [batch, 1] before the first token, when heads are not known."""
        if self.k is None:
            return torch.zeros(len(self.recent), 1, dtype=torch.int64)
        count = (self.positions >= 0).sum(1)
        return count[:, None].expand(-1, self.k.shape[1]).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        """In the order of slots: "k" and "v" [batch, kv_heads, slots, head_dim], "positions" int32 [batch, slots],
        "end" int64 [batch], and with a rotary spec "rope" int32 [batch, slots] and "gap_start" int32 [batch]."""
        if self.k is None:
            return {}
        return {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}

    def state(self) -> dict:
        """The tensors, `sinks`, `recent`, `size` and `even`, and the rotary spec as "rotary.name"."""
        plain = {"sinks": self.sinks, "recent": self.recent, "size": self.size, "even": self.even}
        rotary = {} if self.rotary is None else {f"rotary.{name}": x for name, x in self.rotary.state().items()}
        return self.tensors() | plain | rotary

    @classmethod
    def from_state(cls, state: dict) -> RingSegment:
        """The ring with its own `size`, which rows that have left may have made larger than `recent` says."""
        rotary = {name.removeprefix("rotary."): x for name, x in state.items() if name.startswith("rotary.")}
        segment = cls(state["sinks"], state["recent"].cpu(), RotarySpec.from_state(rotary) if rotary else None)
        segment.size, segment.even = state["size"], state["even"]
        for name in _TENSORS:
            if name in state:
                setattr(segment, name, state[name])
        return segment

    def take_rows(self, rows: torch.Tensor) -> None:
        """Takes the rows of `recent` too; `size` stays, since slots are reckoned with it."""
        self.recent = self.recent[rows.cpu()]
        for name, x in self.tensors().items():
            setattr(self, name, x.index_select(0, rows.to(x.device)))

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Raises ValueError unless `tokens` is 0."""
        if tokens:
            raise ValueError("a ring overwrites its oldest tokens and cannot give them back")

    def _recent(self) -> torch.Tensor:
        return self.recent.to(self.k.device)

    @staticmethod
    def _rope_of(step: Step) -> torch.Tensor:
        return step.positions if step.rope_positions is None else step.rope_positions
