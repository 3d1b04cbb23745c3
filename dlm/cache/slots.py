"""Keys and values of a whole canvas, stored once by absolute slot and written in place.

Keys are stored after the rotary embedding: slots never move, so nothing has to be rotated again. What the model gets
as `past_key_values` is the `SlotCache`; its `update` only wraps the new keys and values, and the model's attention
function hands them, with the queries, to `SlotLayer.step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dlm.cache.plan import Plan
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

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Writes the plan's slots and attends: q [batch, heads, q, head_dim] -> the same shape.

        Args:
            k, v: [batch, kv_heads, q, head_dim] of the plan's queries.
            mask: bool or int [batch, L], slots that may be seen; None = all.
        """
        # Written before they are attended: a query sees the other queries of this forward, as without a cache.
        self.write(k, v, self.cache.plan)
        return full_attention(q, self.k, self.v, scale, mask)

    def write(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        """Puts k, v [batch, kv_heads, q, head_dim] into the plan's slots."""
        if self.k is None:
            # Zeros: a padding slot may never be written, and a masked NaN is still NaN after its weight of 0.
            shape = (*k.shape[:2], self.cache.length, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        base = self.cache.base
        if plan.slots is None:
            window = slice(plan.queries.start - base, plan.queries.stop - base)
            self.k[:, :, window], self.v[:, :, window] = k, v
            return
        # Only a finished row, whose slots nobody reads, may point below the base.
        index = (plan.slots - base).clamp(min=0)[:, None, :, None].expand_as(k)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that the layer holds."""
        return [] if self.k is None else [self.k, self.v]


class SlotCache:
    """What a model gets as `past_key_values`.

    Attributes:
        length: L, slots of the canvas.
        base: first slot that the buffers hold.
        plan: the forward that is running; set by the loop before it calls the model.
        layers: one per layer of the model, made as they report.
    """

    drives_layers = False
    layer_class: type[SlotLayer] = SlotLayer

    def __init__(self, length: int) -> None:
        self.length, self.base = length, 0
        self.plan: Plan | None = None
        self.layers: list[SlotLayer] = []

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

    def kv_bytes(self) -> int:
        """Bytes of all storages that the cache keeps alive."""
        return storage_bytes([x for layer in self.layers for x in layer.tensors()])
