"""Loads a published checkpoint from a folder or the hub: safetensors (one file or shards), no remote code, no pickles.

The classes are also made known to transformers' Auto classes, unless transformers has models of these types itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from dlm.models.backbone import MaskedDiffusionModel
from dlm.models.decoding_spec import DecodingSpec
from dlm.models.dream import DreamModel
from dlm.models.llada import LLaDAModelLM
from dlm.models.llada2 import LLaDA2MoeModelLM
from dlm.models.qwen import FastDLLMForCausalLM, LLaDAMoEModelLM, SDARForCausalLM, SDARMoeForCausalLM
from dlm.models.text import end_ids, load_tokenizer
from textkv import checkpoints

MODELS: dict[str, type[MaskedDiffusionModel]] = {
    "llada": LLaDAModelLM,
    "Dream": DreamModel,
    "llada2_moe": LLaDA2MoeModelLM,
    "sdar": SDARForCausalLM,
    "sdar_moe": SDARMoeForCausalLM,
    "Fast_dLLM_Qwen": FastDLLMForCausalLM,
}
# Models that one looks for here in vain, and what is missing.
MISSING = {
    "diffusion_gemma": "it has no mask token and a sampler of its own: use transformers' "
    "DiffusionGemmaForBlockDiffusion and its generate()",
    "nemotron_dllm": "its layout and its masks are not documented; vLLM serves it",
    "llada21_moe": "that is a renamed LLaDA2.1: set model_type to 'llada2_moe' in config.json",
}


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | dict[str, Any] | None = None,
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase | None]:
    """A model ready for decoding, and its tokenizer (None if the folder has none).

    dtype None = as saved. `device` is where the model goes (None = CPU); "auto" or a dict from module names to devices
    spreads it over several, as transformers' `device_map` does, which needs the package accelerate.

    Raises:
        FileNotFoundError: no config.json or no safetensors there, and no such model on a reachable hub.
        ValueError: another kind of model, a config of another graph or without a mask token, weights that do not fit.
    """
    source = str(path_or_id)
    kind, config, tokenizer, ends = _read(source)
    # A single device is `.to`: `device_map` would need the package accelerate.
    spread = device if device == "auto" or isinstance(device, dict) else None
    model = checkpoints.load_model(
        kind.from_pretrained, source, config=config, dtype=dtype or "auto", device_map=spread
    )
    if tokenizer is not None:
        checkpoints.check_vocabulary(source, model, tokenizer)
    if spread is None:
        model.to(device or "cpu")
    model.end_ids = ends
    return model.eval(), tokenizer


def load_decoding_spec(path_or_id: str | Path) -> tuple[DecodingSpec, PreTrainedTokenizerBase | None]:
    """The spec of a model and its tokenizer, without its weights; errors as `load_model`."""
    kind, config, tokenizer, ends = _read(str(path_or_id))
    return kind.decoding_spec_of(config, ends), tokenizer


def register() -> None:
    """Makes `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` know our models, where the type is still free."""
    for model_type, kind in MODELS.items():
        # A later transformers may bring these models; registering over it would be an error.
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, kind.config_class)
            AutoModel.register(kind.config_class, kind)
            AutoModelForMaskedLM.register(kind.config_class, kind)


def _read(
    source: str,
) -> tuple[type[MaskedDiffusionModel], PreTrainedConfig, PreTrainedTokenizerBase | None, tuple[int, ...]]:
    """All that the files beside the weights say: class, config, tokenizer and its end tokens."""
    kind = _kind(source)
    with checkpoints.readable_files(source):
        checkpoints.check_layers(source)
        config = kind.config_class.from_pretrained(source)
        spec = kind.decoding_spec_of(config)
    tokenizer = load_tokenizer(source, config.model_type, spec)
    ends = generation_ends(source) + (() if tokenizer is None else end_ids(tokenizer, config.model_type))
    return kind, config, tokenizer, tuple(dict.fromkeys(ends))


def generation_ends(source: str) -> tuple[int, ...]:
    """End tokens of generation_config.json: SDAR's config names one of its two."""
    try:
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return ()
    given = None if path is None else checkpoints.read_object(path).get("eos_token_id")
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def _kind(source: str) -> type[MaskedDiffusionModel]:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give the folder that holds the model's files")
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{folder} has no *.safetensors; other weight files can run code when they are read: convert them first"
            )
    try:
        path = cached_file(source, "config.json")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here and cannot be had from the hub; give the folder of a downloaded model"
        ) from error
    config = checkpoints.read_object(path)
    model_type = config.get("model_type")
    if model_type in MISSING:
        raise ValueError(f"{source} is a {model_type!r} model, which is not read here: {MISSING[model_type]}")
    if model_type not in MODELS:
        raise ValueError(
            f"{source} is a {model_type!r} model; supported are 'llada' (LLaDA-8B, LLaDA-1.5, LLaDA-MoE), 'Dream' "
            "(Dream-v0, Dream-Coder, DiffuCoder), 'llada2_moe', 'sdar', 'sdar_moe' and 'Fast_dLLM_Qwen'"
        )
    # Two graphs go by the name of llada; only the published class tells them apart for certain.
    if model_type == "llada" and any(name.startswith("LLaDAMoE") for name in config.get("architectures") or ()):
        return LLaDAMoEModelLM
    return MODELS[model_type]
