"""One layer of a cache: its segments, its counters, and the moments at which the method may act.

`update` (called by the model) only wraps the new keys and values in a small view; the model carries it to our
attention function, which calls `step`. There queries, keys and mask meet, so there tokens are stored and evicted.

Two lengths everywhere: tokens SEEN (logical, what positions and masks count) and tokens STORED (physical).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kernels import merge
from textkv.call import Call, Tokens
from textkv.context import Context
from textkv.evidence import Evidence, EvidenceCollector
from textkv.kinds import LayerKind
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Step, Stored, keep_across, storage_bytes
from textkv.segments.dense import DenseSegment
from textkv.segments.window import WindowSegment

OF_HEAD = "head."
"""How the names of statistics begin that a method keeps per head and not per token: they stay when tokens go."""
SPARE = 128
"""Queries kept beyond a method's window while drafts may be taken back: more than any draft is long."""


class View:
    """What `update` returns in place of keys and values: the new tokens [batch, kv_heads, m, head_dim] and the way back
    to their layer. Layers that read another one's keys get the same view.

    It has a tensor's shape, dtype and device, for libraries that look at these on the way.
    """

    def __init__(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.waiting = layer.kind.readers
        self.step: Step | None = None
        self.tokens: Tokens | None = None

    @property
    def shape(self) -> torch.Size:
        return self.k.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device


class Layer(CacheLayerMixin):
    """One layer's store, driven by the method of its cache.

    Attributes:
        context: what the layers of the cache share.
        kind: what the layer is in the model.
        index: its place among the layers that the method governs; -1 = not governed.
        segments: what holds the tokens; the last one takes new tokens in.
        seen: tokens seen per row, padding included: what transformers calls the sequence length.
        real_seen: int64 [batch] on the CPU, tokens seen without padding.
        since_eviction: tokens taken in since the method last changed what is stored: what `crop` can take back.
        notes: what the method wrote down about this layer for its `on_finish`, which takes it out again.
        statistics: numbers that a method keeps per stored token, by name; see `statistic`.
        scale: the model's softmax scale, known from the first forward on.
        softcap: its soft cap of scores, or None.
        came: int64 [batch] on the CPU while a hook runs, real tokens that the forward brought; None = the same to all.
        last_share: fp32 [batch, heads, 1] while `on_decode_end` runs in a layer of several segments: the part of the
            token's attention that fell on the last one.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, kind: LayerKind, context: Context, index: int) -> None:
        super().__init__()
        self.kind, self.context, self.index = kind, context, index
        self.is_sliding = not kind.governed
        self.module = lambda: None
        self.collector = EvidenceCollector(context.needs)
        self._clear()

    def _clear(self) -> None:
        self.segments: list[Segment] = [self._fresh()]
        self.seen = 0
        self.real_seen: torch.Tensor | None = None
        self.since_eviction = 0
        self.is_initialized = False
        self.collector.clear()
        self.notes: dict[str, Any] = {}
        self.statistics: dict[str, torch.Tensor] = {}
        self.last_share: torch.Tensor | None = None
        self.came: torch.Tensor | None = None
        self._torn = False
        self._due: list[tuple[bool, torch.Tensor | None]] = []

    def _fresh(self) -> Segment:
        if self.kind.window is None:
            return DenseSegment()
        return WindowSegment(self.kind.window, "chunked" if self.kind.name == "chunked" else "sliding")

    def __getstate__(self) -> dict:
        # The model's module does not travel with a copy: `bind` finds it again.
        return {k: v for k, v in self.__dict__.items() if k != "module"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.module = lambda: None

    @property
    def rotary(self) -> RotarySpec | None:
        """How this layer's keys turn, if the method asked for `rope`."""
        return self.context.rotary.get(self.kind.number)

    # ---- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_heads, self.head_dim = key_states.shape[1], key_states.shape[3]
        self.real_seen = torch.zeros(key_states.shape[0], dtype=torch.int64)
        self.is_initialized = True
        if self.kind.governed:
            with self.context.timed("on_start"):
                self.context.method.on_start(self)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[View, View]:
        """Wraps new keys and values [batch, kv_heads, m, head_dim] for our attention function.

        Raises:
            ValueError: keys and values of different size, or an attention that could not read the view.
        """
        self.context.check_attention()
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.kind.number}: keys of shape {tuple(key_states.shape)} and values of "
                f"{tuple(value_states.shape)}; this cache needs both alike"
            )
        view = View(self, key_states, value_states)
        return view, view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # False counts as an offset of 0 and tells our mask function that one of our layers is asking.
        return self.context.seen() + query_length, False

    def get_seq_length(self) -> int:
        return self.context.seen()

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return not self.kind.governed or self.context.method.capabilities.crop

    def reset(self) -> None:
        self._clear()

    def check_crop(self, count: int) -> None:
        """Raises ValueError unless the last `count` tokens can be taken back."""
        name = self.context.method.expression
        if count < 0:
            raise ValueError(f"crop({-count}): give the number of tokens to remove as a negative number")
        if count and not self.is_croppable:
            raise ValueError(f"crop({-count}): {name} evicts while decoding and cannot restore tokens")
        if count > self.since_eviction:
            raise ValueError(
                f"crop({-count}): {name} can take back only the {self.since_eviction} tokens since it last "
                "evicted; fork the cache before the prompt instead"
            )
        if count and self.is_initialized and not self.segments[-1].can_crop(count):
            raise ValueError(
                f"crop({-count}): layer {self.kind.number} sees {self.kind.window} tokens and has let go of older ones "
                "that it would see again; fork the cache before the tokens instead"
            )

    def crop(self, tokens_to_remove: int, real: torch.Tensor | None = None) -> None:
        """Takes back the last -tokens_to_remove tokens (the number is negative, as in transformers).

        Args:
            real: int64 [batch] on the CPU, how many of them were tokens of each row; None = as the cache noted.

        Raises:
            ValueError: a positive number, a method that cannot, or more tokens than came since the last eviction.
        """
        count = -tokens_to_remove
        self.check_crop(count)
        if not count or not self.is_initialized:
            return
        real = self.context.real_in_last(count) if real is None else real
        self.segments[-1].crop(count, real)
        self.statistics |= {name: self.statistic(name) for name in self._of_tokens()}
        self.seen -= count
        self.real_seen = self.real_seen - (count if real is None else real)
        self.since_eviction -= count
        self.collector.drop_last(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.is_initialized:
            return
        for segment in self.segments:
            segment.take_rows(beam_idx)
        self.statistics = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.statistics.items()}
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
        self,
        view: View,
        q: torch.Tensor,
        *,
        module: torch.nn.Module,
        mask: Call | torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes one forward's tokens in and returns their attention output [batch, heads, m, head_dim].

        Args:
            view: what `update` gave; the second time it comes, another layer reads the same tokens.
            mask: what our mask function made, or a mask of the caller's own [batch, 1, m, columns].
            softcap: see `Step`.
            sinks: [heads], a logit that takes part in each query's softmax and gives no output (gpt-oss).
            rotary: [3 or 1, batch or 1, m] position ids of the call.
            norms: fp32 [batch, m], row norms of hidden states, if the method asked for them.
        """
        if view.step is not None:
            return self._read_again(view, q, sinks)
        self._check(module)
        given = q.dtype
        k, v = view.k, view.v
        if not (q.dtype == k.dtype == v.dtype):  # autocast leaves rotated queries in fp32 beside values in half
            q, k, v = (x.to(v.dtype) for x in (q, k, v))
        if not self.is_initialized:
            self.lazy_initialization(k)
        if k.dtype != self.dtype:
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
        grows = torch.is_grad_enabled() and q.requires_grad
        with torch.no_grad(), _exactly(q.device.type):
            tokens = self._tokens(mask, q)
            view.tokens, self.scale, self.softcap = tokens, scale, softcap
            rope = None if rotary is None else rotary[0].expand(len(q), -1)
            view.step = Step(
                q, k, v, tokens.positions, scale, tokens.padded, rope if self.context.needs.rope else None, softcap,
                tokens.hidden, tokens.visible, getattr(mask, "local", True),
            )  # fmt: skip
            if self.context.table is not None and self.kind.number == self.context.first:
                self.context.table.write(tokens.positions, self.seen + q.shape[2], rotary)
            out = self._forward(view, q, sinks, norms)
        if out.dtype != given:
            out = out.to(given)
        return _Undifferentiable.apply(q, out) if grows else out

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One forward of this layer alone, without a model: for tests and benchmarks."""
        return self.step(View(self, k, v), q, module=self.module(), mask=None, scale=scale)

    def _check(self, module: torch.nn.Module) -> None:
        """Raise ValueError where going on would be silently wrong."""
        own = self.module()
        if own is not None and module is not own:
            raise ValueError(
                f"layer {self.kind.number}: this cache was built for another model; build one with "
                "MethodCache(model, ...) for the model that runs"
            )
        if self._torn:
            raise ValueError(
                f"layer {self.kind.number}: an earlier forward stopped inside this layer, and what it holds is not "
                "whole; reset the cache, or go on from a fork of it"
            )

    def _tokens(self, mask: Call | torch.Tensor | None, q: torch.Tensor) -> Tokens:
        if not isinstance(mask, Call):
            mask = Call(None, q.shape[2], self.seen, None) if mask is None else self.context.call_of(mask, self.seen)
        return mask.brings(self.real_seen, self.context.real, q.device)

    def _forward(self, view: View, q: torch.Tensor, sinks: torch.Tensor | None, norms) -> torch.Tensor:
        method, step, m = self.context.method, view.step, view.k.shape[2]
        prompt = (m > 1 and not self.context.verifying) or self.seen == 0 or self.seen < self.context.block_end
        governed = self.kind.governed and not self.context.frozen
        self._thaw()
        if governed and not prompt:
            with self.context.timed("on_decode_begin"):
                method.on_decode_begin(self, q)
        self._torn = True
        if view.waiting:
            out = self._attend(step, sinks, take=False)
        else:
            out = self._attend(step, sinks, take=True)
            self._end(view, prompt, norms)
        view.prompt, view.norms = prompt, norms
        self._torn = False
        return out

    def _read_again(self, view: View, q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Another layer's queries over the same tokens; what came is taken in after the last one."""
        with torch.no_grad(), _exactly(q.device.type):
            out = self._attend(replace(view.step, q=q.to(self.dtype)), sinks, take=False)
            view.waiting -= 1
            if not view.waiting:
                for segment, step in ((self.segments[-1], view.step),):
                    segment.append(step)
                self._end(view, view.prompt, view.norms)
        return out.to(q.dtype)

    def _end(self, view: View, prompt: bool, norms: torch.Tensor | None) -> None:
        """The tokens are in and every layer that reads them has: count them, and let the method act."""
        step, tokens, m = view.step, view.tokens, view.k.shape[2]
        self.seen += m
        self.real_seen, self.came = tokens.seen, tokens.came
        self.since_eviction += m
        context = self.context
        ends = prompt and self.seen >= context.block_end
        if self.kind.governed and not context.frozen:
            if prompt:
                self._collect(step, norms)
                context.note_bytes(self)
            if context.hold:
                self._due.append((ends, None if prompt else step.q))
            elif ends:
                self._prompt_end(step.q)
            elif not prompt:
                self._decode_end(step.q)
        if not context.hold and not context.frozen:
            for segment in self.segments:
                segment.settle()
        self.last_share = self.came = None
        context.after_step(self, ends and not context.hold and not context.frozen, tokens)

    def _collect(self, step: Step, norms: torch.Tensor | None) -> None:
        if self.context.needs.hidden and norms is None:
            raise RuntimeError(
                "the method needs hidden states but none arrived: build the cache as MethodCache(model, ...) with "
                "the same model that runs"
            )
        spare = SPARE if self.context.hold else 0
        self.collector.take(step, self.stored, norms=norms, rotary=self.rotary, spare=spare)

    def _prompt_end(self, q: torch.Tensor) -> None:
        evidence = self.collector.finish(q, self.scale, self.real_seen, self.context.spans)
        with self.context.timed("on_prefill_end"):
            self.context.method.on_prefill_end(self, evidence)

    def _decode_end(self, q: torch.Tensor) -> None:
        with self.context.timed("on_decode_end"):
            self.context.method.on_decode_end(self, q)

    def commit(self) -> bool:
        """What was held back is final (see `Context.hold`): let the method act now. Returns whether a block ended."""
        due, self._due = self._due, []
        for ends, query in due:
            if ends:
                self._prompt_end(self.real_seen.new_zeros(1, 1, 0, 1, dtype=self.dtype).to(self.device))
            elif query is not None:
                self._decode_end(query[:, :, -1:])
        for segment in self.segments:
            segment.settle()
        return any(ends for ends, _ in due)

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
            self.lazy_initialization(k)
        real = positions >= 0
        self.segments[-1].append(Step(observers[:, :, :0], k, v, positions, scale, padded=not bool(real.all())))
        self.scale, self.softcap = scale, None
        self.seen += k.shape[2]
        self.since_eviction += k.shape[2]
        self.real_seen = self.real_seen + real.sum(1).cpu()
        self.context.note_bytes(self)
        window = min(self.context.needs.window, observers.shape[2])
        queries = observers[:, :, observers.shape[2] - window :]
        with self.context.timed("on_prefill_end"):
            self.context.method.on_prefill_end(self, Evidence(queries, scale, self.real_seen))
        self.context.after_step(self, True, None)

    def _attend(self, step: Step, sinks: torch.Tensor | None, take: bool) -> torch.Tensor:
        last = self.segments[-1]
        others = [segment for segment in self.segments[:-1] if not segment.is_empty()]
        out, lse = (last.extend if take else last.read)(step, bool(others) or sinks is not None)
        if others:
            parts = [x.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden) for x in others]
            own = lse
            out, lse = merge([p[0] for p in parts] + [out], [p[1] for p in parts] + [lse])
            if step.q.shape[2] == 1:
                self.last_share = (own - lse).exp()
        if sinks is not None:
            # One more entry of the softmax, which has no value: its share is what the output lacks.
            out = out * (lse - sinks.float()[:, None]).sigmoid()[..., None].to(out.dtype)
        return out

    def _thaw(self) -> None:
        """Tensors made under inference_mode cannot be written to outside of it: they are copied once."""
        if torch.is_inference_mode_enabled():
            self.context.frosted = True
        elif self.context.frosted:
            self.context.thaw()

    # ---- what methods use --------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """What the layer holds, all segments side by side, padded to one length (holes have position -1)."""
        parts = [segment.stored() for segment in self._known()]
        if len(parts) == 1:
            return parts[0]
        return Stored(*(torch.cat([getattr(p, f) for p in parts], 2) for f in ("keys", "values", "positions")))

    def held_positions(self) -> torch.Tensor:
        """The positions of `stored()`, without unpacking what is packed: int32 [batch, stored heads, n], -1 = hole."""
        parts = [segment.held_positions() for segment in self._known()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @property
    def whole(self) -> int | None:
        """Slots of a layer that is one rectangle of tokens, as far as the host knows; None = there are holes, or
        several segments. What a method asks at every decoded token is answered from this, not by the device."""
        segment = self.segments[0]
        if len(self.segments) == 1 and isinstance(segment, DenseSegment) and not segment.holes:
            return segment.used
        return None

    def statistic(self, name: str) -> torch.Tensor:
        """The numbers that a method keeps per stored token: fp32 [batch, stored heads, n], slot by slot of `stored()`.
        They move and go with their tokens; a token that came since they were set, or a hole, has 0. Set them through
        `statistics[name]`. (Those whose names begin with OF_HEAD have any width, and are asked for there.)
        """
        if self.whole is not None and name in self.statistics:
            known = self.statistics[name]
            return known if known.shape[-1] == self.whole else F.pad(known, (0, self.whole - known.shape[-1]))
        positions = self.held_positions()
        known = self.statistics.get(name, positions.new_zeros((*positions.shape[:2], 0), dtype=torch.float32))
        known = known[..., : positions.shape[-1]]
        known = F.pad(known, (0, positions.shape[-1] - known.shape[-1]))
        return known.masked_fill(positions < 0, 0)

    def _known(self) -> list[Segment]:
        """The segments without those that nothing ever came to: they do not know the shape of a token."""
        if len(self.segments) == 1:
            return self.segments
        return [segment for segment in self.segments if segment.tensors()] or self.segments[-1:]

    def _of_tokens(self) -> list[str]:
        """The statistics that tokens have, which move and go with them."""
        return [name for name in self.statistics if not name.startswith(OF_HEAD)]

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots `index` int64 [batch, kv_heads or 1, c] of `stored()`, ascending, -1 = hole; frees the others.
        The method's `on_evict` hears what stayed."""
        known = {name: self.statistic(name) for name in self._of_tokens()}
        before, several = self.held_positions(), len(self.segments) > 1
        self.segments = keep_across(self.segments, index)
        self.since_eviction = 0
        pick = index.expand(-1, before.shape[1], -1)
        for name, x in known.items():
            told = self.statistics[name].shape[-1]
            if several:  # each keeps its slots in its own way: what moved where is told by positions alone
                x = _found_again(x, before, self.held_positions())
            else:
                x = x.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, 0)
            if told < before.shape[-1]:  # tokens that came since have 0: no room for that
                used = (x != 0).flatten(0, 1).any(0).nonzero()
                x = x[..., : int(used.max()) + 1 if len(used) else 0].clone()
            self.statistics[name] = x
        self.context.method.on_evict(self, before.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, -1))

    def drop_lowest(self, scores: torch.Tensor) -> None:
        """Lets go of the one token of each head with the lowest score, fp32 [batch, stored heads, n], in a layer that
        is `whole`; of equal ones the newest. Asks nothing of the device."""
        n = scores.shape[-1]
        victim = n - 1 - scores.flip(-1).argmin(-1, keepdim=True)
        slots = torch.arange(n - 1, device=scores.device)
        index = slots + (slots >= victim)
        self.statistics |= {name: self.statistic(name).gather(-1, index) for name in self._of_tokens()}
        self.segments[0].pick(index)
        self.since_eviction = 0
        self.context.method.on_evict(self, self.segments[0].held_positions())

    def keep_mask(self, mask: torch.Tensor) -> None:
        """Keeps the slots where bool [batch, kv_heads, n] is True, each head its own number of them."""
        before = self.held_positions()
        mask = mask & (before >= 0)
        # Ragged heads show their tokens first and their missing slots last.
        order = (~mask).sort(dim=-1, stable=True).indices[..., : int(mask.sum(-1).max())]
        missing = ~mask.gather(-1, order)
        self.statistics |= {
            name: self.statistic(name).gather(-1, order).masked_fill(missing, 0) for name in self._of_tokens()
        }
        first, kept = 0, []
        for segment in self.segments:
            size = segment.held_positions().shape[2] if segment.tensors() else 0
            if not size:
                kept.append(segment)
                continue
            kept.append(segment.keep_mask(mask[..., first : first + size]))
            first += size
        self.segments = kept
        self.since_eviction = 0
        self.context.method.on_evict(self, before.gather(-1, order).masked_fill(missing, -1))

    def forget(self, gone: torch.Tensor) -> None:
        """Drops the tokens at the logical positions where bool [batch, p] is True, whatever holds them."""
        if not self.is_initialized:
            return
        at = self.held_positions()
        known = (at >= 0) & (at < gone.shape[1])
        table = gone[:, None].expand(-1, at.shape[1], -1)
        dropped = known & table.gather(-1, at.long().clamp(0, gone.shape[1] - 1))
        if not bool(dropped.any()):
            return
        stays = (at >= 0) & ~dropped
        if bool((stays == stays[:, :1]).all()):
            stays = stays[:, :1]
        order = (~stays).sort(dim=-1, stable=True).indices[..., : int(stays.sum(-1).max())]
        self.keep(order.masked_fill(~stays.gather(-1, order), -1))

    def replace(self, segments: list[Segment]) -> None:
        """Puts other segments in place of what is stored; the method has moved over what it keeps (statistics are
        gone)."""
        self.segments = segments
        self.statistics = {}
        self.since_eviction = 0

    def repeat_heads(self, times: int) -> None:
        """From now on every KV head is stored `times` times, once per query head of its group."""
        last = self.segments[-1]
        if len(self.segments) > 1 or not isinstance(last, DenseSegment):
            last = DenseSegment.of(self.stored(), last.head_repeat if isinstance(last, DenseSegment) else 1)
        last.repeat_heads(times)
        self.segments = [last]

    # ---- counting ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the layer holds: its segments' by "segment.name", its statistics by "statistic.name"."""
        held = {f"{i}.{name}": x for i, s in enumerate(self.segments) for name, x in s.tensors().items()}
        return held | {f"statistic.{name}": x for name, x in self.statistics.items()}

    def host_bytes(self) -> int:
        """Bytes that segments hold in host memory although the model runs on a device."""
        return sum(segment.host_bytes() for segment in self.segments)

    def kv_bytes(self) -> int:
        """Bytes of all storages that the layer keeps alive on the model's device, positions and lengths included."""
        host = {id(x) for segment in self.segments for x in segment.host_tensors().values()}
        return storage_bytes([x for x in self.tensors().values() if id(x) not in host])

    def full_bytes(self) -> int:
        """Bytes of K and V that the model's own cache holds after the same tokens."""
        if not self.is_initialized:
            return 0
        seen = self.seen if self.kind.window is None else min(self.seen, self.kind.window - 1)
        return 2 * len(self.real_seen) * self.kv_heads * seen * self.head_dim * self.dtype.itemsize

    def lengths(self) -> torch.Tensor:
        """Tokens stored, int64 [batch, stored heads], on the CPU."""
        return sum(segment.lengths() for segment in self._known())

    def bind(self, module: torch.nn.Module | None) -> None:
        """Ties the layer to the module whose keys it holds."""
        self.module = (lambda: None) if module is None else ref(module)


class HybridLayer(LinearAttentionLayer, Layer):
    """Attention and a linear state in one layer of the model: the attention is ours, the state transformers'."""

    def __init__(self, kind: LayerKind, context: Context, index: int) -> None:
        LinearAttentionLayer.__init__(self, **{k: v for k, v in kind.options.items() if k == "number_of_states"})
        Layer.__init__(self, kind, context, index)

    def lazy_initialization(self, *args: torch.Tensor, **kwargs: Any) -> None:
        # transformers hands a state to one and keys and values to the other, under one name.
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        else:
            Layer.lazy_initialization(self, *args)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        Layer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        Layer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        Layer.crop(self, tokens_to_remove)

    get_max_length = Layer.get_max_length


def _found_again(x: torch.Tensor, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Numbers [batch, heads, n] of tokens at positions `before`, int32 like them, for those at `now`; a hole has 0."""
    size = int(before.max()) + 1
    table = x.new_zeros(*x.shape[:2], size + 1)
    table.scatter_(-1, before.long().masked_fill(before < 0, size), x)
    table[..., size] = 0
    return table.gather(-1, now.long().masked_fill(now < 0, size))


def _exactly(device: str):
    """Autocast has had its say when keys and values arrive: from here on dtypes are ours to choose."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Undifferentiable(torch.autograd.Function):
    """Hands an output on; a backward pass through it is an error instead of a silently missing gradient."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "no gradients flow through a cache that a method keeps: train without past_key_values (use_cache=False)"
        )
