"""The plan of one forward: which slots of the canvas are its queries, and where their logits stand in its output.

A plan has one of two forms. Where all rows compute the same slots it is a slice, and the model gets [batch, q]. Where
they differ (other windows, prompts of other lengths) it is packed: the queries of all rows stand behind one another in
a single row [1, T], so that neither padding nor filler is ever computed. Only attention sees rows again.

Cache policies make plans, the loop and the stored slots read them; nothing of either is known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlm.canvas import Canvas


@dataclass(frozen=True)
class Packing:
    """Entries of a [batch, L] table, row after row in one line of T.

    Attributes:
        rows, slots: int64 [T], where each entry stands in the table; slots of a row ascend.
        columns: int64 [T], the number of each entry within its row.
        grid: int64 [batch, width], the entries by row; a short row repeats its last one.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    grid: torch.Tensor

    @classmethod
    def of(cls, wanted: torch.Tensor, device: torch.device | None = None) -> Packing:
        """The entries that `wanted` bool [batch, L] names; at least one. On `device`, or where `wanted` is."""
        counts = wanted.sum(1)
        rows, slots = wanted.nonzero(as_tuple=True)
        starts = counts.cumsum(0) - counts
        columns = torch.arange(len(rows), device=wanted.device) - starts[rows]
        within = torch.arange(int(counts.max()), device=wanted.device)[None]
        # A row without entries points at any: nobody reads what is computed for it.
        grid = (starts[:, None] + torch.minimum(within, counts[:, None] - 1)).clamp(min=0, max=len(rows) - 1)
        return cls(*(x.to(device or wanted.device) for x in (rows, slots, columns, grid)))

    def __len__(self) -> int:
        return len(self.rows)

    def joined(self, other: Packing) -> Packing:
        """The entries of both, which share none, behind one another in every row."""
        return Packing(
            torch.cat([self.rows, other.rows]), torch.cat([self.slots, other.slots]),
            torch.cat([self.columns, other.columns + self.grid.shape[1]]),
            torch.cat([self.grid, other.grid + len(self)], 1),
        )  # fmt: skip

    def repeated(self, times: int) -> Packing:
        """The same entries in `times` batches, one behind the other."""
        batch, number = len(self.grid), torch.arange(times, device=self.rows.device)
        return Packing(
            self.rows.repeat(times) + number.repeat_interleave(len(self)) * batch,
            self.slots.repeat(times),
            self.columns.repeat(times),
            self.grid.repeat(times, 1) + number.repeat_interleave(batch)[:, None] * len(self),
        )

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The entries of x [batch, L, ..]: [1, T, ..]."""
        return x[self.rows, self.slots][None]

    def put(self, x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A copy of x [batch, L, ..] with `new` [1, T, ..] at the entries."""
        return x.index_put((self.rows, self.slots), new[0])

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Heads of a packed row, [1, heads, T, d], by rows: [batch, heads, width, d]."""
        return x[0][:, self.grid].transpose(0, 1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The way back from `spread`: [1, heads, T, d]."""
        return x[self.rows, :, self.columns].transpose(0, 1)[None]

    def store(self, table: torch.Tensor, x: torch.Tensor, base: int = 0) -> None:
        """Writes x [1, heads, T, d] into table [batch, heads, L - base, d], whose first slot is `base`, in place."""
        table[self.rows, :, self.slots - base] = x[0].transpose(0, 1)


class Plan:
    """The queries of one forward.

    Attributes:
        queries: slots computed anew: a slice that all rows share, or what each row has, packed.
        visible: bool [batch, n], slots that may be attended; None = all.
        tokens: rows that a layer computes, where they are not the queries (dLLM-Cache; elastic, which knows it after
            the forward); else None.
        value_tokens: rows whose values are projected besides (only dLLM-Cache).
        nodes: canvases of each row that this forward verifies, one behind the other; see `dlm.nodes`.
        stop: slots from here on are not read; None = all are. Whoever sets it has left out later blocks already.
    """

    def __init__(
        self,
        queries: slice | Packing,
        visible: torch.Tensor | None,
        tokens: int | None = None,
        value_tokens: int = 0,
        nodes: int = 1,
        stop: int | None = None,
    ) -> None:
        self.queries, self.visible, self.tokens, self.value_tokens = queries, visible, tokens, value_tokens
        self.nodes, self.stop = nodes, stop
        # A plan may serve many forwards: the places of packed queries for `rows`, and positions with what was picked.
        self._place: torch.Tensor | None = None
        self._positions: tuple[torch.Tensor, torch.Tensor] | None = None

    def causal(self, blocks: torch.Tensor) -> torch.Tensor:
        """bool [batch, q, L], slots that each query may attend where later blocks are hidden; `blocks` int64 [batch, L]
        are the numbers of the slots' blocks. Of packed queries q is the most that a row has."""
        if isinstance(self.queries, slice):
            own = blocks[:, self.queries]
        else:
            own = blocks[self.queries.rows, self.queries.slots][self.queries.grid]
        seen = blocks[:, None] <= own[..., None]
        return seen if self.visible is None else seen & self.visible[:, None]

    @property
    def packing(self) -> Packing | None:
        """The queries where they are packed."""
        return None if isinstance(self.queries, slice) else self.queries

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The queries' entries of x [batch, L]: [batch, q], or [1, T] packed."""
        return x[:, self.queries] if isinstance(self.queries, slice) else self.queries.take(x)

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """As `pick`; the same tensor for the same positions x [batch, L], which nobody writes in place."""
        if self._positions is None or self._positions[0] is not x:
            self._positions = x, self.pick(x)
        return self._positions[1]

    def rows(self, slots: torch.Tensor, length: int) -> torch.Tensor:
        """Where slots int64 [batch, r] of a canvas of `length` stand among the queries, in the model's form: [batch, r]
        or [1, batch * r]; any index for a slot that is negative or no query."""
        if isinstance(self.queries, slice):
            return (slots - self.queries.start).clamp(min=0)
        if self._place is None or self._place.shape != (len(slots), length):
            self._place = slots.new_zeros(len(slots), length)
            self._place[self.queries.rows, self.queries.slots] = torch.arange(len(self.queries), device=slots.device)
        return self._place.gather(1, slots.clamp(min=0)).view(1, -1)

    def wanted(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """The queries as bool [batch, length]."""
        table = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if isinstance(self.queries, slice):
            table[:, self.queries] = True
        else:
            table[self.queries.rows, self.queries.slots] = True
        return table

    def repeated(self, times: int) -> Plan:
        """The same plan for `times` batches, one behind the other (classifier-free guidance)."""
        queries = self.queries if self.packing is None else self.packing.repeated(times)
        visible = None if self.visible is None else self.visible.repeat(times, 1)
        return Plan(queries, visible, None if self.tokens is None else times * self.tokens, times * self.value_tokens,
                    stop=self.stop)  # fmt: skip


def window_plan(canvas: Canvas, low: torch.Tensor, high: torch.Tensor, kept: torch.Tensor | None = None) -> Plan:
    """A plan of one contiguous window [low, high) per row; int64 [batch] on the CPU.

    Args:
        kept: bool [batch, L] on the CPU, slots that are left where others are pruned (neither computed nor seen).
    """
    device, first = canvas.ids.device, torch.maximum(low, canvas.real_start_cpu)
    if kept is None:
        # The common case, all rows in the same block: a slice costs neither an index tensor nor a gather.
        if bool((first == first[0]).all() & (high == high[0]).all()):
            return Plan(slice(int(first[0]), int(high[0])), canvas.valid)
        kept = torch.ones(canvas.batch, canvas.length, dtype=torch.bool)
        visible = canvas.valid
    else:
        visible = kept.to(device) if canvas.valid is None else canvas.valid & kept.to(device)
    slots = torch.arange(canvas.length)[None]
    return Plan(Packing.of(kept & (slots >= first[:, None]) & (slots < high[:, None]), device), visible)


def index_plan(canvas: Canvas, queries: torch.Tensor, kept: torch.Tensor | None = None) -> Plan:
    """A plan of any slots, bool [batch, L] on the canvas's device; padding is left out. `kept` as in `window_plan`."""
    visible = canvas.valid
    if kept is not None:
        visible = kept.to(queries.device) if visible is None else visible & kept.to(queries.device)
    return Plan(Packing.of(queries if visible is None else queries & visible), visible)
