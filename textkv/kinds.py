"""What each layer of a model is: the one place that knows transformers' families.

A method governs the layers of full attention. Layers with a window keep what the model itself can see; linear and
convolution states stay in transformers' own layer objects; a layer that reads another one's keys has no cache at all.
What cannot be described is refused here, by name, when a cache is built.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cache as memo
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from textkv.kernels._backend import MAX_HEAD_DIM

Name = Literal["full", "sliding", "chunked", "state", "hybrid", "hybrid_sliding", "shared", "none"]
_NAMES: dict[str, Name] = {
    "full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "state", "conv": "state", "hybrid": "hybrid", "hybrid_sliding": "hybrid_sliding",
}  # fmt: skip
_WINDOWED = ("sliding", "hybrid_sliding", "chunked")
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Adapters of PEFT that are a cache themselves."""
_HANDS_ON = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION_EXTRAS = ("position_bias",)
"""Named arguments of an attention call that change its scores in a way no segment knows."""


@dataclass(frozen=True)
class LayerKind:
    """One layer of a model, as far as its cache is concerned.

    Attributes:
        number: of the layer in the model.
        name: "full" and "hybrid" (attention beside a state) are governed by a method; "sliding", "hybrid_sliding" and
            "chunked" forget by themselves; "state" has no tokens; "shared" reads the keys of `source`; "none" has no
            attention.
        window: tokens of a sliding window or of a chunk.
        source: the layer whose keys a shared one reads.
        readers: how many shared layers read this one's keys.
        type, options: the name and arguments by which transformers builds a layer that we leave to it.
    """

    number: int
    name: Name
    window: int | None = None
    source: int | None = None
    readers: int = 0
    type: str = "full_attention"
    options: dict = field(default_factory=dict)

    @property
    def governed(self) -> bool:
        """Whether a method decides what this layer keeps."""
        return self.name in ("full", "hybrid")

    @property
    def attends(self) -> bool:
        """Whether the layer stores keys and values of tokens."""
        return self.name in ("full", "hybrid", "sliding", "hybrid_sliding", "chunked")

    def native(self) -> Any:
        """transformers' own cache layer for this kind."""
        return DYNAMIC_LAYER_TYPE_MAPPING[self.type](**self.options)


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper or a compiled one, whose `generate` calls it past the wrapper.

    Raises:
        ValueError: there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        # A compiled module, PEFT's model of adapters, and the tuner between that and ours: they hand on what they lack,
        # so only what is each one's own counts. What is no module at all may still stand in for a model.
        if isinstance(inner, torch.nn.Module):
            own = dict(inner.named_children())
            found = next((own[name] for name in ("_orig_mod", "base_model", "model") if name in own), None)
        else:
            found = None if isinstance(inner, type) else getattr(inner, "base_model", None)
        if found is None:
            raise ValueError(f"{_named(model)} is no transformers model; pass the model that will run")
        inner = found
    return inner


def _named(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder: of a text model, or the text half of a multimodal one.

    Raises:
        ValueError: there is none.
    """
    model = unwrapped(model)
    # Its cache holds the encoder's keys too, which no decoded token adds to.
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model; only decoders have a cache to keep")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        decoder = model.base_model  # some call their output layer a decoder
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(f"{type(model).__name__}: its decoder {type(decoder).__name__} is not a model of its own")
    return decoder


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Configuration of the text decoder."""
    return text_model(model).config.get_text_config(decoder=True)


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The module of each layer, by its number, that hands its attention to transformers' registry."""
    found: dict[int, torch.nn.Module] = {}
    for module in text_model(model).modules():
        number = getattr(module, "layer_idx", None)
        # The first module of a number that attends through the registry; a layer may number its norms and states as
        # well.
        if isinstance(number, int) and number not in found and _hands_on(type(module)):
            found[number] = module
    return found


@memo
def _hands_on(cls: type) -> bool:
    """Whether the forward of a module's class asks the registry for its attention function."""
    return _HANDS_ON in _source(cls)


@memo
def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


@memo
def _changes_what_is_stored(cls: type) -> bool:
    """Whether a forward touches keys or values after the cache has given them back, other than to hand them on."""
    # Read, not run: a forward that rescales or gates keys after storing them would do it to a view, and fail late.
    source = re.sub(r"#.*", "", _source(cls))
    behind = source.partition("past_key_values.update(")[2].partition(")")[2]
    between = behind.partition("attention_interface(")[0]
    lines = [line for line in between.splitlines() if "shared_kv_states[" not in line]
    return any(re.search(r"\b(key|value)_(states|layer)\b", line) for line in lines)


def describe(model: PreTrainedModel) -> tuple[LayerKind, ...]:
    """What each layer of the model's text decoder is.

    Raises:
        ValueError: a layer whose cache we cannot keep; names it and says why.
    """
    decoder, config, who = text_model(model), text_config(model), type(unwrapped(model)).__name__
    _refuse_adapters(model)
    _refuse_model(decoder, config, who)
    if model.dtype == torch.float64:
        raise ValueError(f"{who} computes in float64, the cache in float16, bfloat16 or float32; use model.float()")
    types, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers before 5.20 gives one for all layers
        options = [options] * len(types)
    # Older versions leave such layers out of the list, so that numbers would no longer be those of the model.
    if len(types) < config.num_hidden_layers:
        raise ValueError(f"{who}: layers that share keys are supported from transformers 5.23 on; upgrade it")
    unknown = sorted(set(types) - set(_NAMES) - {"dummy"})
    if unknown:
        raise ValueError(f"{who}: layers of kind {', '.join(unknown)} are not supported by this cache")
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    attention, outside = attention_modules(model), _is_masked_from_outside(model)
    given = list(getattr(config, "layer_types", None) or types)
    kinds = []
    for number, (of, own) in enumerate(zip(types, options, strict=True)):
        if of == "dummy" and modes[number] == "reuse":
            # A sharing layer reads the last storing one of its own kind: sliding layers have other keys than full ones.
            source = max(i for i in range(number) if given[i] == given[number] and modes[i] == "store")
            kinds.append(LayerKind(number, "shared", source=source, type=of))
            continue
        name: Name = "none" if of == "dummy" else _NAMES[of]
        window = own.get("sliding_window") if name in _WINDOWED else None
        kind = LayerKind(number, name, window, type=of, options=own)
        # All that can be wrong is said now, by name, and not at the thousandth token.
        if kind.attends:
            _refuse_layer(attention.get(number), number, who, outside)
        kinds.append(kind)
    if not any(kind.attends for kind in kinds):
        raise ValueError(f"{who} has no layer of attention, so nothing that a method could keep")
    return tuple(_with_readers(kind, kinds) for kind in kinds)


def _with_readers(kind: LayerKind, kinds: list[LayerKind]) -> LayerKind:
    readers = sum(other.source == kind.number for other in kinds)
    return LayerKind(kind.number, kind.name, kind.window, kind.source, readers, kind.type, kind.options)


def _refuse_adapters(model: PreTrainedModel) -> None:
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type in _PREFIXES:
            raise ValueError(
                f"the adapter is {adapter.peft_type.value}: PEFT puts learned keys into a cache of its own making, so "
                "none of ours can be given; use an adapter of weights, such as LoRA, or a learned prompt"
            )


def _refuse_model(decoder: PreTrainedModel, config: PreTrainedConfig, who: str) -> None:
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{who} attends in both directions (is_causal=False): its past changes with every token")
    if not decoder._can_set_attn_implementation():
        raise ValueError(
            f"{who} does not take its attention from transformers' registry, so no cache can attend for it"
        )
    if getattr(config, "cross_attention_layers", None) is not None:
        raise ValueError(
            f"{who} keeps the keys of images for cross attention in the same cache: not supported by this one"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{who} compresses keys and values into one latent (MLA): not supported by this cache")


def _is_masked_from_outside(model: PreTrainedModel) -> bool:
    """Whether the model around the text decoder makes its causal masks, whatever the decoder would do alone (PaliGemma:
    a prefix sees itself both ways, and what follows does not)."""
    decoder = text_model(model)
    around = (x for x in model.modules() if isinstance(x, PreTrainedModel) and decoder in list(x.children()))
    return any("create_causal_mask(" in _source(type(x)) for x in around)


def _refuse_layer(module: torch.nn.Module | None, number: int, who: str, outside: bool) -> None:
    if module is None:
        raise ValueError(
            f"{who}: layer {number} does not hand its attention to transformers' registry, so no cache can attend "
            "for it"
        )
    wide = getattr(module, "head_dim", None)
    if isinstance(wide, int) and wide > MAX_HEAD_DIM:
        raise ValueError(f"{who}: layer {number} has head_dim={wide}; the kernels of the cache take {MAX_HEAD_DIM}")
    if not outside and not getattr(module, "is_causal", True):
        raise ValueError(f"{who}: layer {number} attends in both directions: its past changes with every token")
    if _changes_what_is_stored(type(module)):
        raise ValueError(
            f"{who}: layer {number} touches keys or values between storing them and attending, which a cache that "
            "attends for itself cannot follow"
        )
    for name in _ATTENTION_EXTRAS:
        if f"{name}=" in _source(type(module)):
            raise ValueError(f"{who}: layer {number} adds a {name} to its scores, which is not supported by this cache")
