"""One reading of a prompt for many methods: keys, values and the evidence of all needs together are taken once.

    reading = Reading(model, prompts, methods)
    for method in methods:
        cache = reading.open(method)      # as if `method` had read the prompt itself

A prompt is read with exact attention whatever the method, which acts when its block ends. So what a block brings, and
what it shows, is the same for all of them, and only what happens then has to be done for each. The few methods that
already change what the prompt's own tokens see (a stream that forgets while it reads) are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from transformers import PreTrainedModel

from textkv.cache import MethodCache
from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Method
from textkv.segments.base import Segment, Step

NAME = "reading"
_WINDOW_STATE = (
    "segments", "seen", "real_seen", "since_eviction", "is_initialized", "dtype", "device", "kv_heads", "head_dim",
    "softmax",
)  # fmt: skip
"""What a layer of windows is after a prompt: no method acts on it, so it is copied as it is."""


class ReadsItself(ValueError):
    """A method that cannot act on another one's reading: it has to read the prompt."""


@dataclass(frozen=True)
class Recorder(Method):
    """Keeps everything, and puts the evidence of each layer down in the layer's notes."""

    asked: Needs = Needs()

    def needs(self) -> Needs:
        """Those of all methods that will act on the reading, together."""
        return self.asked

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Puts the evidence by: nothing is dropped."""
        layer.notes[NAME] = evidence


class Reading:
    """A batch of prompts of one length, read once.

    Args:
        model: a text decoder without linear states.
        prompts: int64 [batch, tokens], no padding.
        methods: those that will act on it, with their budgets.

    Attributes:
        logits: fp32 [batch, vocabulary], of the token after the prompt.
        needs: the evidence that was gathered.

    Raises:
        ValueError: a model whose prompts leave more behind than keys and values.
    """

    def __init__(self, model: PreTrainedModel, prompts: torch.Tensor, methods: Sequence[Method]) -> None:
        self._model = model
        self.needs = reduce(or_, (method.needs() for method in methods), Needs())
        self._cache = MethodCache(model, Recorder(asked=self.needs))
        self._check_model(self._cache.context)
        with torch.inference_mode():
            out = model(prompts, past_key_values=self._cache, logits_to_keep=1)
        self.logits = out.logits[:, -1].float()

    def close(self) -> None:
        """Lets go of keys, values and evidence; caches that were opened keep theirs."""
        self._cache.reset()

    def _check_model(self, context: Context) -> None:
        others = [kind.name for kind in context.kinds if kind.name not in ("full", "sliding", "chunked", "shared")]
        if others or context.table is not None:
            what = f"layers of kind {others[0]}" if others else "more than one rotary position for a token"
            raise ValueError(
                f"{type(self._model).__name__} has {what}: one reading serves models of plain attention; give each "
                "method its own cache and prompt"
            )

    def open(self, method: Method) -> MethodCache:
        """A cache as `method` would have left it after these prompts; the reading stays as it is.

        Raises:
            ReadsItself: the method changes what prompt tokens see, or asks for evidence that was not gathered.
        """
        self._check_needs(method)
        cache = MethodCache(self._model, method)
        # Tensors that were made here are as frozen as those of a forward under inference_mode.
        with torch.inference_mode():
            for mine, theirs in zip(cache.layers, self._cache.layers, strict=True):
                if not isinstance(mine, Layer):
                    continue
                if mine.kind.governed:
                    self._replay(mine, theirs)
                else:
                    for name in _WINDOW_STATE:
                        setattr(mine, name, copy.deepcopy(getattr(theirs, name)))
                    cache.context.after_step(mine, True, None)
        return cache

    def _replay(self, layer: Layer, source: Layer) -> None:
        held, evidence = source.segments[0], source.notes[NAME].only(layer.context.needs)
        # Copies: a method may write into what it keeps. In the layout that the model's own tensors had.
        k, v = held.k.clone(), held.v.clone()
        layer.lazy_initialization(k)
        store = type(layer.segments[-1])
        if len(layer.segments) > 1 or store.extend is not Segment.extend or store.read is not Segment.read:
            raise ReadsItself(
                f"{layer.context.method.expression} lets prompt tokens see less than all before them "
                f"({store.name}); it has to read the prompt itself"
            )
        q = evidence.queries[:, :, :0]
        rope = evidence.rope_positions if layer.context.needs.rope else None
        layer.replay(Step(q, k, v, held.positions[:, 0], evidence.scale, rope_positions=rope), evidence)

    def _check_needs(self, method: Method) -> None:
        want, have = method.needs(), self.needs
        lacks = [
            name
            for name, there in (
                ("window", want.window <= have.window),
                ("hidden", want.hidden in (None, have.hidden)),
                ("rope", have.rope or not want.rope),
                ("columns", have.columns or not want.columns),
                # Which first tokens were left out is part of the moments: another number is another evidence.
                ("query_moments", want.query_moments in (None, have.query_moments)),
                ("query_centres", have.query_centres or not want.query_centres),
                ("query_peaks", have.query_peaks or not want.query_peaks),
                ("query_sample", want.query_sample in (0, have.query_sample)),
                ("ids", have.ids or not want.ids),
            )
            if not there
        ]
        if lacks:
            raise ReadsItself(
                f"{method.expression} asks for {', '.join(lacks)}, which this reading did not gather; name the method "
                "when the reading is made, or let it read the prompt itself"
            )
