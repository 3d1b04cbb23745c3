"""`MethodCache`: a transformers cache whose layers are kept small by a method.

    cache = MethodCache(model, "snapkv", budget=0.4)
    model.generate(**inputs, past_key_values=cache)
    print(cache.report())

One cache is one conversation. What happens when is told by three counters: tokens seen, tokens stored, and the end
of the prompt block being read. A forward of more than one token, or the first one, is a prompt block of its own,
unless `begin` announced a longer block that arrives in chunks.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from textkv import store
from textkv.attention import use
from textkv.budgets import Budget
from textkv.evidence import Spans
from textkv.layer import ATTENTION, Layer
from textkv.method import Method, resolve_method
from textkv.probes import Probes, key_turning, rotary_axes, text_config, text_rotary
from textkv.report import CacheReport, report
from textkv.segments.base import NewTokens
from textkv.turning import Places, Turning


@dataclass(frozen=True)
class AtRest:
    """The cache right after a prompt block was compressed, before the next token is decoded.

    Attributes:
        kv_bytes: bytes held by all layers, bookkeeping included.
        full_bytes: bytes of K and V without eviction, same tokens.
        tokens_stored: mean over layers, rows and stored heads.
        kept: per layer int32 [batch, stored heads, n] logical positions on the CPU, -1 = none.
    """

    kv_bytes: int
    full_bytes: int
    tokens_stored: float
    kept: tuple[torch.Tensor, ...]


class MethodCache(Cache):
    """A cache kept by a method.

    Args:
        model: the model that will run; it is put on our attention implementation (its vision tower is left alone).
        method: composition string ("snapkv", "snapkv+adakv(floor=0.2)") or a `Method`.
        budget: share in (0, 1], "512t", or a `Budget`; None keeps the method's own.

    Raises:
        ValueError: unknown method or impossible composition, budget out of range, unsupported model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "full",
        budget: Budget | float | str | None = None,
    ) -> None:
        self.method = resolve_method(method, budget)
        self.needs = self.method.needs()
        self._config = text_config(model)
        self.spans: Spans = []
        self.block_end = 0
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self.at_rest: AtRest | None = None
        self.places: Places | None = None
        self._layer_bytes = [0] * self._config.num_hidden_layers
        super().__init__(layers=[Layer(i, self) for i in range(self._config.num_hidden_layers)])
        self.bind(model)

    def bind(self, model: PreTrainedModel) -> None:
        """Ties the cache to the model that will run it (again, after unpickling)."""
        use(model)
        self._config = text_config(model)
        self._model = weakref.ref(model)
        self.inv_freq = text_rotary(model).inv_freq if self.needs.rope else None
        self.rope_positions: torch.Tensor | None = None
        if self.places is None and self.needs.turning and rotary_axes(model) is not None:
            self.places = Places()
        self._probes = Probes(model, self, self.needs)

    @property
    def model_config(self) -> PreTrainedConfig:
        """Configuration of the model's text decoder."""
        return self._config

    def key_turning(self) -> Turning:
        """How the model's keys turn with their positions. Only a method whose `needs` say so may ask under M-RoPE.

        Raises:
            ValueError: no table of frequencies tells it; the message says why.
        """
        return key_turning(self._model(), self.places)

    def check_attention(self) -> None:
        """Raises ValueError if the model was switched away from our attention implementation."""
        if self._config._attn_implementation != ATTENTION:
            raise ValueError(
                f"the model runs attention {self._config._attn_implementation!r}, which cannot read this cache; "
                "call textkv.use(model) first"
            )

    # ---- telling the cache what comes ---------------------------------------------------------------------------

    def begin(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        tokens: int | None = None,
        spans: Spans | None = None,
        attention_mask: torch.Tensor | None = None,
        **ignored: torch.Tensor,
    ) -> None:
        """Announces the prompt block that comes next. Optional for a text prompt that arrives in one forward.

        Args:
            input_ids: [batch, columns] ids of the whole conversation, as `generate` takes them.
            tokens: instead of input_ids: columns seen at the end of the block. A block may arrive in chunks.
            spans: per row, the [start, end) columns of EVERY screenshot of the conversation, oldest first.
            attention_mask: [batch, columns], needed with spans if rows are padded.
            ignored: the rest of a processor's output, so that `begin(**inputs, spans=...)` works.

        Raises:
            ValueError: spans out of range, unsorted or overlapping, or fewer columns than were seen already.
        """
        columns = tokens if tokens is not None else (0 if input_ids is None else input_ids.shape[1])
        seen = self.get_seq_length()
        if columns and columns <= seen:
            raise ValueError(f"the prompt has {columns} tokens and {seen} were seen: pass the whole conversation")
        self.block_end = columns
        if spans is not None:
            self.spans = _logical_spans(spans, columns, attention_mask)

    # ---- what a layer calls ------------------------------------------------------------------------------------

    def note_places(self, layer: Layer, new: NewTokens) -> None:
        """A layer has numbered the tokens of a forward; the first one tells where all layers' keys are turned to."""
        if self.places is not None and layer.index == 0:
            self.places.write(new.positions, layer.seen + new.positions.shape[1])

    def note_bytes(self, layer: Layer) -> None:
        """Counts a layer's bytes at a moment when they may be at their highest."""
        self._layer_bytes[layer.index] = layer.kv_bytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._layer_bytes) + self._places_bytes())

    def after_step(self, layer: Layer, prompt_ended: bool) -> None:
        """A layer is done with a forward."""
        self.note_bytes(layer)
        if layer.index < len(self.layers) - 1:
            return
        self.rope_positions = None
        if prompt_ended:
            with layer._timed("on_finish"):
                self.method.on_finish(self)
            lengths = [x.lengths().float() for x in self.layers]
            self.at_rest = AtRest(
                kv_bytes=self.kv_bytes(),
                full_bytes=self.full_bytes(),
                tokens_stored=float(torch.stack([n.mean() for n in lengths]).mean()),
                kept=tuple(self.kept_positions(i).cpu() for i in range(len(self.layers))),
            )

    # ---- counting ----------------------------------------------------------------------------------------------

    @property
    def tokens_seen(self) -> int:
        """Columns seen so far, padding included."""
        return self.get_seq_length()

    def kv_bytes(self) -> int:
        """Bytes held now: every storage that the cache keeps alive, counted once."""
        return sum(layer.kv_bytes() for layer in self.layers) + self._places_bytes()

    def _places_bytes(self) -> int:
        return 0 if self.places is None else self.places.kv_bytes()

    def full_bytes(self) -> int:
        """Bytes of K and V that a cache without eviction would hold now."""
        return sum(layer.full_bytes() for layer in self.layers)

    def kept_positions(self, layer: int) -> torch.Tensor:
        """Logical positions stored in a layer: int32 [batch, stored heads, n], -1 = no token."""
        return self.layers[layer].held_positions()

    def report(self) -> CacheReport:
        """Bytes, tokens seen and stored per layer and head, seconds per hook."""
        return report(self)

    # ---- rows --------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_places(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.places is not None and self.places.table is not None:
            self._take_places(torch.arange(self.places.table.shape[1]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_places(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        super().reset()
        if self.places is not None:
            self.places = Places()

    def _take_places(self, rows: torch.Tensor) -> None:
        if self.places is not None:
            self.places.take_rows(rows)

    # ---- copies ------------------------------------------------------------------------------------------------

    def fork(self) -> MethodCache:
        """An independent copy: both may go on in different directions."""
        return copy.deepcopy(self)

    def save(self, folder: str | Path) -> None:
        """Writes the cache as safetensors and JSON."""
        store.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> MethodCache:
        """Reads what `save` wrote, for the same model."""
        return store.load(cls, Path(folder), model)

    def __deepcopy__(self, memo: dict) -> MethodCache:
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = self._model()
        if model is not None:
            other.bind(model)
        return other

    def __getstate__(self) -> dict:
        # A model does not travel with its cache: the references are made again by `bind`.
        dropped = ("_model", "_probes", "_config", "inv_freq", "rope_positions", "method", "needs")
        state = {k: v for k, v in self.__dict__.items() if k not in dropped}
        return state | {"_shared": (self.method, self._config)}

    def __setstate__(self, state: dict) -> None:
        method, config = state.pop("_shared")
        self.__dict__.update(state)
        self.method, self._config, self.needs = method, config, method.needs()
        self.inv_freq, self.rope_positions, self._probes = None, None, None
        self._model = lambda: None
        for layer in self.layers:
            layer._cache = weakref.ref(self)


def _logical_spans(spans: Spans, columns: int, attention_mask: torch.Tensor | None) -> Spans:
    """Columns of the padded prompt -> logical positions of each row; checks order and range."""
    pads = [0] * len(spans)
    if attention_mask is not None:
        pads = (attention_mask == 0).sum(1).tolist()
    logical: Spans = []
    for row, (row_spans, pad) in enumerate(zip(spans, pads, strict=True)):
        end = 0
        for start, stop in row_spans:
            if not end <= start < stop or (columns and stop > columns):
                raise ValueError(
                    f"spans of row {row}: ({start}, {stop}) must lie in [0, {columns}), not be empty, and follow the "
                    f"one before it, which ends at {end}"
                )
            end = stop
        logical.append([(start - pad, stop - pad) for start, stop in row_spans])
    return logical
