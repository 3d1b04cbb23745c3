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
import warnings
import weakref
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from textkv import probes, rotary, screens, store
from textkv.attention import use
from textkv.budgets import Budget
from textkv.context import AtRest, Context
from textkv.evidence import Spans
from textkv.hybrid import HybridLayer
from textkv.kinds import attention_modules, describe, text_config
from textkv.layer import Layer
from textkv.method import Method, resolve_method
from textkv.positions import PositionTable
from textkv.report import CacheReport, report
from textkv.rollback import Rollback, Start

Trajectory = list[dict[str, torch.Tensor]]
"""What a method learned from an agent's steps: of each governed layer, tensors [rows, ...] by name."""


class MethodCache(Rollback):
    """A cache kept by a method.

    The method governs the layers of full attention, and the budget counts these. Layers with sliding windows or chunks
    keep what the model itself can see; linear and convolution states stay in transformers' own layer objects.

    Args:
        model: the model that will run; it is put on our attention implementation (its vision tower is left alone).
            Calls without a cache of ours give what they gave before; `textkv.release(model)` undoes it.
        method: composition string ("snapkv", "snapkv+adakv(floor=0.2)") or a `Method`.
        budget: share in (0, 1], "512t", or a `Budget`; None keeps the method's own.

    Raises:
        ValueError: unknown method or composition, budget out of range, unsupported model or way of sharding it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "full",
        budget: Budget | float | str | None = None,
    ) -> None:
        policy = resolve_method(method, budget)
        kinds = describe(model)
        policy.check_sharded(getattr(model, "tp_size", None) or 1)
        self.context = Context(policy, policy.needs(), text_config(model), kinds)
        layers, governed = [], 0
        for kind in kinds:
            if not kind.attends:
                # States and layers without attention are transformers' own affair: its object, as its own cache would
                # make it.
                layers.append(kind.native())
                continue
            # Only governed layers are counted for the method: its budget is shared among these.
            cls = HybridLayer if kind.name.startswith("hybrid") else Layer
            layers.append(cls(kind, self.context, governed if kind.governed else -1))
            governed += kind.governed
        # The method sees the layers it governs; saving and counting need all.
        self.context.layers = [layer for layer in layers if isinstance(layer, Layer) and layer.kind.governed]
        self.context.everything = layers
        # No error: the same program may run a family in which some model has full layers and another has none.
        if not governed and policy.evicts:
            warnings.warn(
                f"{type(model).__name__} has no layer of full attention: all its layers forget by themselves, as far "
                f"as their windows reach, and {policy.expression} governs none of them",
                stacklevel=2,
            )
        policy.on_build(self.context)
        super().__init__(layers=layers)
        self._start: Start | None = None
        self._through: set[tuple[int, str]] = set()
        self.bind(model)

    def bind(self, model: PreTrainedModel) -> None:
        """Ties the cache to the model that will run it (again, after unpickling).

        Raises:
            ValueError: the method moves keys, and how the model turns them is not known.
        """
        use(model)
        self.context.config = text_config(model)
        # A cache may outlive its model, and must not keep gigabytes of weights alive.
        self._model = weakref.ref(model)
        probes.place(model, self.context.needs)
        modules = attention_modules(model)
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.bind(modules.get(layer.kind.number))
        self._dtype = model.dtype
        self._learn_rotary(model)

    def _learn_rotary(self, model: PreTrainedModel) -> None:
        context, needs = self.context, self.context.needs
        governed = [layer.kind.number for layer in context.layers]
        if needs.rope:
            context.rotary = rotary.proven(model, governed)
        if not needs.positions:
            return
        # With 1-D RoPE the logical position says it all; a table would be bytes for nothing.
        if context.table is None and rotary.axes_of(model) is not None:
            context.table = PositionTable()
        try:
            told = rotary.told(model, governed, context.table)
            # What was proven wins; what the model's tables tell fills in the axes, and the layers nobody asked to
            # prove.
            known = context.rotary if needs.rope else {}
            context.rotary = {number: rotary.joined(known.get(number), spec) for number, spec in told.items()} | {
                number: spec for number, spec in known.items() if number not in told
            }
        except ValueError as error:
            context.rotary_unknown = str(error)

    @property
    def method(self) -> Method:
        """The policy."""
        return self.context.method

    @property
    def model_config(self) -> PreTrainedConfig:
        """Configuration of the model's text decoder."""
        return self.context.config

    @property
    def spans(self) -> Spans:
        """Screenshots of the conversation: logical positions per row."""
        return self.context.spans

    @property
    def at_rest(self) -> AtRest | None:
        """The cache as it was at the end of the last prompt block."""
        return self.context.at_rest

    @property
    def peak_bytes(self) -> int:
        """The most bytes held so far, the moment before each eviction included."""
        return self.context.peak_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per hook so far."""
        return self.context.seconds

    # ---- telling the cache what comes ---------------------------------------------------------------------------

    def begin(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        tokens: int | None = None,
        spans: Spans | None = None,
        grids: screens.Grids | None = None,
        attention_mask: torch.Tensor | None = None,
        **ignored: torch.Tensor,
    ) -> None:
        """Announces the prompt block that comes next. Optional for a text prompt that arrives in one forward.

        Assisted decoding sends its first drafts in the prompt's own forward: only what is announced here tells the two
        apart, so that drafts see no more than the method keeps of the prompt, as decoded tokens do.

        Args:
            input_ids: [batch, columns] ids of the whole conversation, as `generate` takes them.
            tokens: instead of input_ids: columns seen at the end of the block. A block may arrive in chunks.
            spans: per row, the [start, end) columns of EVERY screenshot of the conversation, oldest first.
            grids: per row, (rows, columns) of each one's tokens, for methods that ask how these lie.
            attention_mask: [batch, columns], needed with spans if rows are padded.
            ignored: the rest of a processor's output, so that `begin(**inputs, spans=...)` works.

        Raises:
            ValueError: spans out of range, unsorted or overlapping, grids that do not fit them or are missing where the
                method asks for them, or fewer columns than were seen already.
        """
        columns = tokens if tokens is not None else (0 if input_ids is None else input_ids.shape[1])
        seen = self.get_seq_length()
        # Easily given by mistake: only the new turn. Without this the block would end before it began.
        if columns and columns <= seen:
            raise ValueError(f"the prompt has {columns} tokens and {seen} were seen: pass the whole conversation")
        if self.context.hold:  # no draft is a prompt: those that were expected are over
            self._commit()
            self.context.hold = False
        self.context.block_end = columns
        if spans is not None:
            at = screens.logical(spans, columns, attention_mask)
            if self.context.needs.grids and grids is None and any(at):
                raise ValueError(
                    f"{self.method.expression} asks how a screenshot's tokens lie: give grids, (rows, columns) of "
                    "merged patches for each span"
                )
            self.context.spans, self.context.screens = at, screens.by_span(at, grids)

    def new_trajectory(self) -> None:
        """What comes belongs to another task: methods forget what they learned from the steps so far."""
        for layer in self.context.layers:
            layer.trajectory = {}

    @property
    def trajectory(self) -> Trajectory:
        """What the method learned from the steps so far, by governed layer."""
        return [dict(layer.trajectory) for layer in self.context.layers]

    def follow(self, steps: Trajectory) -> None:
        """What comes is the next step of a task whose earlier `steps` a cache of the same method and model has seen."""
        for layer, learned in zip(self.context.layers, steps, strict=True):
            layer.trajectory = dict(learned)

    def freeze(self, on: bool = True) -> None:
        """From now on nothing is evicted and no evidence collected: what comes can be taken back with `crop`."""
        self.context.frozen = on

    def forget(self, spans: Spans) -> None:
        """Drops the tokens of given logical positions from every layer, whatever holds them.

        Later tokens keep their positions, and a budget is a share of what remains. Linear and convolution states
        remember what they have read.

        Args:
            spans: per row, half-open [start, end) logical positions (columns, where nothing is padded).

        Raises:
            ValueError: not one list for each row, or a span that is empty or was not seen.
        """
        layers = [layer for layer in self.layers if isinstance(layer, Layer) and layer.is_initialized]
        seen = layers[0].real_seen.tolist() if layers else []
        if len(spans) != len(seen):
            raise ValueError(f"forget got spans for {len(spans)} rows, the cache has {len(seen)}")
        # All spans are checked before any layer changes: a bad one leaves the cache as it was.
        gone = torch.zeros(len(seen), max(seen, default=0), dtype=torch.bool)
        for row, of_row in enumerate(spans):
            for start, stop in of_row:
                if not 0 <= start < stop <= seen[row]:
                    raise ValueError(
                        f"forget: ({start}, {stop}) of row {row} must not be empty and lie in [0, {seen[row]}), the "
                        "tokens seen"
                    )
                gone[row, start:stop] = True
        for layer in layers:
            layer.forget(gone.to(layer.device))
            self.context.note_bytes(layer)
        self.context.forget(gone)

    # ---- counting ----------------------------------------------------------------------------------------------

    @property
    def tokens_seen(self) -> int:
        """Columns seen so far, padding included."""
        return self.get_seq_length()

    def kv_bytes(self) -> int:
        """Bytes held now on the model's device: every storage that the cache keeps alive, counted once."""
        return self.context.kv_bytes()

    def host_bytes(self) -> int:
        """Bytes held in host memory although the model runs on a device."""
        return sum(layer.host_bytes() for layer in self.layers if isinstance(layer, Layer))

    def full_bytes(self) -> int:
        """Bytes that the model's own cache would hold now."""
        return self.context.full_bytes()

    def kept_positions(self, layer: int) -> torch.Tensor:
        """Logical positions stored in a layer: int32 [batch, stored heads, n], -1 = no token."""
        return self.layers[layer].held_positions()

    def report(self) -> CacheReport:
        """Bytes, tokens seen and stored per layer and head, seconds per hook."""
        return report(self.context)

    # ---- what transformers calls -------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Wraps a layer's new keys and values [batch, kv_heads, m, head_dim] in a `View`, returned as both.

        The first layer that stores tokens also begins a forward: what one before it left half-way is taken back there.

        Raises:
            ValueError: an earlier forward stopped half-way and cannot be taken back, drafts came with tokens that are
                stored already, another number of rows came, or `Layer.update` refuses.
        """
        self._arrive("keys", layer_idx)
        if layer_idx == self.context.first:
            self._forward_begins(len(key_states), key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers hold a state and no tokens, as transformers asks."""
        return [isinstance(x, LinearAttentionCacheLayerMixin) and not isinstance(x, Layer) for x in self.layers]

    # ---- rows --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first token."""
        return next((len(x.real_seen) for x in self.layers if isinstance(x, Layer) and x.is_initialized), 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes rows `beam_idx` int64 [new batch] of every layer, and of position table, padding and spans."""
        super().reorder_cache(beam_idx)
        self._take_shared_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes each row `repeats` rows that follow one another; does nothing before the first token."""
        if self.rows:
            self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps rows by number, int64 in any order, or where bool [batch] is True."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _take_shared_rows(self, rows: torch.Tensor) -> None:
        context = self.context
        if context.table is not None:
            context.table.take_rows(rows)
        if context.real is not None:
            context.real = context.real.index_select(0, rows.to(context.real.device))
        if context.forgotten is not None:
            context.forgotten = context.forgotten.index_select(0, rows.cpu())
        if context.spans:
            context.spans = [context.spans[row] for row in rows.tolist()]
        if context.screens:
            context.screens = [context.screens[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Empties the cache: what comes next may be a batch of another size. What a method learned from an agent's
        steps stays, until `new_trajectory`."""
        self._empty()
        self.context.spans, self.context.screens, self.context.block_end, self.context.hold = [], [], 0, False

    # ---- copies ------------------------------------------------------------------------------------------------

    def fork(self) -> MethodCache:
        """An independent copy: both may go on in different directions."""
        return copy.deepcopy(self)

    def save(self, folder: str | Path) -> None:
        """Writes the cache as safetensors and JSON, beside what is there, and renames when all is written."""
        store.save(self.context, Path(folder), self._model())

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> MethodCache:
        """Reads what `save` wrote, for the same model. Raises ValueError: damaged, of another format or model."""
        header = store.read_header(Path(folder))
        try:
            cache = cls(model, header["method"], header["budget"])
        except ValueError as error:
            raise ValueError(f"{folder} cannot be gone on with: {error}") from None
        store.fill(cache.context, Path(folder), header, model)
        return cache

    def __deepcopy__(self, memo: dict) -> MethodCache:
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        # What belongs to the model is shared, not copied.
        for shared in (self.context.method, self.context.config, *self.context.rotary.values()):
            memo[id(shared)] = shared
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = self._model()
        if model is not None:
            other.bind(model)
        return other

    def __getstate__(self) -> dict:
        # A model does not travel with its cache: the reference is made again by `bind`.
        return {k: v for k, v in self.__dict__.items() if k != "_model"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._model = lambda: None
