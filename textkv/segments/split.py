"""The split segment: KV heads of one layer kept by different inner segments, each head wholly by one of them.

A unit is one KV head of one row; every unit belongs to one part, and a part sees its units as a batch of single-head
rows. So heads may be divided differently in each row, and any segment may serve as a part. Nothing in the model is
reordered: queries are picked by head on the way in, outputs are put back by head on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import merge
from textkv.segments.base import NewTokens, Segment, Stored
from textkv.segments.dense import DenseSegment
from textkv.segments.ring import RingSegment
from textkv.segments.stack import StackSegment


@dataclass
class Part:
    """Units kept alike: heads `head` of rows `row`, int64 [u] each, and the segment that holds them as a batch of u."""

    row: torch.Tensor
    head: torch.Tensor
    segment: Segment


class ChunkedRing(RingSegment):
    """A ring that reads a block densely: its queries see all that was cached before it and, causally, the whole block.

    So a stream of single tokens sees a strict window, and a prompt in one block sees everything (arXiv 2410.10819).
    """

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if new.q.shape[2] == 1:
            return super().extend(new, need_lse)
        first = self.k is None
        out, lse = DenseSegment().extend(new, need_lse=need_lse or not first)
        if not first:
            before, before_lse = self.attend(new.q, new.scale)
            out, lse = merge([before, out], [before_lse, lse])
        self.absorb(new)
        return out, lse


INNER: dict[str, type[Segment]] = {"dense": DenseSegment, "ring": ChunkedRing, "stack": StackSegment}
"""What a part may be, by the name under which it is saved."""


class SplitSegment(Segment):
    """KV heads divided over parts.

    Args:
        parts: together they hold every unit once; none is empty.
        batch: rows.
        kv_heads: KV heads of a row.
    """

    def __init__(self, parts: list[Part], batch: int, kv_heads: int) -> None:
        self.parts, self.batch, self.kv_heads = parts, batch, kv_heads

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        results = [part.segment.extend(self._share(new, part), need_lse) for part in self.parts]
        return self._join(new.q, results, need_lse)

    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        results = [part.segment.attend(self._queries(q, part), scale) for part in self.parts]
        return self._join(q, results, need_lse=True)

    def stored(self) -> Stored:
        held = [part.segment.stored() for part in self.parts]
        shape = (self.batch, self.kv_heads, max(x.keys.shape[2] for x in held))
        keys, values = (x.new_zeros(*shape, x.shape[-1]) for x in (held[0].keys, held[0].values))
        positions = held[0].positions.new_full(shape, -1)
        for part, x in zip(self.parts, held, strict=True):
            n = x.keys.shape[2]
            keys[part.row, part.head, :n], values[part.row, part.head, :n] = x.keys[:, 0], x.values[:, 0]
            positions[part.row, part.head, :n] = x.positions[:, 0]
        return Stored(keys, values, positions)

    def lengths(self) -> torch.Tensor:
        table = torch.zeros(self.batch, self.kv_heads, dtype=torch.int64)
        for part in self.parts:
            # A part that has seen nothing yet does not even know its batch.
            if part.segment.tensors():
                table[part.row.cpu(), part.head.cpu()] = part.segment.lengths()[:, 0]
        return table

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {}
        for i, part in enumerate(self.parts):
            own = {"row": part.row, "head": part.head} | part.segment.tensors()
            held |= {f"{i}.{name}": x for name, x in own.items()}
        return held

    def take_rows(self, rows: torch.Tensor) -> None:
        parts = []
        for part in self.parts:
            row, old = (rows.to(part.row.device)[:, None] == part.row).nonzero(as_tuple=True)
            if len(old):
                part.segment.take_rows(old)
                parts.append(Part(row, part.head[old], part.segment))
        self.parts, self.batch = parts, len(rows)

    def crop(self, tokens: int) -> None:
        for part in self.parts:
            part.segment.crop(tokens)

    def state(self) -> dict:
        state = {"batch": self.batch, "kv_heads": self.kv_heads, "kinds": []}
        for i, part in enumerate(self.parts):
            state["kinds"].append(next(name for name, cls in INNER.items() if type(part.segment) is cls))
            own = {"row": part.row, "head": part.head} | part.segment.state()
            state |= {f"{i}.{name}": x for name, x in own.items()}
        return state

    @classmethod
    def from_state(cls, state: dict) -> SplitSegment:
        parts = []
        for i, kind in enumerate(state["kinds"]):
            own = {name.removeprefix(f"{i}."): x for name, x in state.items() if name.startswith(f"{i}.")}
            parts.append(Part(own.pop("row"), own.pop("head"), INNER[kind].from_state(own)))
        return cls(parts, state["batch"], state["kv_heads"])

    def _queries(self, q: torch.Tensor, part: Part) -> torch.Tensor:
        """[batch, heads, m, head_dim] -> [u, group, m, head_dim]."""
        return q.unflatten(1, (self.kv_heads, -1))[part.row, part.head]

    def _share(self, new: NewTokens, part: Part) -> NewTokens:
        row, head = part.row, part.head
        rope = None if new.rope_positions is None else new.rope_positions[row]
        return NewTokens(
            self._queries(new.q, part), new.k[row, head][:, None], new.v[row, head][:, None], new.positions[row],
            new.scale, new.padded, rope,
        )  # fmt: skip

    def _join(
        self, q: torch.Tensor, results: list[tuple[torch.Tensor, torch.Tensor | None]], need_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parts' [u, group, m, ..] put back as [batch, heads, m, ..]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format).unflatten(1, (self.kv_heads, -1))
        lse = q.new_empty(out.shape[:-1], dtype=torch.float32) if need_lse else None
        for part, (own, own_lse) in zip(self.parts, results, strict=True):
            out[part.row, part.head] = own
            if need_lse:
                lse[part.row, part.head] = own_lse
        return out.flatten(1, 2), None if lse is None else lse.flatten(1, 2)


def dense_part(held: Stored, row: torch.Tensor, head: torch.Tensor) -> DenseSegment:
    """A dense segment of heads `head` of rows `row` (int64 [u] each) of `held`: copies, without idle columns."""
    keys, values, positions = (x[row, head][:, None] for x in (held.keys, held.values, held.positions))
    real = positions >= 0
    used = real.any(0)[0]
    if not bool(used.all()):
        keys, values, positions, real = (x[:, :, used] for x in (keys, values, positions, real))
    return DenseSegment.from_state(
        {
            "k": keys, "v": values, "positions": positions, "used": positions.shape[-1],
            "holes": not bool(real.all()), "head_repeat": 1,
        }
    )  # fmt: skip


def ring_part(
    held: Stored, row: torch.Tensor, head: torch.Tensor, sinks: int, recent: torch.Tensor, scale: float
) -> ChunkedRing:
    """A ring that holds the first `sinks` and last `recent` (int64 [u]) tokens of heads `head` of rows `row`."""
    ring = ChunkedRing(sinks, recent)
    keys, values = held.keys[row, head][:, None], held.values[row, head][:, None]
    ring.absorb(NewTokens(keys[:, :, :0], keys, values, held.positions[row, head], scale))
    return ring
