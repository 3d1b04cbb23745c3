"""The split segment: KV heads of one layer kept by different inner segments, each head wholly by one of them.

A unit is one KV head of one row; every unit belongs to one part, and a part sees its units as a batch of single-head
rows. So heads may be divided differently in each row, and any segment may serve as a part. Nothing in the model is
reordered: queries are picked by head on the way in, outputs are put back by head on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from textkv.kernels import merge
from textkv.segments.base import (
    Segment,
    Step,
    Stored,
    block_attention,
    joined_states,
    parted_states,
    register_segment,
)
from textkv.segments.dense import DenseSegment
from textkv.segments.ring import RingSegment


@dataclass
class Part:
    """Units kept alike: heads `head` of rows `row`, int64 [u] each, and the segment that holds them as a batch of u."""

    row: torch.Tensor
    head: torch.Tensor
    segment: Segment


@register_segment("chunked_ring")
class ChunkedRing(RingSegment):
    """A ring that reads a block densely: its queries see all that was cached before it and, causally, the whole block.

    So a stream of single tokens sees a strict window, and a prompt in one block sees everything (arXiv 2410.10819).
    """

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A single token sees a ring's window; a block sees what was cached and, causally, all of itself."""
        if step.q.shape[2] == 1:
            return super().extend(step, need_lse)
        first = self.is_empty()
        out, lse = block_attention(step, need_lse=need_lse or not first)
        if not first:
            before = self.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden)
            out, lse = merge([before[0], out], [before[1], lse])
        self.append(step)
        return out, lse


@register_segment("split")
class SplitSegment(Segment):
    """KV heads divided over parts.

    Args:
        parts: together they hold every unit once; none is empty.
        batch: rows.
        kv_heads: KV heads of a row.
    """

    def __init__(self, parts: list[Part], batch: int, kv_heads: int) -> None:
        self.parts, self.batch, self.kv_heads = parts, batch, kv_heads

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every part extends by its own units' share; outputs are put back in the model's order of heads."""
        results = [part.segment.extend(self._share(step, part), need_lse) for part in self.parts]
        return self._join(step.q, results, need_lse)

    def append(self, step: Step) -> None:
        """Every part stores its own units' keys and values."""
        for part in self.parts:
            part.segment.append(self._share(step, part))

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every part answers its own units' queries [units, group, m, head_dim], with the `hidden` of their rows."""
        results = [
            part.segment.attend(
                self._queries(q, part), scale, softcap=softcap, hidden=None if hidden is None else hidden[part.row]
            )
            for part in self.parts
        ]
        return self._join(q, results, need_lse=True)

    def is_empty(self) -> bool:
        """Whether all parts are."""
        return all(part.segment.is_empty() for part in self.parts)

    def keep(self, index: torch.Tensor) -> None:
        """Every part keeps its own units' slots; columns of `index` where it keeps nothing are left out."""
        index = index.expand(-1, self.kv_heads, -1)
        for part in self.parts:
            # Every part sees its units as single-head rows, and so its share of the index.
            own = index[part.row, part.head][:, None]
            # Slots are counted to the longest part; what this one has not is nobody's.
            own = own.masked_fill(own >= part.segment.held_positions().shape[2], -1)
            used = (own >= 0).flatten(0, 1).any(0)
            part.segment.keep(own[..., used])

    def stored(self) -> Stored:
        """A copy padded to the longest part."""
        held = [part.segment.stored() for part in self.parts]
        shape = (self.batch, self.kv_heads, max(x.keys.shape[2] for x in held))
        keys, values = (x.new_zeros(*shape, x.shape[-1]) for x in (held[0].keys, held[0].values))
        positions = held[0].positions.new_full(shape, -1)
        for part, x in zip(self.parts, held, strict=True):
            n = x.keys.shape[2]
            # Shorter parts leave holes behind their tokens: one rectangle for scoring, not for keeping.
            keys[part.row, part.head, :n], values[part.row, part.head, :n] = x.keys[:, 0], x.values[:, 0]
            positions[part.row, part.head, :n] = x.positions[:, 0]
        return Stored(keys, values, positions)

    def lengths(self) -> torch.Tensor:
        """Put together from the parts; 0 for units to which nothing ever came."""
        table = torch.zeros(self.batch, self.kv_heads, dtype=torch.int64)
        for part in self.parts:
            # A part that has seen nothing yet does not even know its batch.
            if part.segment.tensors():
                table[part.row.cpu(), part.head.cpu()] = part.segment.lengths()[:, 0]
        return table

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of each part and its "row" and "head", int64 [units], by "number.name"; never empty."""
        held = {}
        for i, part in enumerate(self.parts):
            own = {"row": part.row, "head": part.head} | part.segment.tensors()
            held |= {f"{i}.{name}": x for name, x in own.items()}
        return held

    def take_rows(self, rows: torch.Tensor) -> None:
        """Each part takes the units of the new rows; a part that has none of them is dropped."""
        parts = []
        for part in self.parts:
            # A row may come twice or not at all: each new row takes the units of the old one it copies.
            row, old = (rows.to(part.row.device)[:, None] == part.row).nonzero(as_tuple=True)
            if len(old):
                part.segment.take_rows(old)
                parts.append(Part(row, part.head[old], part.segment))
        self.parts, self.batch = parts, len(rows)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Every part forgets them, each unit by its row's `real`."""
        for part in self.parts:
            part.segment.crop(tokens, None if real is None else real[part.row.cpu()])

    def state(self) -> dict:
        """States of the parts joined, each with its "row" and "head", and `batch` and `kv_heads`."""
        units = {}
        for i, part in enumerate(self.parts):
            units |= {f"{i}.row": part.row, f"{i}.head": part.head}
        own = {"batch": self.batch, "kv_heads": self.kv_heads}
        return own | joined_states([part.segment for part in self.parts]) | units

    @classmethod
    def from_state(cls, state: dict) -> SplitSegment:
        """The parts, each of its own kind, with their rows and heads."""
        segments = parted_states(state, extra=("row", "head"))
        parts = [Part(state[f"{i}.row"], state[f"{i}.head"], segment) for i, segment in enumerate(segments)]
        return cls(parts, state["batch"], state["kv_heads"])

    def _queries(self, q: torch.Tensor, part: Part) -> torch.Tensor:
        """[batch, heads, m, head_dim] -> [u, group, m, head_dim]."""
        return q.unflatten(1, (self.kv_heads, -1))[part.row, part.head]

    def _share(self, step: Step, part: Part) -> Step:
        row, head = part.row, part.head
        rope, hidden, ids = (None if x is None else x[row] for x in (step.rope_positions, step.hidden, step.ids))
        visible = step.visible if step.visible is None or len(step.visible) == 1 else step.visible[row]
        return replace(
            step, q=self._queries(step.q, part), k=step.k[row, head][:, None], v=step.v[row, head][:, None],
            positions=step.positions[row], rope_positions=rope, hidden=hidden, visible=visible, ids=ids,
        )  # fmt: skip

    def _join(
        self, q: torch.Tensor, results: list[tuple[torch.Tensor, torch.Tensor | None]], need_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parts' [u, group, m, ..] put back as [batch, heads, m, ..]."""
        # Every head belongs to exactly one part, so that all of this is written.
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
    used = (positions >= 0).any(0)[0]
    if not bool(used.all()):
        # Columns that no unit of this part uses would be bytes held for nothing.
        keys, values, positions = (x[:, :, used] for x in (keys, values, positions))
    return DenseSegment.of(Stored(keys, values, positions))


def ring_part(
    held: Stored, row: torch.Tensor, head: torch.Tensor, sinks: int, recent: torch.Tensor, scale: float
) -> ChunkedRing:
    """A ring that holds the first `sinks` and last `recent` (int64 [u]) tokens of heads `head` of rows `row`."""
    ring = ChunkedRing(sinks, recent)
    ring.take(Stored(*(x[row, head][:, None] for x in (held.keys, held.values, held.positions))), scale)
    return ring
