"""One layer of a cache: its segments, its counters, and the moments at which the method may act.

`update` (called by the model) only wraps the new keys and values in a small view; the model carries it to our
attention function, which calls `step`. There queries, keys and mask meet, so there tokens are stored and evicted.

Two lengths everywhere: tokens SEEN (logical, what positions and masks count) and tokens STORED (physical).
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from kernels import compact, merge
from textkv.evidence import Evidence, Gatherer
from textkv.segments.base import NewTokens, Segment, Stored, storage_bytes
from textkv.segments.dense import DenseSegment
from textkv.segments.ragged import RaggedSegment

if TYPE_CHECKING:
    from textkv.cache import MethodCache

ATTENTION = "textkv"
"""The name under which our attention and mask functions are registered with transformers."""


class View:
    """What `update` returns in place of keys and values: the new tokens and the way back to their layer."""

    def __init__(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v


class Layer(CacheLayerMixin):
    """One layer's store, driven by the method of its cache.

    Attributes:
        index: number of the layer in the model.
        segments: what holds the tokens; the last one takes new tokens in.
        seen: tokens seen per row, padding included: what transformers calls the sequence length.
        real_seen: int64 [batch] on the CPU, tokens seen without padding.
        since_eviction: tokens taken in since the method last changed what is stored: what `crop` can take back.
        notes: what the method wrote down about this layer for its `on_finish`, which takes it out again.
        marks: numbers that a method keeps per stored token, by name; see `mark`.
        scale: the model's softmax scale, known from the first forward on.
        last_share: fp32 [batch, heads, 1] while `on_decode_end` runs in a layer of several segments: the part of the
            token's attention that fell on the last one.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, index: int, cache: MethodCache) -> None:
        super().__init__()
        self.index = index
        self._cache = weakref.ref(cache)
        self.gatherer = Gatherer(cache.needs)
        self._clear()

    def _clear(self) -> None:
        self.segments: list[Segment] = [DenseSegment()]
        self.seen = 0
        self.real_seen: torch.Tensor | None = None
        self.since_eviction = 0
        self.is_initialized = False
        self.gatherer.clear()
        self.notes: dict[str, Any] = {}
        self.marks: dict[str, torch.Tensor] = {}
        self.last_share: torch.Tensor | None = None

    def __getstate__(self) -> dict:
        # The cache puts its own reference back: a weak one does not travel.
        return {k: v for k, v in self.__dict__.items() if k != "_cache"}

    @property
    def cache(self) -> MethodCache:
        """The cache that this layer belongs to."""
        return self._cache()

    # ---- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_heads, self.head_dim = key_states.shape[1], key_states.shape[3]
        self.real_seen = torch.zeros(key_states.shape[0], dtype=torch.int64)
        self.is_initialized = True
        with self._timed("on_start"):
            self.cache.method.on_start(self)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[View, View]:
        """Wraps new keys and values [batch, kv_heads, m, head_dim] for our attention function.

        Raises:
            ValueError: the model runs another attention implementation, which could not read the view.
        """
        self.cache.check_attention()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = View(self, key_states, value_states)
        return view, view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Our mask function hands on the whole 2-D padding mask, so these sizes only have to be consistent.
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return self.cache.method.capabilities.crop

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens (the number is negative, as in transformers).

        Raises:
            ValueError: a positive number, a method that cannot, or more tokens than came since the last eviction.
        """
        count = -tokens_to_remove
        name = self.cache.method.expression
        if count < 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        if count and not self.is_croppable:
            raise ValueError(f"crop({tokens_to_remove}): {name} evicts while decoding and cannot restore tokens")
        if count > self.since_eviction:
            raise ValueError(
                f"crop({tokens_to_remove}): {name} can take back only the {self.since_eviction} tokens since it last "
                "evicted; fork the cache before the prompt instead"
            )
        self.segments[-1].crop(count)
        if self.marks:
            self.marks = {name: self.mark(name) for name in self.marks}
        self.seen -= count
        self.real_seen -= count
        self.since_eviction -= count

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.is_initialized:
            return
        for segment in self.segments:
            segment.take_rows(beam_idx)
        self.marks = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.marks.items()}
        self.real_seen = self.real_seen[beam_idx.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real_seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized and indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def offload(self) -> None:
        raise ValueError("this cache does not offload; build it without offloading")

    prefetch = offload

    # ---- one forward -------------------------------------------------------------------------------------------

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Takes one forward's tokens in and returns their attention output [batch, heads, m, head_dim].

        Args:
            mask: bool [batch, seen + m] padding mask, True = real token; None = no padding.
        """
        new, self.scale = self._new_tokens(q, k, v, scale, mask), scale
        self.cache.note_places(self, new)
        m = q.shape[2]
        target = self.cache.block_end
        prompt = m > 1 or self.seen == 0 or self.seen < target
        self.seen += m
        self.real_seen = self.real_seen + (new.positions >= 0).sum(1).cpu() if new.padded else self.real_seen + m
        self.since_eviction += m
        method = self.cache.method
        if not prompt:
            with self._timed("on_decode_begin"):
                method.on_decode_begin(self, q)
            out = self._attend(new)
            with self._timed("on_decode_end"):
                method.on_decode_end(self, q)
        else:
            out = self._attend(new)
            self.gatherer.take(new, self.stored, self.cache.inv_freq)
            self.cache.note_bytes(self)
            if self.seen >= target:
                evidence = self.gatherer.finish(q, scale, self.real_seen, self.cache.spans)
                with self._timed("on_prefill_end"):
                    method.on_prefill_end(self, evidence)
        self.last_share = None
        self.cache.after_step(self, prompt and self.seen >= target)
        return out

    def absorb(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, observers: torch.Tensor, scale: float
    ) -> None:
        """Takes in tokens that another store held until now; the method acts as at the end of a prompt block.

        Args:
            k, v: [batch, kv_heads, m, head_dim], keys post-RoPE.
            positions: int32 [batch, m] logical positions, -1 = padding.
            observers: [batch, heads, w, head_dim] post-RoPE queries that the method may take for the block's last.
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        real = positions >= 0
        self.segments[-1].extend(
            NewTokens(observers[:, :, :0], k, v, positions, scale, padded=not bool(real.all())), need_lse=True
        )
        self.scale = scale
        self.seen += k.shape[2]
        self.since_eviction += k.shape[2]
        self.real_seen = self.real_seen + real.sum(1).cpu()
        self.cache.note_bytes(self)
        window = min(self.cache.needs.window, observers.shape[2])
        queries = observers[:, :, observers.shape[2] - window :]
        with self._timed("on_prefill_end"):
            self.cache.method.on_prefill_end(self, Evidence(queries, scale, self.real_seen))
        self.cache.after_step(self, prompt_ended=True)

    def _attend(self, new: NewTokens) -> torch.Tensor:
        alone = len(self.segments) == 1
        out, lse = self.segments[-1].extend(new, need_lse=not alone)
        if alone:
            return out
        parts = [segment.attend(new.q, new.scale) for segment in self.segments[:-1]] + [(out, lse)]
        out, total = merge([p[0] for p in parts], [p[1] for p in parts])
        if new.q.shape[2] == 1:
            self.last_share = (lse - total).exp()
        return out

    def _new_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> NewTokens:
        batch, _, m, _ = q.shape
        first = self.real_seen.to(q.device)[:, None]
        count = torch.arange(m, device=q.device)[None]
        positions, padded = first + count, False
        if mask is not None:
            real = mask[:, -m:].bool()
            padded = not bool(real.all())
            if padded and not bool(real[:, -1].all()):
                raise ValueError("the batch is padded on the right: pad on the left (tokenizer.padding_side = 'left')")
            if padded:
                positions = (first + real.long().cumsum(1) - 1).masked_fill(~real, -1)
        rope = self.cache.rope_positions if self.cache.needs.rope else None
        return NewTokens(
            q, k, v, positions.expand(batch, m).to(torch.int32), scale, padded,
            None if rope is None else rope.expand(batch, m),
        )  # fmt: skip

    # ---- what methods use --------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """What the layer holds, all segments side by side, padded to one length (holes have position -1)."""
        parts = [segment.stored() for segment in self.segments]
        if len(parts) == 1:
            return parts[0]
        return Stored(*(torch.cat([getattr(p, f) for p in parts], 2) for f in ("keys", "values", "positions")))

    def held_positions(self) -> torch.Tensor:
        """The positions of `stored()`, without unpacking what is packed: int32 [batch, stored heads, n], -1 = hole."""
        return torch.cat([segment.held_positions() for segment in self.segments], 2)

    def mark(self, name: str) -> torch.Tensor:
        """The numbers that a method keeps per stored token: fp32 [batch, stored heads, n], slot by slot of `stored()`.
        They move and go with their tokens; a token that came since they were set, or a hole, has 0. Set them through
        `marks[name]`.
        """
        positions = self.held_positions()
        known = self.marks.get(name, positions.new_zeros((*positions.shape[:2], 0), dtype=torch.float32))
        known = known[..., : positions.shape[-1]]
        known = F.pad(known, (0, positions.shape[-1] - known.shape[-1]))
        return known.masked_fill(positions < 0, 0)

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots `index` int64 [batch, kv_heads or 1, c] of `stored()`, ascending, -1 = hole; frees the others."""
        for name in self.marks:
            mark = self.mark(name)
            pick = index.expand(-1, mark.shape[1], -1)
            self.marks[name] = mark.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, 0)
        segment = self.segments[0]
        if len(self.segments) > 1 or not isinstance(segment, DenseSegment):
            segment = self._gathered()
        segment.keep(index)
        self.segments = [segment]
        self.since_eviction = 0

    def keep_mask(self, mask: torch.Tensor) -> None:
        """Keeps the slots where bool [batch, kv_heads, n] is True, each head its own number of them."""
        held = self.stored()
        mask = mask & (held.positions >= 0)
        # Ragged heads show their tokens first and their missing slots last.
        order = (~mask).sort(dim=-1, stable=True).indices[..., : int(mask.sum(-1).max())]
        self.marks = {
            name: self.mark(name).gather(-1, order).masked_fill(~mask.gather(-1, order), 0) for name in self.marks
        }
        rows = compact(held.keys, held.values, mask)
        self.segments = [RaggedSegment(rows.k, rows.v, held.positions[mask], mask.sum(-1).cpu())]
        self.since_eviction = 0

    def replace(self, segments: list[Segment]) -> None:
        """Puts other segments in place of what is stored; the method has moved over what it keeps (marks are gone)."""
        self.segments = segments
        self.marks = {}
        self.since_eviction = 0

    def repeat_heads(self, times: int) -> None:
        """From now on every KV head is stored `times` times, once per query head of its group."""
        segment = self._gathered() if not isinstance(self.segments[0], DenseSegment) else self.segments[0]
        segment.repeat_heads(times)
        self.segments = [segment]

    def _gathered(self) -> DenseSegment:
        """All segments as one dense one (ragged heads are padded with holes)."""
        held, last = self.stored(), self.segments[-1]
        segment = DenseSegment(last.head_repeat if isinstance(last, DenseSegment) else 1)
        segment.k, segment.v, segment.positions = held.keys, held.values, held.positions.contiguous()
        segment.used = held.keys.shape[2]
        segment.holes = bool((held.positions < 0).any())
        return segment

    # ---- counting ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the layer holds: its segments' by "segment.name", its marks by "mark.name"."""
        held = {f"{i}.{name}": x for i, s in enumerate(self.segments) for name, x in s.tensors().items()}
        return held | {f"mark.{name}": x for name, x in self.marks.items()}

    def kv_bytes(self) -> int:
        """Bytes of all storages that the layer keeps alive, positions and lengths included."""
        return storage_bytes(list(self.tensors().values()))

    def full_bytes(self) -> int:
        """Bytes of K and V that a cache without eviction holds after the same tokens."""
        if not self.is_initialized:
            return 0
        return 2 * len(self.real_seen) * self.kv_heads * self.seen * self.head_dim * self.dtype.itemsize

    def lengths(self) -> torch.Tensor:
        """Tokens stored, int64 [batch, stored heads], on the CPU."""
        return sum(segment.lengths() for segment in self.segments)

    @contextmanager
    def _timed(self, hook: str):
        start = perf_counter()
        yield
        self.cache.seconds[hook] = self.cache.seconds.get(hook, 0.0) + perf_counter() - start
