"""One layer of a cache: its segments, its counters, and the moments at which the method may act.

`update` (called by the model) only wraps the new keys and values in a small view; the model carries it to our
attention function, which calls `step`. There queries, keys and mask meet, so there tokens are stored and evicted.

Two lengths everywhere: tokens SEEN (logical, what positions and masks count) and tokens STORED (physical).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from textkv.call import Call, Tokens, check_mask_dtype
from textkv.collector import EvidenceCollector
from textkv.context import Context
from textkv.kernels import merge
from textkv.kernels.beside import Exact
from textkv.kinds import LayerKind
from textkv.modes import Undifferentiable, exactly
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Step
from textkv.segments.dense import DenseSegment
from textkv.segments.window import WindowSegment
from textkv.softmax import Softmax
from textkv.takeback import Takeback


class View:
    """What `update` returns in place of keys and values: the new tokens [batch, kv_heads, m, head_dim] and the way back
    to their layer. Layers that read another one's keys get the same view.

    It has a tensor's shape, dtype and device, for libraries that look at these on the way.
    """

    def __init__(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        # So many later layers will read these tokens: they are stored when the last one has.
        self.waiting = layer.kind.readers
        self.step: Step | None = None
        self.tokens: Tokens | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the new keys, [batch, kv_heads, m, head_dim]."""
        return self.k.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys as the model gave them; the layer may store another."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """That of the new keys."""
        return self.k.device


class Layer(Takeback, CacheLayerMixin):
    """One layer's store, driven by the method of its cache.

    Attributes:
        context: what the layers of the cache share.
        kind: what the layer is in the model.
        index: its place among the layers that the method governs; -1 = not governed.
        segments: what holds the tokens; the last one takes new tokens in.
        seen: tokens seen per row, padding included: what transformers calls the sequence length.
        real_seen: int64 [batch] on the CPU, tokens seen without padding.
        since_eviction: tokens taken in since the method last changed what is stored: what `crop` can take back.
        changes: how often the method changed what is stored.
        notes: what the method wrote down about this layer for its `on_finish`, which takes it out again.
        statistics: numbers that a method keeps per stored token, by name; see `statistic`.
        trajectory: what a method learned from the steps of an agent so far, by name, row by row [batch, ...]. It
            outlives `reset`; `MethodCache.new_trajectory` ends it.
        softmax: how the model weighs this layer's scores, from the first forward on; sinks are there while hooks run.
        hidden: bool [batch, p] while a hook runs, what the mask hid from this forward, see `Step`; None = nothing.
        last_share: fp32 [batch, heads, 1] while `on_decode_end` runs in a layer of several segments: the part of the
            token's attention that fell on the last one.
        last_row: fp32 [batch, heads, n], at the same time, what the token looked at of the last segment's tokens,
            out of all that it looked at; None where it was not told.
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
        self.trajectory: dict[str, torch.Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        self.segments: list[Segment] = [self._fresh()]
        self.seen = 0
        self.real_seen: torch.Tensor | None = None
        self.since_eviction = self.changes = 0
        self.is_initialized = False
        self.collector.clear()
        self.notes: dict[str, Any] = {}
        self.statistics: dict[str, torch.Tensor] = {}
        self.softmax = Softmax(1.0)
        self.last_share = self.last_row = self.hidden = None
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
        """Learns dtype, device and heads from keys [batch, kv_heads, m, head_dim]; then comes `on_start`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Only keys tell what a layer really has: configurations differ in what they call a head.
        self.kv_heads, self.head_dim = key_states.shape[1], key_states.shape[3]
        self.real_seen = torch.zeros(key_states.shape[0], dtype=torch.int64)
        # Rows of another number are other trajectories.
        self.trajectory = {name: x for name, x in self.trajectory.items() if len(x) == len(key_states)}
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
        # Both are the view: whichever the model looks at on the way, it finds a shape and a dtype.
        view = View(self, key_states, value_states)
        return view, view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask (all tokens seen, padding included, and the new ones) and their offset."""
        # False counts as an offset of 0 and tells our mask function that one of our layers is asking.
        return self.context.seen() + query_length, False

    def get_seq_length(self) -> int:
        """Tokens that every layer of the cache has seen, padding included, however many are stored."""
        return self.context.seen()

    def get_max_length(self) -> int:
        """-1 = no limit: a method bounds what is stored, not what may come."""
        return -1

    def reset(self) -> None:
        """Forgets tokens, statistics and notes; the next keys begin anew, with any batch size and dtype. A trajectory
        goes on, if rows are as many."""
        self._clear()

    def offload(self) -> None:
        """Raises ValueError, as does `prefetch`: segments are not the two tensors that transformers moves."""
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
        hidden: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes one forward's tokens in and returns their attention output [batch, heads, m, head_dim].

        Args:
            view: what `update` gave; the second time it comes, another layer reads the same tokens.
            mask: what our mask function made, or a mask of the caller's own [batch, 1, m, columns].
            scale, softcap, sinks: see `Softmax`.
            rotary: [3 or 1, batch or 1, m] position ids of the call.
            hidden: [batch, m, hidden_size], hidden states, if the method asked for them.
            ids: int64 [batch, m], token ids, if the method asked for them.
        """
        if view.step is not None:
            return self._read_again(view, q, sinks)
        self._check(module)
        # The model goes on in the dtype of its queries, whatever the cache stores.
        given = q.dtype
        k, v = view.k, view.v
        if not (q.dtype == k.dtype == v.dtype):  # autocast leaves rotated queries in fp32 beside values in half
            q, k, v = (x.to(v.dtype) for x in (q, k, v))
        if not self.is_initialized:
            self.lazy_initialization(k)
        # The model was cast after its first tokens: the cache keeps the dtype that it began with.
        if k.dtype != self.dtype:
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
        # What is stored is used again by later calls: no graph may hang on to it.
        grows = torch.is_grad_enabled() and q.requires_grad
        with torch.no_grad(), exactly(q.device.type):
            mask, tokens = self._tokens(mask, q)
            sinks = None if sinks is None else sinks.detach()
            view.tokens, self.softmax = tokens, Softmax(scale, softcap, sinks)
            rope = rotary[0].expand(len(q), -1) if rotary is not None and self.context.needs.rope else None
            view.step = Step(
                q, k, v, tokens.positions, scale, tokens.padded, rope, softcap, sinks, tokens.hidden, tokens.visible,
                mask.local, ids,
            )  # fmt: skip
            if self.context.table is not None and self.kind.number == self.context.first:
                self.context.table.write(tokens.positions, self.seen + q.shape[2], rotary)
            out = self._forward(view, q, hidden)
        if out.dtype != given:
            out = out.to(given)
        return Undifferentiable.apply(q, out) if grows else out

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

    def _tokens(self, mask: Call | torch.Tensor | None, q: torch.Tensor) -> tuple[Call, Tokens]:
        # A test, a benchmark, or a caller who passes a mask of all heads: no mask function of ours was asked.
        if not isinstance(mask, Call):
            mask = Call(None, q.shape[2], self.seen, None) if mask is None else self._call_of(mask)
        return mask, mask.brings(self.real_seen, self.context.real, q.device)

    def _call_of(self, mask: torch.Tensor) -> Call:
        """The call that a mask of the caller's own means. For a layer with a window it may be as narrow as what
        transformers' cache shows of such a layer; then it is the caller who says what the window hides."""
        window = self.kind.window
        if window is None or mask.dim() != 4:
            return self.context.call_of(mask, self.seen)
        check_mask_dtype(mask)
        gone = max(0, self.seen - window + 1)
        told = mask.shape[3] == self.seen - gone + mask.shape[2]
        if told:  # what has left the window is hidden
            hides = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (gone, 0), value=hides)
        call = self.context.call_of(mask, self.seen)
        call.local = not told
        return call

    def _forward(self, view: View, q: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        step, m = view.step, view.k.shape[2]
        prompt = (m > 1 and not self.context.verifying) or self.seen == 0 or self.seen < self.context.block_end
        self.context.stay_writable()
        if prompt or m > 1:
            self.tidy()
        block = self._block_before_drafts(view)
        if block:
            return self._block_and_drafts(view, block, hidden)
        if not view.waiting:
            return self._take(step, view.tokens, prompt, hidden)
        self._before(q, prompt)
        self._torn = True
        out, lse = self._attend(step, take=False)
        view.prompt, view.hidden, view.lse = prompt, hidden, lse
        self._torn = False
        return out

    def _before(self, q: torch.Tensor, prompt: bool) -> None:
        """Before the token is stored: a method may fetch what this query will want."""
        if self.kind.governed and not self.context.frozen and not prompt:
            with self.context.timed("on_decode_begin"):
                self.context.method.on_decode_begin(self, q)

    def _take(
        self, step: Step, tokens: Tokens, prompt: bool, hidden: torch.Tensor | None, final: bool = False
    ) -> torch.Tensor:
        """Attends and takes the tokens in; `final`: none of them will be taken back, whatever else may be."""
        self._before(step.q, prompt)
        # Until the output is there. An exception in between leaves segments half-changed.
        self._torn = True
        out, lse = self._attend(step, take=True)
        self._end(step, tokens, prompt, hidden, lse, final)
        self._torn = False
        return out

    def _block_before_drafts(self, view: View) -> int:
        """How many of a forward's tokens are the end of the prompt block that was announced, where drafts follow it
        that shall see no more than what the method keeps of the block; 0 = they are not told apart."""
        context, step = self.context, view.step
        block = context.block_end - self.seen
        # What needs all layers is only known when the drafts are through the first ones: these then see the whole
        # prompt, as its own tokens do.
        apart = context.hold and self.kind.governed and not context.frozen and not context.method.looks_across
        plain = not step.padded and step.hidden is None and step.visible is None and not view.waiting
        return block if apart and plain and 0 < block < view.k.shape[2] else 0

    def _block_and_drafts(self, view: View, block: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """The prompt block's own `block` tokens, after which the method acts, and then the drafts."""
        drafts = view.k.shape[2] - block
        tokens = replace(view.tokens, positions=view.tokens.positions[:, :block], seen=view.tokens.seen - drafts)
        first, second = slice(None, block), slice(block, None)
        of_block = None if hidden is None else hidden[:, first]
        out = self._take(view.step.part(first), tokens, True, of_block, final=True)
        return torch.cat([out, self._take(view.step.part(second), view.tokens, False, None)], 2)

    def _read_again(self, view: View, q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Another layer's queries over the same tokens; what came is taken in after the last one."""
        with torch.no_grad(), exactly(q.device.type):
            share = self.last_share
            out, _ = self._attend(replace(view.step, q=q.to(self.dtype), sinks=sinks), take=False)
            self.last_share = share  # a method acts by what the layer's own query looked at
            view.waiting -= 1
            if not view.waiting:
                self.segments[-1].append(view.step)
                self._end(view.step, view.tokens, view.prompt, view.hidden, view.lse)
        return out.to(q.dtype)

    def _attend(self, step: Step, take: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the log-sum-exp of the scores without sinks, where it was needed or came by itself."""
        last, sinks = self.segments[-1], step.sinks
        others = [segment for segment in self.segments[:-1] if not segment.is_empty()]
        if take and others and (found := self._beside(step, others, last, sinks is not None)):
            out, lse, *row = found
            self.last_row = _beside_sinks(row[0], lse, sinks) if row else None
            return _beside_sinks(out, lse, sinks), lse
        # For columns it spares half the work, and on a CPU fused attention tells it anyway.
        counted = self.context.needs.columns and step.q.is_cpu and step.q.shape[2] > 1
        out, lse = (last.extend if take else last.read)(step, bool(others) or sinks is not None or counted)
        if others:
            parts = [x.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden) for x in others]
            own = lse
            out, lse = merge([p[0] for p in parts] + [out], [p[1] for p in parts] + [lse])
            # How much of the token's attention stayed in the newest segment: methods that evict there need no second
            # pass.
            if step.q.shape[2] == 1 or step.padded:  # a padded row's last token may be a decoded one
                self.last_share = _beside_sinks((own - lse)[..., -1:].exp(), lse[..., -1:], sinks)
        return _beside_sinks(out, lse, sinks), lse

    def _beside(self, step: Step, others: list[Segment], last: Segment, need_lse: bool) -> tuple | None:
        """A decoded token that takes part in one softmax with packed tokens and the exact ones behind them; it is
        stored. None, and nothing has been done, where that is not what the layer holds."""
        packed = others[0]
        if step.q.shape[2] > 1 or step.padded or step.hidden is not None or not packed.takes_beside:
            return None
        between = [segment.rectangle() for segment in others[1:]]
        if last.rectangle() is None or None in between:
            return None
        last.append(step)
        exact = [*between, last.rectangle()]
        row = self.kind.governed and self.context.method.counts_last
        return packed.attend_beside(step.q, step.scale, step.softcap, Exact(exact, lse=need_lse, row=row))

    def bind(self, module: torch.nn.Module | None) -> None:
        """Ties the layer to the module whose keys it holds."""
        self.module = (lambda: None) if module is None else ref(module)


def _beside_sinks(out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Outputs, or a decoded token's weights fp32 [batch, heads, n], of a softmax in which sinks took part too."""
    if sinks is None:
        return out
    # One more entry of the softmax, which has no value: its share is what the output lacks.
    part = (lse - sinks.float()[:, None]).sigmoid().to(out.dtype)
    return out * (part[..., None] if out.dim() == 4 else part)
