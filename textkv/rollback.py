"""Going back: `crop`, drafts that were not accepted, and calls of the model that stopped half-way.

What was taken in and not yet evicted can be taken back. A call that raised left some layers ahead of others, or all of
them ahead of what the caller knows: the next call goes back to where that one began, or is refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from textkv.context import Context
from textkv.layer import Layer
from textkv.positions import PositionTable

_STATES = (
    "an earlier forward stopped after layer {}, and linear states cannot be taken back: reset the cache, or go on from "
    "a fork of it"
)


@dataclass(frozen=True)
class Start:
    """Where a call of the model began.

    Attributes:
        seen: columns seen before it.
        real: int64 [batch] on the CPU, real tokens seen before it; None = no token at all.
        due: prompt blocks and queries of a layer that waited for `Layer.commit`.
        changes: `changes` of every layer by its number; empty = not known, for the call began unseen.
    """

    seen: int
    real: torch.Tensor | None
    due: int
    changes: dict[int, int]


class Rollback(Cache):
    """The part of a cache that goes back; see `textkv.cache.MethodCache` for its attributes."""

    context: Context
    layers: list[Any]
    _through: set[tuple[int, str]]
    _start: Start | None
    _dtype: torch.dtype
    _model: Callable[[], PreTrainedModel | None]
    bind: Callable[[PreTrainedModel], None]

    # ---- the model's calls, one after another ------------------------------------------------------------------

    def call_begins(self, pictures: bool = False) -> None:
        """The model is called with this cache. If the call before stopped half-way, all layers go back to its start.

        Args:
            pictures: whether the call brings any.

        Raises:
            ValueError: they cannot, or the method asks where pictures lie and was not told.
        """
        # Some models write to states in place without a word to their cache.
        self.context.stay_writable()
        if self._start is not None and not self._start.seen:
            self._empty()  # there was nothing before: nothing that any layer or state holds is wanted
        elif self._start is not None:
            if self._through:
                raise ValueError(_STATES.format(max(number for number, _ in self._through)))
            self._go_back(self._start)
        if not self.get_seq_length():
            self._bind_if_cast()
        if pictures:
            self.context.check_pictures()
        self._start = replace(self._here(), changes={x.kind.number: x.changes for x in self._own()})

    def _bind_if_cast(self) -> None:
        """An empty cache is bound anew to a model that was cast since: its rotary tables were rounded with it."""
        model = self._model()
        if model is not None and model.dtype != self._dtype:
            self.bind(model)

    def call_ends(self) -> None:
        """The model's call has come to its end: what it brought stays."""
        self._start = None
        self._through = set()

    def _here(self) -> Start:
        behind = min(self._own(), key=lambda layer: layer.seen)
        # The layer that has seen least is where every layer can go back to.
        return Start(behind.seen, behind.real_seen, min((len(x._due) for x in self.context.layers), default=0), {})

    def _go_back(self, to: Start) -> None:
        ahead = [layer for layer in self._own() if layer.seen > to.seen]
        for layer in ahead:
            if not to.seen:
                layer.reset()
                continue
            try:
                if layer.changes != to.changes.get(layer.kind.number, layer.changes):
                    raise ValueError(f"{self.context.method.expression} has worked on what older tokens hold since")
                layer.crop(to.seen - layer.seen, layer.real_seen - to.real)
            except ValueError as error:
                raise ValueError(
                    f"an earlier forward stopped after layer {layer.kind.number} and cannot be taken back "
                    f"({error}): reset the cache, or go on from a fork of it"
                ) from None
            layer.forget_due(to.due)
        # Columns are written down by the last layer: there may be none to cut.
        if ahead and self.context.real is not None:
            self.context.real = self.context.real[:, : to.seen]

    def _empty(self) -> None:
        """Takes every token out; what `begin` announced stays announced."""
        context = self.context
        for layer in self._own():
            layer.reset()
        for state in self.states:
            # transformers zeroes states in place, and they would fit no other batch.
            LinearAttentionCacheLayerMixin.__init__(state, state.number_of_states)
        context.forget_bytes()
        context.table = None if context.table is None else PositionTable()
        for number, spec in context.rotary.items():
            context.rotary[number] = spec.on(context.table)
        context.real, context.came, context.forgotten, context.forwards = None, None, None, 0
        self._start, self._through = None, set()

    def _forward_begins(self, rows: int, tokens: int) -> None:
        """The first layer meets `tokens` columns of `rows` rows: what an earlier forward left behind is set right, or
        refused."""
        context = self.context
        if context.hold and any(layer._due for layer in context.layers):
            # Nobody took anything back or said that it stays: those were no drafts.
            self._commit()
            context.hold = False
        self._go_back(self._here())  # a part of the model may be called by itself, and stop, unseen by `call_begins`
        first = self._own()[0]
        if first.is_initialized and rows != len(first.real_seen):
            raise ValueError(
                f"{rows} rows come to a cache of {len(first.real_seen)}: take rows with reorder_cache, or reset it"
            )
        if context.hold and not context.forwards and 0 < self.get_seq_length() < tokens:
            raise ValueError(
                f"{tokens} tokens came with the first drafts, and the cache holds {self.get_seq_length()} already: "
                "transformers' decoding with drafts feeds the whole prompt, which would be there twice; give it an "
                "empty cache"
            )

    def _arrive(self, what: str, layer: int) -> None:
        """A forward of a model with linear states has come to a layer.

        Raises:
            ValueError: it is another forward, and the one before stopped half-way: states cannot be taken back.
        """
        # Without states every layer tells by its own count how far a forward came.
        if not self.states:
            return
        furthest = max((number for number, _ in self._through), default=-1)
        # Layers are visited in order: an earlier one, or the same again, means that a new forward has begun.
        if layer < furthest or (layer, what) in self._through:
            last = max(i for i, x in enumerate(self.layers) if isinstance(x, Layer | LinearAttentionCacheLayerMixin))
            if furthest < last:
                raise ValueError(_STATES.format(furthest))
            self._through = set()
        self._through.add((layer, what))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0):
        """A layer's convolution state, None before its first token; notes that the forward has come to this layer.

        Raises:
            ValueError: an earlier forward stopped half-way, or a layer without such a state.
        """
        self._arrive(f"state {state_idx}", layer_idx)
        # States are written to in place, before any of our layers is asked.
        self.context.stay_writable()
        return super().get_conv_state(layer_idx, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a state has seen tokens. In transformers before `get_conv_state` layers begin by asking this.

        Raises:
            ValueError: an earlier forward stopped half-way, or a layer without a state.
        """
        if layer_idx is not None and not hasattr(Cache, "get_conv_state"):
            self._arrive(f"state {state_idx}", layer_idx)
            self.context.stay_writable()
        return super().has_previous_state(layer_idx, state_idx)

    @property
    def is_initialized(self) -> bool:
        """Whether a token has come; models ask whether a forward is the first one (transformers: only of layers whose
        memory can be reserved)."""
        own = self._own()
        return bool(own) and all(layer.is_initialized for layer in own)

    def _own(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def states(self) -> list[LinearAttentionCacheLayerMixin]:
        """The layers that hold linear or convolution states."""
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    # ---- drafts ------------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Drafts come (assisted and prompt-lookup decoding): nothing is let go of before `crop` says what stays.

        Raises:
            ValueError: a method that evicts while decoding, or that reads all queries of a prompt.
        """
        name = self.context.method.expression
        if not self.is_croppable:
            raise ValueError(
                f"{name} evicts while decoding and cannot take drafts back; for assisted or prompt-lookup decoding use "
                "a method that evicts at the end of the prompt, e.g. snapkv"
            )
        needs = self.context.needs
        all_queries = needs.columns or needs.query_moments is not None or needs.query_centres or needs.query_peaks
        all_queries = all_queries or needs.query_sample
        if not self.get_seq_length() and all_queries:
            raise ValueError(
                f"{name} reads all queries of a prompt, and drafts arrive together with it; use a method that looks at "
                "the last ones only, e.g. snapkv"
            )
        # Whether a method evicts now or after `crop` is decided layer by layer, by `hold`.
        self.context.hold, self.context.forwards = True, 0
        super().activate_past_recording()

    def _commit(self) -> None:
        """What was held back stays: every layer lets its method act."""
        if any([layer.commit() for layer in self._own()]):
            self.context.finish()
        self.context.came = None

    # ---- crop --------------------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether every layer can take tokens back; states can while transformers records them for drafts."""
        own = [x for x in self.layers if not (isinstance(x, LinearAttentionCacheLayerMixin) and self.context.hold)]
        return all(getattr(layer, "is_croppable", True) for layer in own)

    def check_crop(self, count: int) -> None:
        """Raises ValueError if the last `count` tokens cannot be taken back; changes nothing."""
        for layer in self._own():
            layer.check_crop(count)
        self._check_states(count)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens; while drafts are expected, says that all others stay.

        Raises:
            ValueError: see `Layer.crop`; no layer has changed then.
        """
        # Some versions of transformers count drafts in a tensor.
        count = -int(tokens_to_remove)
        self.check_crop(count)
        super().crop(-count)
        if count and self.context.real is not None:
            self.context.real = self.context.real[:, :-count]
        own = next(iter(self._own()), None)
        if count and own is not None and own.is_initialized:
            self.context.remember(own.real_seen)
        if self.context.hold:
            self._commit()

    def _check_states(self, count: int) -> None:
        """Raises ValueError unless linear and convolution states can give the last `count` tokens back: transformers
        recalls what it was told to record, and finds the rest out when other layers have changed already."""
        seen = self.get_seq_length()
        for state in self.states if count else ():
            kept = [(x, state.conv_kernel_size[i]) for i, x in state.conv_states.items() if x is not None]
            short = any(x.shape[-1] < min(count + kernel, seen) for x, kernel in kept)
            if not state.record_past or short or any(state.is_recurrent_states_initialized.values()):
                raise ValueError(
                    f"crop({-count}): linear and convolution states cannot be taken back; fork the cache before the "
                    "tokens instead"
                )
