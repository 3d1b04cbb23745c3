"""Evidence of a prompt block, gathered chunk by chunk while it runs, and only what a method asked for.

Queries are the true ones, after norms and rotary embedding, taken where the model hands them to attention. Hidden
states are kept as row norms, and whole only in screenshots. All is dropped as soon as the method's hook has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from textkv.evidence import Evidence, Needs
from textkv.kernels import window_mass
from textkv.positions import RotarySpec
from textkv.query_statistics import QueryCentres, QueryMoments
from textkv.screens import Grids, ScreenStates, Spans
from textkv.segments.base import Step, Stored, shown
from textkv.softmax import Softmax

_BLOCK = 4096  # queries that are turned back at a time: a long prompt's fp32 copy would weigh as much as its keys
_ENTRIES = 1 << 24  # weights that are held at a time


class EvidenceCollector:
    """Collects one layer's evidence over the chunks of a prompt block."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.clear()

    def clear(self) -> None:
        """Forgets everything collected."""
        self._queries: torch.Tensor | None = None
        self._norms: list[torch.Tensor] = []
        self._states: list[ScreenStates] = []
        self._positions: list[torch.Tensor] = []
        self._rope: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._sampled: list[torch.Tensor] = []
        self._sampled_at: list[torch.Tensor] = []
        self._columns: torch.Tensor | None = None
        self._moments: QueryMoments | None = None
        self._centres: QueryCentres | None = None
        self._peaks: torch.Tensor | None = None
        self._came: torch.Tensor | int = 0
        self._before: tuple[int, dict] | None = None

    def take(
        self,
        step: Step,
        held: Callable[[], Stored],
        *,
        hidden: torch.Tensor | None = None,
        spans: Spans | None = None,
        rotary: RotarySpec | None = None,
        lse: torch.Tensor | None = None,
        spare: int = 0,
    ) -> None:
        """One chunk of the block.

        Args:
            held: gives what the layer stores, the chunk included.
            hidden: [batch, m, hidden_size], the hidden states that were asked for.
            spans: where the screenshots lie.
            rotary: how the layer's keys turn, if asked for.
            lse: fp32 [batch, heads, m], the log-sum-exp of what the chunk's queries saw, if it is known.
            spare: queries to keep beyond the window, because so many tokens may be taken back.
        """
        q = step.q
        # All that is collected is replaced, never written into: to go back a chunk costs a few references.
        kept = {k: list(x) if isinstance(x, list) else x for k, x in vars(self).items() if k != "_before"}
        self._before = step.k.shape[2], kept
        self._came = self._came + ((step.positions >= 0).sum(1).cpu() if step.padded else q.shape[2])
        if self.needs.window:
            width = self.needs.window + spare
            last = q[:, :, -width:]
            if self._queries is not None:
                last = torch.cat([self._queries, last], dim=2)[:, :, -width:]
            # A copy: a slice would keep the whole chunk's queries alive until the block ends.
            self._queries = last.clone()
        if self.needs.hidden:
            self._norms.append(hidden.float().norm(dim=-1))
        if self.needs.states:
            self._states.append(ScreenStates.of(hidden, step.positions, spans or []))
        if self.needs.hidden or self.needs.rope or self.needs.ids:
            self._positions.append(step.positions)
        if self.needs.ids and step.ids is not None:
            self._ids.append(step.ids)
        if self.needs.query_sample:
            self._add_sample(step)
        if self.needs.rope:
            rope = step.positions if step.rope_positions is None else step.rope_positions
            self._rope.append(rope.expand(len(q), -1))
        if self.needs.columns:
            self._add_columns(step, held(), lse)
        if self.needs.query_moments is not None or self.needs.query_centres:
            self._add_plain(step, rotary)
        if self.needs.query_peaks:
            padding = (step.positions < 0)[:, None, :, None]
            peaks = q.abs().masked_fill(padding, 0).amax(2).float()
            self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)

    def _add_sample(self, step: Step) -> None:
        """By logical position: a row's sample is the same whatever chunks it came in and however it was padded."""
        taken = (step.positions >= 0) & (step.positions % self.needs.query_sample == 0)
        columns = taken.any(0).nonzero()[:, 0]
        self._sampled.append(step.q[:, :, columns])
        self._sampled_at.append(step.positions[:, columns].masked_fill(~taken[:, columns], -1))

    def _add_columns(self, step: Step, held: Stored, lse: torch.Tensor | None) -> None:
        """Column sums per slot. The kernel takes the queries for those of the last slots, so slots without a token
        (padding, the missing ones of a ragged head) or hidden in this forward are left out, head by head where heads
        differ."""
        real, kv_heads = shown(held.positions, step.hidden), held.keys.shape[1]
        if step.visible is not None:
            mass = _mass_of_visible(step, held, real)
        elif bool(real.all()) and not step.padded:
            mass = window_mass(step.q, held.keys, lse=lse, **step.softmax.options)
            mass = mass.unflatten(1, (kv_heads, -1)).mean(2)
        else:
            mass = torch.zeros(real.shape, device=step.q.device)
            groups = step.q.unflatten(1, (kv_heads, -1))
            alike = bool((real == real[:, :1]).all())
            for row in range(len(real)):
                queries = groups[row, :, :, step.positions[row] >= 0]
                for heads in [slice(0, kv_heads)] if alike else [slice(h, h + 1) for h in range(kv_heads)]:
                    # Only real slots: the kernel's causal edge counts from the end, and holes would shift it.
                    slots = real[row, heads][0].nonzero()[:, 0]
                    if queries.shape[2] and len(slots):
                        keys, group = held.keys[row, heads][None, :, slots], groups.shape[2]
                        own = step.softmax.of_heads(slice(heads.start * group, heads.stop * group))
                        seen = window_mass(queries[heads].flatten(0, 1)[None], keys, **own.options)[0]
                        mass[row, heads, slots] = seen.unflatten(0, (-1, group)).mean(1)
        if self._columns is not None:
            # Earlier chunks voted on the slots that were there then; nothing was evicted in between.
            mass[..., : self._columns.shape[-1]] += self._columns
        self._columns = mass

    def _add_plain(self, step: Step, rotary: RotarySpec) -> None:
        """Turns the queries back by their own rotary positions and counts them. Under M-RoPE only the temporal axis is
        known, so an image's queries stay turned by their offset inside the image on the height and width frequencies.
        """
        rope = self._rope[-1]
        for start in range(0, step.q.shape[2], _BLOCK):
            part = slice(start, start + _BLOCK)
            plain, at = rotary.turn(step.q[:, :, part].float(), -rope[:, part]), step.positions[:, part]
            if self.needs.query_moments is not None:
                found = QueryMoments.of(plain, at >= self.needs.query_moments)
                self._moments = found if self._moments is None else self._moments + found
            if self.needs.query_centres:
                lie = QueryCentres.of(plain, at >= 0, rotary)
                self._centres = lie if self._centres is None else self._centres + lie

    def take_rows(self, rows: torch.Tensor) -> None:
        """The rows of the batch were rearranged: new row i is old row rows[i]."""
        kept = {name: x for name, x in vars(self).items() if name not in ("needs", "_before")}
        vars(self).update({name: _rows_of(x, rows) for name, x in kept.items()})
        self._before = None

    def moved(self, before: torch.Tensor, now: torch.Tensor) -> None:
        """Tokens were forgotten: slots hold the positions `now` instead of `before`, int32 [batch, stored heads, n]."""
        if self._columns is not None:
            self._columns = found_again(self._columns, before, now)
        # What an earlier chunk is taken back to has columns of slots that are no more.
        self._before = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was gathered that the end of the block would miss."""
        known = (x for name, x in vars(self).items() if name not in ("needs", "_before"))
        # Without padding the number of tokens that came says nothing that the layer does not know.
        return all(x is None or isinstance(x, int) or (isinstance(x, list) and not x) for x in known)

    def can_drop(self, tokens: int) -> bool:
        """Whether the last `tokens` tokens can be left out: they are the last chunk, or nothing sums over them."""
        summed = (self._columns, self._moments, self._centres, self._peaks)
        return (all(x is None for x in summed) and not self._sampled) or (
            self._before is not None and self._before[0] == tokens
        )

    def drop_last(self, tokens: int) -> None:
        """Leaves out the last `tokens` tokens: they were taken back."""
        if self._before is not None and self._before[0] == tokens:
            vars(self).update(self._before[1])
            self._before = None
            return
        self._before = None
        if self._queries is not None and tokens:
            self._queries = self._queries[:, :, : self._queries.shape[2] - tokens]
        for chunks in (self._norms, self._positions, self._rope, self._ids):
            chunks[:] = [torch.cat(chunks, 1)[:, :-tokens]] if chunks and tokens else chunks
        if self._states and tokens:
            ends = F.pad(self._positions[0], (1, 0), value=-1).amax(1) + 1
            self._states = [states.before(ends) for states in self._states]
        # Tokens of blocks that are over, or of an answer, were not counted here.
        came = self._came - tokens
        self._came = max(0, came) if isinstance(came, int) else came.clamp(min=0)

    def finish(
        self, q: torch.Tensor, softmax: Softmax, tokens: torch.Tensor, spans: Spans,
        gone: torch.Tensor | None = None, grids: Grids | None = None,
    ) -> Evidence:  # fmt: skip
        """The evidence of the whole block; the collector is empty afterwards."""
        queries = self._queries if self._queries is not None else q[:, :, :0]
        queries = queries[:, :, max(0, queries.shape[2] - self.needs.window) :] if self.needs.window else queries
        norms, positions, rope, ids, at = (
            torch.cat(x, 1) if x else None
            for x in (self._norms, self._positions, self._rope, self._ids, self._sampled_at)
        )
        sampled = torch.cat(self._sampled, 2) if self._sampled else None
        states = ScreenStates.joined(self._states) if self._states else None
        columns, moments, peaks, came = self._columns, self._moments, self._peaks, self._came
        centres = self._centres
        self.clear()
        # A plain number says that no row was padded.
        came = came if isinstance(came, torch.Tensor) else None
        return Evidence(
            queries, softmax.scale, tokens, norms, positions, rope, spans, columns, moments, peaks, came,
            *softmax[1:], centres, sampled=sampled, sampled_positions=at, ids=ids, gone=gone, grids=grids or [],
            states=states,
        )  # fmt: skip


def found_again(x: torch.Tensor, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Numbers [batch, heads, n] of tokens at positions `before`, int32 like them, for those at `now`; a hole has 0."""
    size = int(before.max()) + 1
    # One column more than positions, for holes: what is written there is wiped.
    table = x.new_zeros(*x.shape[:2], size + 1)
    table.scatter_(-1, before.long().masked_fill(before < 0, size), x)
    table[..., size] = 0
    return table.gather(-1, now.long().masked_fill(now < 0, size))


def rope_of(at: torch.Tensor, evidence: Evidence) -> torch.Tensor | None:
    """Rotary positions [batch, n] of tokens at logical positions `at`, int32 [batch, n]; None where a block told none.

    The block's own tokens may be some of these (others came while the cache was frozen: they have logical positions),
    or more, where some were forgotten between its chunks.
    """
    rope, known = evidence.rope_positions, evidence.norm_positions
    if rope is None or torch.equal(at, known):
        return rope
    # One more than they are: 0 says that nobody told.
    found = found_again(rope[:, None] + 1, known[:, None], at[:, None])[:, 0]
    return torch.where(found == 0, at.to(found.dtype), found - 1)


def _rows_of(x: Any, rows: torch.Tensor) -> Any:
    """Rows of whatever was gathered: tensors, and dataclasses and lists of them, have the batch first."""
    if isinstance(x, torch.Tensor):
        return x.index_select(0, rows.to(x.device))
    if isinstance(x, list):
        return [_rows_of(part, rows) for part in x]
    if is_dataclass(x):
        return replace(x, **{part.name: _rows_of(getattr(x, part.name), rows) for part in fields(x)})
    return x


def _mass_of_visible(step: Step, held: Stored, real: torch.Tensor) -> torch.Tensor:
    """Column sums fp32 [batch, kv_heads, n] where new tokens see each other as `Step.visible` says; `real` bool like
    the slots' positions, which may be seen at all. Plain torch, some queries at a time: no kernel knows such an edge.
    """
    m, kv_heads = step.q.shape[2], held.keys.shape[1]
    # New tokens follow all others and one another; padding comes before them.
    column = held.positions + (m - 1 - step.positions[:, None, -1:])
    old, column = real & (column < m - (step.positions >= 0).sum(1)[:, None, None]), column.long().clamp(0, m - 1)
    visible = step.visible.expand(len(step.q), -1, -1)
    mass, keys = torch.zeros(real.shape, device=step.q.device), held.keys.float().mT
    size = len(step.q) * step.q.shape[1] * real.shape[2]
    for rows in torch.arange(m, device=step.q.device).split(max(1, _ENTRIES // size)):
        sees = visible[:, None, rows].expand(-1, kv_heads, -1, -1)
        sees = sees.gather(-1, column[:, :, None].expand(-1, -1, len(rows), -1))
        sees = (sees | old[:, :, None]) & real[:, :, None] & (step.positions[:, rows] >= 0)[:, None, :, None]
        # A head's queries in one product: spread over them, its keys would be copied.
        q = step.q[:, :, rows].float().unflatten(1, (kv_heads, -1))
        products = (q.flatten(2, 3) @ keys).unflatten(2, q.shape[2:4])
        # A hole may hold NaN, and a query without any token sees nothing: neither may reach the sums.
        scores = step.softmax.scores(products).masked_fill(~sees[:, :, None], torch.finfo(torch.float32).min)
        mass += step.softmax.weights(scores).masked_fill(~sees[:, :, None], 0).mean(2).sum(2)
    return mass
