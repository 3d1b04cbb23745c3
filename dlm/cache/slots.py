"""Keys and values of a whole canvas, stored once by absolute slot and written in place.

Keys are stored after the rotary embedding: slots never move, so nothing has to be rotated again. What the model gets
as `past_key_values` is the `SlotCache`; its `update` only wraps the new keys and values, and the model's attention
function hands them, with the queries, to `SlotLayer.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dlm.cache.plan import Packing, Plan
from dlm.models.attention import full_attention
from textkv.segments.base import storage_bytes


class View(NamedTuple):
    """What `SlotCache.update` returns in place of keys and values: the new ones, and the way to their layer."""

    layer: SlotLayer
    k: torch.Tensor
    v: torch.Tensor


class SlotLayer:
    """One layer: k, v [batch, kv_heads, L, head_dim], allocated at the first write."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Writes the plan's slots and attends: q [batch, heads, q, head_dim] -> the same shape.

        Args:
            k, v: [batch, kv_heads, q, head_dim] of the plan's queries; [1, .., T, ..] like q where they are packed.
            mask: bool or int [batch, L], slots that may be seen, or [batch, q, L] by query; None = all.
        """
        if self.cache.plan.nodes > 1:
            return self.verify(q, k, v, scale, mask)
        # Written before they are attended: a query sees the other queries of this forward, as without a cache.
        self.write(k, v, self.cache.plan)
        stop = slice(self.cache.plan.stop)
        mask = None if mask is None else mask[..., stop]
        return by_rows(
            self.cache.plan.packing, q, lambda q: full_attention(q, self.k[:, :, stop], self.v[:, :, stop], scale, mask)
        )

    def write(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        """Puts k, v [batch, kv_heads, q, head_dim] (or packed) into the plan's slots."""
        if self.k is None:
            # Zeros: a padding slot may never be written, and a masked NaN is still NaN after its weight of 0.
            rows = len(k) if plan.packing is None else len(plan.packing.grid)
            shape = (rows, k.shape[1], self.cache.length, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            self.cache.counted = None
        base = self.cache.base
        if plan.packing is None:
            window = slice(plan.queries.start - base, plan.queries.stop - base)
            self.k[:, :, window], self.v[:, :, window] = k, v
            return
        plan.packing.store(self.k, k, base)
        plan.packing.store(self.v, v, base)

    def verify(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `step` for the nodes of a verification: each has its own queries and reads what is stored of its row.

        Nothing is written before `settle` says which node was right.
        """
        packing, nodes = self.cache.plan.packing, self.cache.plan.nodes
        self.pending = k, v
        shape = (len(packing.grid), k.shape[1], self.cache.length, k.shape[3])
        # A copy per node for as long as this layer runs: the nodes' keys of one slot differ.
        keys, values = (
            new.new_zeros(shape) if held is None else held.repeat_interleave(nodes, 0)
            for held, new in ((self.k, k), (self.v, v))
        )
        packing.store(keys, k)
        packing.store(values, v)
        stop = slice(self.cache.plan.stop)
        mask = None if mask is None else mask[..., stop]
        return by_rows(packing, q, lambda q: full_attention(q, keys[:, :, stop], values[:, :, stop], scale, mask))

    def settle(self, entries: torch.Tensor, packing: Packing) -> None:
        """Stores the keys and values of `entries` int64 [s] of a verification, at the places of `packing`."""
        k, v = self.pending
        self.pending = None
        packing.store(self.k, k[:, :, entries])
        packing.store(self.v, v[:, :, entries])

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        if self.k is not None:
            self.k, self.v = self.k[rows], self.v[rows]

    def tensors(self) -> list[torch.Tensor]:
        """Everything that the layer holds."""
        return [] if self.k is None else [self.k, self.v]


class SlotCache:
    """What a model gets as `past_key_values`.

    Attributes:
        length: L, slots of the canvas.
        base: first slot that the buffers hold.
        plan: the forward that is running; set by the loop before it calls the model.
        rope: the model's rotary tables of positions 0 to L - 1, which it keeps here; None before its first forward.
        turned: positions int64 [batch or 1, q], and the tables of them: those of the last forward.
        layers: one per layer of the model, made as they report.
        counted: bytes as they were last counted; None = something was made or taken away since.
    """

    drives_layers = False
    layer_class: type[SlotLayer] = SlotLayer

    def __init__(self, length: int) -> None:
        self.length, self.base = length, 0
        self.plan: Plan | None = None
        self.rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self.turned: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.layers: list[SlotLayer] = []
        self.counted: int | None = None

    def layer(self, index: int) -> SlotLayer:
        """The layer of that number."""
        while len(self.layers) <= index:
            self.layers.append(self.layer_class(self))
        return self.layers[index]

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[View, View]:
        """Wraps new keys and values [batch, kv_heads, q, head_dim] for the attention function."""
        # The model hands it on unread as key and as value; only our attention function opens it.
        view = View(self.layer(layer_idx), k, v)
        return view, view

    def freeze(self, low: list[int]) -> None:
        """Slots of each row before `low` will not be written any more; here they stay where they are."""

    def settle(self, accepted: torch.Tensor) -> None:
        """After a verification: stores what node `accepted` int64 [batch] of each row computed."""
        packing, nodes = self.plan.packing, self.plan.nodes
        entries = (packing.rows % nodes == accepted[packing.rows // nodes]).nonzero()[:, 0]
        chosen = Packing(packing.rows[entries] // nodes, packing.slots[entries], packing.columns[entries], packing.grid)
        for layer in self.layers:
            layer.settle(entries, chosen)

    def take_rows(self, rows: torch.Tensor, batch: int) -> None:
        """Keeps rows int64 [kept] of a canvas of `batch` rows, in both halves of classifier-free guidance."""
        self.counted = None
        for layer in self.layers:
            held = layer.tensors()
            if held:
                rows = rows.to(held[0].device)
                layer.take_rows(torch.cat([rows + half for half in range(0, len(held[0]), batch)]))

    def kv_bytes(self) -> int:
        """Bytes of all storages that the cache keeps alive."""
        # Slots are written in place: there is nothing to count again after every forward.
        if self.counted is None or self.drives_layers:
            self.counted = storage_bytes([x for layer in self.layers for x in layer.tensors()])
        return self.counted


class PassingLayer(SlotLayer):
    """One layer that keeps nothing: keys and values of this forward are all that it attends."""

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `SlotLayer.step`, in buffers that are gone afterwards."""
        out = super().step(q, k, v, scale, mask)
        self.k = self.v = self.cache.counted = None
        return out

    def settle(self, entries: torch.Tensor, packing: Packing) -> None:
        """Forgets the verification: nothing is stored."""
        self.pending = None


class PassingCache(SlotCache):
    """Takes a packed forward apart into rows, and stores nothing."""

    layer_class = PassingLayer


def by_rows(packing: Packing | None, q: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`attend` on q [batch, heads, q, head_dim], or on packed [1, heads, T, head_dim] row by row; the shape of q."""
    return attend(q) if packing is None else packing.gather(attend(packing.spread(q)))
