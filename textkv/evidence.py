"""What a method may look at when a prompt block ends, gathered while it runs and only when asked for.

Queries are the true ones, after norms and rotary embedding, taken where the model hands them to attention. Hidden
states are kept as row norms only. Everything here is dropped as soon as the method's hook has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels import rotate, window_mass
from textkv.method import Needs
from textkv.segments.base import NewTokens, Stored

Spans = list[list[tuple[int, int]]]
"""Per row, the half-open [start, end) logical positions of each screenshot, oldest first."""

_BLOCK = 4096  # queries that are turned back at a time: a long prompt's fp32 copy would weigh as much as its keys


@dataclass(frozen=True)
class QueryMoments:
    """How a block's pre-RoPE queries are spread, per query head. Parts of a block add up with `+`.

    Kept centred: the difference of two large sums would lose a small covariance beside a large mean.

    Attributes:
        count: fp32 [batch], queries counted.
        mean: fp32 [batch, heads, head_dim], 0 where none was counted.
        scatter: fp32 [batch, heads, head_dim, head_dim], sum of outer products of (query - mean).
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, counted: torch.Tensor) -> QueryMoments:
        """Moments of the queries q [batch, heads, m, head_dim] at which `counted` bool [batch, m] is True."""
        out = ~counted[:, None, :, None]
        count = counted.sum(1).float()
        mean = q.float().masked_fill(out, 0).sum(2) / count.clamp(min=1)[:, None, None]
        centred = (q.float() - mean[:, :, None]).masked_fill(out, 0)
        return cls(count, mean, centred.mT @ centred)

    def __add__(self, other: QueryMoments) -> QueryMoments:
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[:, None, None]
        gap = other.mean - self.mean
        between = (share * self.count[:, None, None] * gap)[..., None] * gap[..., None, :]
        return QueryMoments(count, self.mean + share * gap, self.scatter + other.scatter + between)

    def part(self, rows: slice, heads: slice) -> QueryMoments:
        """The moments of some rows and query heads."""
        return QueryMoments(self.count[rows], self.mean[rows, heads], self.scatter[rows, heads])

    @property
    def covariance(self) -> torch.Tensor:
        """fp32 [batch, heads, head_dim, head_dim], divided by the count; 0 where at most one was counted."""
        return self.scatter / self.count.clamp(min=1)[:, None, None, None]


@dataclass(frozen=True)
class Evidence:
    """Evidence of one prompt block in one layer.

    Attributes:
        queries: [batch, heads, w, head_dim] post-RoPE queries of the block's last w tokens (w = 0 if not asked for).
        scale: the softmax scale.
        tokens: int64 [batch] on the CPU: real tokens seen per row, this block included.
        norms: fp32 [batch, m] row norms of the hidden state for the block's m tokens, or None.
        norm_positions: int32 [batch, m] logical positions of these tokens (-1 = padding), or None.
        rope_positions: [batch, m] rotary positions of these tokens (temporal axis under M-RoPE), or None.
        spans: screenshots seen so far, per row.
        columns: fp32 [batch, kv_heads, n], n slots of `layer.stored()`: attention summed over all queries of the block,
            mean over each KV head's query heads, or None.
        moments: of the block's pre-RoPE queries, or None.
        peaks: fp32 [batch, heads, head_dim], largest magnitude of the block's post-RoPE queries per channel, or None.
    """

    queries: torch.Tensor
    scale: float
    tokens: torch.Tensor
    norms: torch.Tensor | None = None
    norm_positions: torch.Tensor | None = None
    rope_positions: torch.Tensor | None = None
    spans: Spans = field(default_factory=list)
    columns: torch.Tensor | None = None
    moments: QueryMoments | None = None
    peaks: torch.Tensor | None = None

    def part(self, row: int, head: int | None, kv_heads: int, slots: torch.Tensor) -> Evidence:
        """The evidence of one row, and of one KV head's query heads if `head` is given; `slots` int64 [k] are the
        row's stored tokens."""
        one, which, ours = slice(row, row + 1), slice(None), slice(None)
        if head is not None:
            group = self.queries.shape[1] // kv_heads
            which, ours = slice(head, head + 1), slice(head * group, (head + 1) * group)
        return Evidence(
            queries=self.queries[one, ours],
            scale=self.scale,
            tokens=self.tokens[one],
            norms=None if self.norms is None else self.norms[one],
            norm_positions=None if self.norm_positions is None else self.norm_positions[one],
            rope_positions=None if self.rope_positions is None else self.rope_positions[one],
            spans=self.spans[one] if self.spans else [],
            columns=None if self.columns is None else self.columns[one, which][:, :, slots],
            moments=None if self.moments is None else self.moments.part(one, ours),
            peaks=None if self.peaks is None else self.peaks[one, ours],
        )


class Gatherer:
    """Collects one layer's evidence over the chunks of a prompt block."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.clear()

    def clear(self) -> None:
        """Forgets everything gathered."""
        self._queries: torch.Tensor | None = None
        self._norms: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._rope: list[torch.Tensor] = []
        self._columns: torch.Tensor | None = None
        self._moments: QueryMoments | None = None
        self._peaks: torch.Tensor | None = None
        self.pending_norms: torch.Tensor | None = None

    def take(self, new: NewTokens, held: Callable[[], Stored], inv_freq: torch.Tensor | None = None) -> None:
        """One chunk of the block; `held` gives what the layer stores, the chunk included; `inv_freq` are the model's
        rotary frequencies, if asked for."""
        q = new.q
        if self.needs.window:
            last = q[:, :, -self.needs.window :]
            if self._queries is not None:
                last = torch.cat([self._queries, last], dim=2)[:, :, -self.needs.window :]
            # A copy: a slice would keep the whole chunk's queries alive until the block ends.
            self._queries = last.clone()
        if self.needs.hidden:
            if self.pending_norms is None or self.pending_norms.shape[1] != q.shape[2]:
                raise RuntimeError(
                    "the method needs hidden states but none arrived: build the cache as MethodCache(model, ...) with "
                    "the same model that runs"
                )
            self._norms.append(self.pending_norms)
            self._positions.append(new.positions)
            self.pending_norms = None
        if self.needs.rope:
            self._rope.append(new.rope_positions)
        if self.needs.columns:
            self._add_columns(new, held())
        if self.needs.query_moments is not None:
            self._add_moments(new, inv_freq.to(q.device))
        if self.needs.query_peaks:
            padding = (new.positions < 0)[:, None, :, None]
            peaks = q.abs().masked_fill(padding, 0).amax(2).float()
            self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)

    def _add_columns(self, new: NewTokens, held: Stored) -> None:
        real, kv_heads = held.positions >= 0, held.keys.shape[1]
        keys, order = held.keys, None
        if not bool(real[..., -1].all()):
            # The kernel takes the block's queries for those of the last slots; a ragged head's missing slots are last.
            order = real.sort(dim=-1, stable=True).indices
            keys, real = keys.gather(2, order[..., None].expand_as(keys)), real.gather(-1, order)
        valid = None if bool(real.all()) else real
        mass = window_mass(new.q, keys, scale=new.scale, valid=valid).unflatten(1, (kv_heads, -1)).mean(2)
        if order is not None:
            mass = torch.zeros_like(mass).scatter(-1, order, mass)
        if self._columns is not None:
            mass[..., : self._columns.shape[-1]] += self._columns
        self._columns = mass

    def _add_moments(self, new: NewTokens, inv_freq: torch.Tensor) -> None:
        """Turns the queries back by their own rotary positions. Under M-RoPE only the temporal axis is known, so an
        image's queries stay turned by their offset inside the image on the height and width frequencies."""
        counted = new.positions >= self.needs.query_moments
        for start in range(0, new.q.shape[2], _BLOCK):
            part = slice(start, start + _BLOCK)
            plain = rotate(new.q[:, :, part].float(), -new.rope_positions[:, part], inv_freq)
            found = QueryMoments.of(plain, counted[:, part])
            self._moments = found if self._moments is None else self._moments + found

    def finish(self, q: torch.Tensor, scale: float, tokens: torch.Tensor, spans: Spans) -> Evidence:
        """The evidence of the whole block; the gatherer is empty afterwards."""
        queries = self._queries if self._queries is not None else q[:, :, :0]
        norms, positions, rope = (torch.cat(x, 1) if x else None for x in (self._norms, self._positions, self._rope))
        columns, moments, peaks = self._columns, self._moments, self._peaks
        self.clear()
        return Evidence(queries, scale, tokens, norms, positions, rope, spans, columns, moments, peaks)
