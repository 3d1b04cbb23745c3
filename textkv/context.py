"""What a layer, a segment or a method may know of the cache that it belongs to.

One context per cache. It knows the layers; nobody needs to know the cache itself, so that modules form no circle.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from textkv.call import Call, Tokens
from textkv.evidence import Needs, Spans
from textkv.kinds import LayerKind
from textkv.positions import PositionTable, RotarySpec
from textkv.screens import Grid, Grids, Span
from textkv.segments.base import storage_bytes

ATTENTION = "textkv"
"""How the names begin under which our attention and mask functions are registered with transformers."""


@dataclass(frozen=True)
class AtRest:
    """The cache right after a prompt block was compressed, before the next token is decoded.

    Attributes:
        kv_bytes: bytes held by all layers on the model's device, bookkeeping included.
        full_bytes: bytes that the model's own cache holds after the same tokens.
        tokens_stored: mean over governed layers, rows and stored heads.
        kept: per governed layer int32 [batch, stored heads, n] logical positions on the CPU, -1 = none.
        host_bytes: bytes held in host memory although the model runs on a device.
    """

    kv_bytes: int
    full_bytes: int
    tokens_stored: float
    kept: tuple[torch.Tensor, ...]
    host_bytes: int = 0


class Policy(Protocol):
    """What the core calls of a method: the hooks of `textkv.method.Method`, which says when and what they may do."""

    def needs(self) -> Needs:
        """What the cache is to collect for the method; asked once, when the cache is built."""

    def on_build(self, context: Context) -> None:
        """A cache was built; what does not fit its model is refused here."""

    def on_start(self, layer: Any) -> None:
        """The layer knows its heads, dtype and device; no token is stored. Comes again after a reset."""

    def on_prefill_end(self, layer: Any, evidence: Any) -> None:
        """The layer has a whole prompt block; `evidence` is a `textkv.evidence.Evidence`."""

    def on_decode_begin(self, layer: Any, query: torch.Tensor) -> None:
        """Queries [batch, heads, m, head_dim] come to what is stored; m > 1 where drafts are verified."""

    def on_decode_end(self, layer: Any, query: torch.Tensor) -> None:
        """A token is stored, its query [batch, heads, 1, head_dim]; for drafts once a forward, when they are final."""

    def on_evict(self, layer: Any, kept: torch.Tensor) -> None:
        """Only `kept` is left: int32 [batch, stored heads, c] logical positions, -1 = none."""

    def on_finish(self, context: Context) -> None:
        """All governed layers are through with a prompt block."""


@dataclass
class Context:
    """State that all layers of one cache share.

    Attributes:
        method: the policy.
        needs: the evidence that it asks for.
        config: configuration of the model's text decoder.
        kinds: what each layer of the model is.
        layers: the layers that the method governs, in the order of the model. The budget counts these.
        rotary: how the keys of a layer turn, by the layer's number in the model; filled if the method asks for `rope`.
        rotary_unknown: why `rotary` is empty although positions were asked for.
        spans: screenshots of the conversation, logical positions per row.
        screens: grids of screenshots by their spans, per row; empty = not told.
        block_end: columns seen at the end of the prompt block being read.
        came: int64 [batch] on the CPU while hooks run, real tokens that each row got; None = all got as many. 0 = the
            hook has nothing to do in that row.
        table: the position table, if the method asks for one and a token has more than one rotary position.
        forgotten: bool [batch, positions] on the CPU, the logical positions that `MethodCache.forget` dropped, or None.
        real: bool [batch, columns], which columns so far were tokens and not padding; None = all.
        hold: what a forward brings may be taken back (speculative decoding): nothing is let go of before `crop`.
        forwards: forwards since `hold` began. The first one reads a prompt, the others verify drafts.
        frozen: nothing is evicted and no evidence collected until further notice.
        frosted: whether a forward ran under inference_mode, so that tensors held may not be written to outside of it.
        everything: all layers of the model that store something, transformers' own among them.
        seconds: seconds per hook so far.
        peak_bytes: the most bytes held so far.
        at_rest: the cache as it was at the end of the last prompt block.
    """

    method: Policy
    needs: Needs
    config: PreTrainedConfig
    kinds: tuple[LayerKind, ...] = ()
    layers: list[Any] = field(default_factory=list)
    everything: list[Any] = field(default_factory=list)
    rotary: dict[int, RotarySpec] = field(default_factory=dict)
    rotary_unknown: str = ""
    spans: Spans = field(default_factory=list)
    screens: list[dict[Span, Grid]] = field(default_factory=list)
    block_end: int = 0
    came: torch.Tensor | None = None
    table: PositionTable | None = None
    forgotten: torch.Tensor | None = None
    real: torch.Tensor | None = None
    hold: bool = False
    forwards: int = 0
    frozen: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    frosted: bool = False
    peak_bytes: int = 0
    at_rest: AtRest | None = None
    _bytes: dict[int, int] = field(default_factory=dict)
    _held: int = 0

    @property
    def governed(self) -> int:
        """How many layers the method governs."""
        return len(self.layers)

    @property
    def first(self) -> int:
        """Number of the first layer that stores tokens."""
        return next(kind.number for kind in self.kinds if kind.attends)

    @property
    def last(self) -> int:
        """Number of the last layer that stores tokens."""
        return next(kind.number for kind in reversed(self.kinds) if kind.attends)

    @property
    def verifying(self) -> bool:
        """Whether several tokens of a forward are a draft and no prompt."""
        return self.hold and self.forwards > 0

    def seen(self) -> int:
        """Tokens that every layer has seen. While a forward runs, or after one that stopped half-way, some layers are
        ahead; what comes next still follows those before."""
        # transformers' own layers count tokens in their own way, and states not at all.
        return min((layer.seen for layer in self.everything if hasattr(layer, "segments")), default=0)

    @property
    def grids(self) -> Grids:
        """The grids of `spans`; empty = not told."""
        return [
            [known[span] for span in row] for row, known in zip(self.spans, self.screens, strict=bool(self.screens))
        ]

    def check_pictures(self) -> None:
        """A call brings pictures.

        Raises:
            ValueError: the method asks where they lie, and nobody said it of any that comes now.
        """
        seen = self.layers[0].real_seen if self.layers else None
        before = [0] * len(self.spans) if seen is None else seen.tolist()
        if self.needs.spans and not any(row and row[-1][1] > n for row, n in zip(self.spans, before, strict=False)):
            raise ValueError(
                f"{self.method.expression} asks where the screenshots of a prompt lie, which nobody told of this one: "
                "call cache.begin(**inputs, spans=..., grids=...) before, with what agentkv.spans finds"
            )

    def forget(self, gone: torch.Tensor) -> None:
        """Writes down which logical positions were dropped on demand: bool [batch, p]."""
        before = torch.zeros_like(gone[:, :0]) if self.forgotten is None else self.forgotten
        width = max(before.shape[1], gone.shape[1])
        padded = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (before, gone))
        self.forgotten = torch.logical_or(*padded)
        # Of a screenshot that is gone nothing may be expected, and none is the current one.
        rows = zip(self.spans, self.forgotten, strict=False)
        self.spans = [[x for x in spans if not bool(row[x[0] : x[1]].all())] for spans, row in rows]

    @property
    def gone(self) -> torch.Tensor | None:
        """How many of each row's tokens were forgotten on demand, int64 [batch]; None = none of any row."""
        return None if self.forgotten is None else self.forgotten.sum(1)

    def remember(self, real_seen: torch.Tensor) -> None:
        """Tokens from position real_seen, int64 [batch], on were taken back: others may stand there now."""
        if self.forgotten is not None:
            self.forgotten = self.forgotten & (torch.arange(self.forgotten.shape[1]) < real_seen[:, None])

    def check_attention(self) -> None:
        """Raises ValueError if the model was switched away from our attention implementation."""
        # Somebody may call `set_attn_implementation` after the cache was built: a view has no numbers for another
        # function.
        if not self.config._attn_implementation.startswith(ATTENTION):
            raise ValueError(
                f"the model runs attention {self.config._attn_implementation!r}, which cannot read this cache; "
                "call textkv.use(model) first"
            )

    def call_of(self, mask: torch.Tensor, past: int) -> Call:
        """The call that a mask of the caller's own [batch, 1, m, past + m] means."""
        return Call.of_mask(mask, past)

    # ---- what layers report ------------------------------------------------------------------------------------

    def after_step(self, layer: Any, ended: bool, tokens: Tokens | None) -> None:
        """A layer is done with a forward; `ended`: and with a prompt block."""
        self.note_bytes(layer)
        # All layers of a forward must see the columns as they were before it.
        if tokens is not None and layer.kind.number == self.last:
            self.real = tokens.real
            self.forwards += 1
        if ended and layer is self._closing():
            self.finish()
        self.came = None  # what comes between forwards, and a next layer's start, is of no forward

    def _closing(self) -> Any:
        """The layer with which a prompt block ends: the last governed one, or the last at all if none is."""
        own = self.layers or [layer for layer in self.everything if hasattr(layer, "segments")]
        return own[-1]

    def finish(self) -> None:
        """All governed layers are through with a prompt block."""
        with self.timed("on_finish"):
            self.method.on_finish(self)
        own = self.layers or [layer for layer in self.everything if hasattr(layer, "segments")]
        lengths = [layer.lengths().float() for layer in own]
        self.at_rest = AtRest(
            kv_bytes=self.kv_bytes(),
            host_bytes=sum(layer.host_bytes() for layer in own),
            full_bytes=self.full_bytes(),
            tokens_stored=float(torch.stack([n.mean() for n in lengths]).mean()),
            kept=tuple(layer.held_positions().cpu() for layer in own),
        )

    def real_in_last(self, columns: int) -> torch.Tensor | None:
        """How many of the last columns were tokens of each row, int64 [batch] on the CPU; None = all."""
        return None if self.real is None else self.real[:, self.real.shape[1] - columns :].sum(1).cpu()

    def stay_writable(self) -> None:
        """Tensors made under inference_mode cannot be written to outside of it: there all are copied once."""
        if torch.is_inference_mode_enabled():
            self.frosted = True
        elif self.frosted:
            self._thaw()

    def _thaw(self) -> None:
        # One memo for all layers, so that what two of them share is still shared afterwards.
        memo: dict = {}
        for layer in self.everything:
            if hasattr(layer, "segments"):
                layer.segments = copy.deepcopy(layer.segments, memo)
                layer.statistics = {name: x.clone() for name, x in layer.statistics.items()}
                layer.trajectory = {name: x.clone() for name, x in layer.trajectory.items()}
            for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
                for number, x in (states or {}).items():
                    states[number] = None if x is None else x.clone()
        self.frosted = False
        self.table = copy.deepcopy(self.table)

    # ---- counting ----------------------------------------------------------------------------------------------

    def note_bytes(self, layer: Any) -> None:
        """Counts a layer's bytes at a moment when they may be at their highest."""
        # Only this layer has changed since: the others are as they were when they last told.
        number, now = layer.kind.number, layer.kv_bytes()
        self._held += now - self._bytes.get(number, 0)
        self._bytes[number] = now
        self.peak_bytes = max(self.peak_bytes, self._held + self.table_bytes() + self.state_bytes())

    def forget_bytes(self) -> None:
        """The cache is empty: what layers held at their last moment no longer counts, only the peak does."""
        # The peak stays: it is of the cache's life, not of its present content.
        self._bytes, self._held, self.at_rest = {}, 0, None

    def kv_bytes(self) -> int:
        """Bytes held now on the model's device: every storage that the cache keeps alive, counted once."""
        own = sum(layer.kv_bytes() for layer in self.everything if hasattr(layer, "kv_bytes"))
        return own + self.table_bytes() + self.state_bytes()

    def full_bytes(self) -> int:
        """Bytes that the model's own cache holds after the same tokens."""
        own = sum(layer.full_bytes() for layer in self.everything if hasattr(layer, "full_bytes"))
        return own + self.state_bytes()

    def table_bytes(self) -> int:
        """Bytes of the position table."""
        return 0 if self.table is None else self.table.kv_bytes()

    def state_bytes(self) -> int:
        """Bytes of linear and convolution states, which transformers' own layers hold."""
        held: list[torch.Tensor] = []
        for layer in self._stateful:
            for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
                held += [x for x in (states or {}).values() if x is not None]
        return storage_bytes(held) if held else 0

    @cached_property
    def _stateful(self) -> list[Any]:
        """Layers of `everything` that hold states: asked for at every token, while most models have none."""
        return [x for x in self.everything if hasattr(x, "conv_states") or hasattr(x, "recurrent_states")]

    @contextmanager
    def timed(self, hook: str) -> Iterator[None]:
        """Adds the seconds that pass inside to those of a hook."""
        start = perf_counter()
        yield
        self.seconds[hook] = self.seconds.get(hook, 0.0) + perf_counter() - start
