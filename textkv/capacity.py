"""Bytes that a conversation holds, by formula, from a model's configuration alone.

A layer of H KV heads of width D stores `kept` tokens of each head, keys and values of E bytes a number, and beside them
the place of each token in the conversation, 4 bytes:

    kept * H * (2 * D * E + 4)

Methods that drop nothing share the places among the heads. Packed tokens (`kivi`, alone or behind a method that evicts)
are codes of `bits` with a float16 scale and minimum per group. Heads, widths and states are not read from fields of a
configuration, which every family names in its own way: the model is built without weights and asked what one token
leaves in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from textkv import rotary
from textkv.budgets import Budget
from textkv.kernels.pack import channel_group, width
from textkv.kinds import LayerKind, describe, text_config, text_model
from textkv.method import Method, resolve_method
from textkv.methods.kivi import Kivi

PLACE = 4  # bytes of a token's logical position
AXES = 12  # bytes of a token's rotary positions, where it has three


@dataclass(frozen=True)
class LayerShape:
    """What a layer stores.

    Attributes:
        kind: of the layer.
        heads: KV heads.
        widths: numbers of a key and a value together, for each head.
        state: bytes of its linear and convolution states, whatever is read.
    """

    kind: LayerKind
    heads: int
    widths: int
    state: int


@dataclass(frozen=True)
class ModelShape:
    """A model as far as its caches are concerned.

    Attributes:
        layers: of its text decoder.
        number: bytes of a key's or value's number.
        weights: bytes of all weights in this type.
        turned_by_place: whether a token has three rotary positions (M-RoPE).
        limit: tokens that the model reads at most; None = it names no limit.
    """

    layers: tuple[LayerShape, ...]
    number: int
    weights: int
    turned_by_place: bool
    limit: int | None = None

    @classmethod
    def of(
        cls, build: Callable[[], PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None = None
    ) -> ModelShape:
        """The shape of the model that `build` makes, without its weights.

        Args:
            config: the model's.
            dtype: of the weights; None = as its configuration says, or float32.

        Raises:
            ValueError: a layer whose cache we cannot keep, see `textkv.kinds.describe`, or a model that does not read
                a token without its weights.
        """
        dtype = dtype or config.dtype or config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            model = build().to(dtype).eval()
            kinds = describe(model)
            cache = _cache_of_a_token(model)
        layers = tuple(_shape(kind, layer) for kind, layer in zip(kinds, cache.layers, strict=True))
        weights = sum(x.numel() for x in model.parameters()) * dtype.itemsize
        limit = getattr(text_config(model), "max_position_embeddings", None)
        return cls(layers, dtype.itemsize, weights, rotary.axes_of(model) is not None, limit)

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the model's own cache after `tokens`: keys, values and states."""
        return sum(x.state + _seen(x.kind, tokens) * x.heads * x.widths * self.number for x in self.layers if _holds(x))

    def kv_bytes(self, method: str | Method, budget: Budget | float | str | None, tokens: int) -> int:
        """Bytes on the device of a `MethodCache` that has read `tokens` in one prompt.

        Numbers that a method keeps beside its tokens to score the next ones are not in it, 4 to 8 bytes a head and
        token in `h2o`, `streaming_llm` and their like; nor the room for an eighth more that decoding makes.

        Raises:
            ValueError: a method for which there is no formula.
        """
        policy = resolve_method(method, budget)
        stored = 0
        for x in (x for x in self.layers if _holds(x)):
            stored += x.state
            if x.kind.governed:
                stored += self._governed(policy, x, tokens)
            elif x.kind.attends:
                stored += _seen(x.kind, tokens) * (x.heads * x.widths * self.number + PLACE)
        asks = policy.needs()
        return stored + (AXES * _rounded(tokens + 1) if self.turned_by_place and asks.positions else 0)

    def _governed(self, policy: Method, x: LayerShape, tokens: int) -> int:
        if isinstance(policy, Kivi):
            return self._packed(policy, x, tokens)
        kept, heads = _kept(policy, tokens), x.heads
        places = heads if kept < tokens else 1
        return kept * (heads * x.widths * self.number + places * PLACE)

    def _packed(self, policy: Kivi, x: LayerShape, tokens: int) -> int:
        kept, dim = (tokens if policy.inner is None else _kept(policy.inner, tokens)), x.widths // 2
        packed = kept // policy.residual * policy.residual
        scales = dim / policy.group + dim / (policy.channels or channel_group(dim))
        token = 2 * dim * width(policy.bits) / 8 + 4 * scales
        places = x.heads if kept < tokens else 1
        # What is subtracted from all keys of a head, in float32.
        centre = 0 if policy.centre == "none" or not packed else 4 * dim * x.heads
        exact = (kept - packed) * x.heads * x.widths * self.number
        return int(packed * x.heads * token + exact + kept * places * PLACE + centre)


def _cache_of_a_token(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache of one token, without numbers."""
    cache = DynamicCache(config=text_config(model))
    # Tokens that are grouped by their experts would have to be known, and in some types cannot be grouped.
    experts = getattr(model.config, "_experts_implementation", None)
    if experts:
        model.set_experts_implementation("batched_mm")
    try:
        with torch.inference_mode():
            text_model(model)(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except (RuntimeError, IndexError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__} does not read a token without its weights: {line}") from None
    finally:
        if experts:
            model.set_experts_implementation(experts)
    return cache


def _shape(kind: LayerKind, layer: object) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    states = [getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states")]
    state = sum(x.nbytes for held in states for x in held.values() if x is not None)
    if keys is None or not keys.numel():
        return LayerShape(kind, 0, 0, state)
    return LayerShape(kind, keys.shape[1], keys.shape[3] + values.shape[3], state)


def _holds(x: LayerShape) -> bool:
    return bool(x.heads or x.state)


def _seen(kind: LayerKind, tokens: int) -> int:
    """Tokens that a layer keeps if nothing is dropped but what the model itself no longer sees."""
    return tokens if kind.window is None else min(tokens, kind.window)


def _kept(policy: Method, tokens: int) -> int:
    """Tokens that a method which drops and changes nothing else leaves of a prompt.

    Raises:
        ValueError: it stores them in another form, or elsewhere.
    """
    able = policy.capabilities
    if able.lossy or able.retrieves or able.stores_query_heads:
        raise ValueError(
            f"there is no formula for what {policy.expression} stores; run it, and read kv_bytes in the rows of "
            "python -m eval.leaderboard"
        )
    return policy.allowance.count(tokens) if policy.evicts else tokens


def _rounded(columns: int) -> int:
    return -(-columns // 64) * 64
