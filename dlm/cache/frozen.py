"""Frozen slots in the hands of a textkv method: the live buffer shrinks, and the bytes are really gone.

The layers keep keys and values of the live slots only. When a slot is frozen it moves into a textkv layer whose method
drops, merges or packs it as at the end of a prompt; the first queries of the running window, those of the active
block's masks, are what the method may look at. Live and frozen part attend apart and are merged by their log-sum-exp.
Positions stay those of the canvas, so nothing is rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from dlm.cache.slots import SlotCache, SlotLayer
from dlm.canvas import Canvas
from dlm.models.backbone import head_dim_of, rope_frequencies, rotated_of
from dlm.models.decoding_spec import DecodingSpec
from textkv.context import Context
from textkv.evidence import Needs
from textkv.kernels import decode_attention, merge
from textkv.kernels.beside import Exact
from textkv.kinds import LayerKind
from textkv.layer import Layer
from textkv.method import Method
from textkv.positions import RotarySpec
from textkv.segments.base import Segment
from textkv.segments.dense import DenseSegment


def check_method(method: Method) -> None:
    """Raises ValueError for a method that cannot keep frozen slots, and says why."""
    needs, can = method.needs(), method.capabilities
    # What a canvas hands over with the slots is all that there is: a need that is not among it would be met by nothing.
    if needs != Needs(window=needs.window, positions=needs.positions):
        wrong = "needs evidence of the whole prompt (token ids, hidden states, positions or all queries)"
    elif can.retrieves:
        wrong = "fetches tokens for each that is decoded, and a canvas reads all of them at once"
    elif can.decode_eviction:
        wrong = "drops tokens while single tokens are decoded, and a canvas has no such moment"
    elif not can.original_positions:
        wrong = "moves keys to other positions, and slots never move"
    elif can.stores_query_heads:
        wrong = "stores a copy per query head"
    else:
        return
    raise ValueError(f"{method.expression} {wrong}; use one that scores keys or by the last queries: snapkv, knorm")


def check_shape(method: Method | None, spec: DecodingSpec) -> None:
    """Raises ValueError for a method that does not go with the layers and heads of a model, as its config tells them:
    an empty store is begun, which needs no weights."""
    if method is None or spec.config is None:
        return
    for layer in store_of(spec.config, method).layers:
        layer.lazy_initialization(torch.zeros(1, spec.config.num_key_value_heads, 0, head_dim_of(spec.config)))


def store_of(config: PreTrainedConfig, method: Method) -> Context:
    """Empty layers for frozen slots, which take tokens through `Layer.absorb`, and what they share.

    No `MethodCache`: that one would put the model on its own, causal attention.
    """
    kinds = tuple(LayerKind(number, "full") for number in range(config.num_hidden_layers))
    context = Context(method, method.needs(), config, kinds)
    context.layers = [Layer(kind, context, kind.number) for kind in kinds]
    context.everything = context.layers
    # Slots keep their positions, and these turn their keys.
    spec = RotarySpec.halves(rope_frequencies(rotated_of(config), config.rope_theta), head_dim_of(config))
    context.rotary = dict.fromkeys(range(len(kinds)), spec)
    method.on_build(context)
    return context


def slots_or_frozen(canvas: Canvas, model: Any, method: Method | None) -> SlotCache:
    """The cache of a policy that freezes slots: with `method`, which keeps them, or None, where they stay."""
    return SlotCache(canvas.length) if method is None else FrozenCache(canvas, model, method)


class FrozenCache(SlotCache):
    """Live slots here, frozen ones with a method.

    Attributes:
        store: the frozen slots, by layer.
        frozen: int64 [batch] on the CPU, each row's first slot that is not there (padding is not either).
        move: what leaves the live buffers in this forward, or None.
        visible: bool [batch, L - base], live slots that may be seen; None = all.
        kept: bytes of the store, as of when `counted` was.
    """

    def __init__(self, canvas: Canvas, model: Any, method: Method) -> None:
        super().__init__(canvas.length)
        self.canvas, self.store = canvas, store_of(model.config, method)
        self.frozen = canvas.real_start_cpu.clone()  # padding is nobody's
        self.move: Move | None = None
        self.kept = 0
        self.visible: torch.Tensor | None = canvas.valid

    def layer(self, index: int) -> FrozenLayer:
        """The layer `index`, made when it is first asked for."""
        while len(self.layers) <= index:
            self.layers.append(FrozenLayer(self, len(self.layers)))
        return self.layers[index]

    def freeze(self, low: list[int]) -> None:
        """Slots of each row before `low` leave the live buffers in the forward that comes."""
        first = torch.tensor(low)
        stop = torch.maximum(first, self.frozen)
        self.move = Move(self, self.frozen, stop, first) if bool((stop > self.frozen).any()) else None
        if self.move is not None:
            self.frozen, self.base = stop, int(stop.min())
            self._see()

    def _see(self) -> None:
        self.visible = None
        if self.canvas.valid is not None or bool((self.frozen != self.base).any()):
            slots = torch.arange(self.base, self.length)[None]
            visible = slots >= torch.maximum(self.frozen, self.canvas.real_start_cpu)[:, None]
            self.visible = visible.to(self.canvas.ids.device)

    def take_rows(self, rows: torch.Tensor, batch: int) -> None:
        """Keeps rows int64 [kept] of a canvas of `batch` rows, the store's too."""
        super().take_rows(rows, batch)
        for layer in self.store.layers:
            if layer.seen:
                halves = len(layer.real_seen) // batch
                layer.batch_select_indices(torch.cat([rows + half * batch for half in range(halves)]))
        self.frozen = self.frozen[rows]
        if self.visible is not None:
            self.visible = self.visible[rows.to(self.visible.device)]

    def kv_bytes(self) -> int:
        """Bytes of the canvas's slots and of what the method keeps."""
        if self.counted is None:  # the store changes with the live buffers
            self.kept = self.store.kv_bytes()
        return super().kv_bytes() + self.kept


class Move:
    """The slots that leave the live buffers in one forward.

    Attributes:
        columns: int64 [batch, m], columns of the live buffer before it shrinks; rows with fewer are padded in front.
        positions: int32 [batch, m], logical positions, -1 = padding.
        drop: columns that the live buffer loses.
        observed: int64 [batch] on the CPU, how many queries of each row the method may look at: the first of its
            window, as many as that has slots in its first block. Other rows' gaps make blocks longer, not this.
        observers: int64 [batch, w], their numbers among the row's queries, at the end of w.
    """

    def __init__(self, cache: FrozenCache, start: torch.Tensor, stop: torch.Tensor, low: torch.Tensor) -> None:
        canvas, width = cache.canvas, int((stop - start).max())
        real = canvas.real_start_cpu
        slots = stop[:, None] - width + torch.arange(width)[None]
        positions = (slots - real[:, None]).masked_fill(slots < torch.maximum(start, real)[:, None], -1)
        device = canvas.ids.device
        self.columns = (slots - cache.base).clamp(min=0).to(device)
        self.positions = positions.to(device=device, dtype=torch.int32)
        self.drop = int(stop.min()) - cache.base
        size, first = canvas.block_length, low + canvas.shift
        ends = (canvas.begin + ((first - canvas.begin) // size + 1) * size).clamp(max=canvas.length)
        self.observed = ends - first if canvas.grid is None else torch.full_like(low, size)
        most = int(self.observed.max())
        self.observers = (torch.arange(most) - (most - self.observed)[:, None]).clamp(min=0).to(device)


class FrozenLayer(SlotLayer):
    """One layer: k, v [batch, kv_heads, L - base, head_dim] live, the rest in the store's layer of the same number."""

    def __init__(self, cache: FrozenCache, index: int) -> None:
        super().__init__(cache)
        self.store = cache.store.layers[index]

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `SlotLayer.step`; which live slots are real the cache knows, `mask` only adds what is pruned or later.

        What is frozen lies before every query's block, so all queries see it.
        """
        cache, packing = self.cache, self.cache.plan.packing
        spread = q if packing is None else packing.spread(q)
        if cache.move is not None:
            self._hand_over(cache.move, spread, scale)
        self.write(k, v, cache.plan)
        live = slice(None if cache.plan.stop is None else cache.plan.stop - cache.base)
        valid = None if cache.visible is None else _repeat(cache.visible, len(spread))[:, live]
        by_query = None
        if mask is not None and mask.dim() == 3:
            by_query = mask[:, :, cache.base :][:, :, live].bool()
        elif mask is not None:
            pruned = mask[:, cache.base :][:, live].bool()
            valid = pruned if valid is None else valid & pruned
        k, v = self.k[:, :, live], self.v[:, :, live]
        frozen = [segment for segment in self.store.segments if not segment.is_empty()] if self.store.seen else []
        near = [x for x in frozen if _beside(x, k.shape[2])] if valid is None and by_query is None else []
        if near:
            frozen = [segment for segment in frozen if segment not in near]
            held = [segment.stored() for segment in near]
            k, v = torch.cat([*(x.keys for x in held), k], 2), torch.cat([*(x.values for x in held), v], 2)
        if len(frozen) == 1 and frozen[0].takes_beside and valid is None and by_query is None:
            out = frozen[0].attend_beside(spread, scale, None, Exact([(k, v)], lse=False))[0]
        else:
            parts = [decode_attention(spread, k, v, scale=scale, valid=valid, visible=by_query)]
            parts += [segment.attend(spread, scale) for segment in frozen]
            out = parts[0][0] if len(parts) == 1 else merge([p[0] for p in parts], [p[1] for p in parts])[0]
        return out if packing is None else packing.gather(out)

    def _hand_over(self, move: Move, q: torch.Tensor, scale: float) -> None:
        index = _repeat(move.columns, len(self.k))[:, None, :, None]
        keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.k, self.v))
        # At the end, as if they were the last of what leaves; in front a short row has some that count for nothing.
        index = _repeat(move.observers, len(q))[:, None, :, None]
        observers = q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))
        observed = _repeat(move.observed, len(q))
        self.store.absorb(keys, values, _repeat(move.positions, len(self.k)), observers, scale, observed)
        self.cache.counted = None
        if move.drop:
            # A copy: a view would keep the frozen slots' memory alive.
            self.k, self.v = self.k[:, :, move.drop :].clone(), self.v[:, :, move.drop :].clone()


def _beside(segment: Segment, live: int) -> bool:
    """Whether frozen slots are better copied beside `live` ones for this forward: a few, which lie as the model made
    them, cost less than an attention of their own and its merging."""
    return type(segment) is DenseSegment and not segment.holes and 0 < segment.slots <= live


def _repeat(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[rows, ..] -> [batch, ..]: every row again for the second half of classifier-free guidance."""
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.dim() - 1))
