"""A tiny random model of any decoder family of the installed transformers: its own configuration, made small by name.

Nothing is downloaded. What a name means is guessed from the field's habits (`hidden_size`, `num_key_value_heads`, ...);
a family whose configuration fits no guess is reported as having none.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "d_ff": 96, "inner_dim": 96, "ffn_hidden_size": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "dense_intermediate_size": 96, "mlp_hidden_size": 96,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "n_head_kv": 2, "head_dim": 16, "d_kv": 16, "kv_channels": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "v_head_dim": 16, "swa_v_head_dim": 16, "attention_head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "num_global_key_value_heads": 2,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_expert_group": 1, "topk": 2, "first_k_dense_replace": 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "state_size": 8, "n_groups": 1, "mamba_dt_rank": 4, "mamba_ngroups": 1, "mamba_chunk_size": 8, "chunk_size": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 8, "lru_width": 64, "attention_window_size": 8,
    "query_pre_attn_scalar": 16,
    "conv_dim": 64, "block_dim": 64, "block_ff_dim": 96, "block_multiple_of": 8, "word_embed_proj_dim": 64,
    "rotary_dim": 8, "num_meta_tokens": 4, "attention_multiplier": 0.25, "router_n_groups": 1,
    "num_nextn_predict_layers": 0,
    "num_hidden_shared_layers": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "attn_layer_indices": [1, 3], "num_kv_shared_layers": 2, "adapter_rank": 8, "num_mem_blocks": 1,
    "cross_attention_layers": [],
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "full_attn_idxs",
    "attn_layer_indices",
)
_TYPES = {"granitemoehybrid": "linear_attention", "lfm2_moe": "conv"}
"""Families whose default has one kind of layer only, or that insist on a list."""
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size")
_LARGEST = 30_000_000
FIELDS_OF_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class NoConfig(Exception):
    """No tiny configuration of a family could be built; says what stood in the way."""


def has_windows(family: str) -> bool:
    """Whether the family's configuration knows a sliding window or a chunk."""
    return any(name in inspect.signature(CONFIG_MAPPING[family].__init__).parameters for name in _WINDOWS)


def families() -> list[str]:
    """Model types of all decoders that the installed transformers knows, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str, window: int | None = None, layers: int = 4, only_full: bool = False) -> PreTrainedModel:
    """A random model in fp32 and evaluation mode.

    Args:
        window: tokens of sliding windows and chunks, where the family has any; None = windows only where the family has
            them by default, of 8 tokens.
        layers: of the model; kinds of layers take turns so that each kind of the family occurs.
        only_full: all layers are of full attention.

    Raises:
        NoConfig: the family's configuration could not be made small.
    """
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(CONFIG_MAPPING[family], window, layers, only_full)
            _check_size(config)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    except NoConfig:
        raise
    except Exception as error:  # whatever a family's own code raises for a guess that does not fit it
        raise NoConfig(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Random weights attend almost evenly: larger projections make keys matter, so that errors show.
            if any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                weight.mul_(6)
            if name.endswith("sinks"):
                weight.normal_()
    model.generation_config.eos_token_id = None
    return model


def _check_size(config: Any) -> None:
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise NoConfig(f"{size:,} parameters: its sizes have names that are not known here, so it stays too large")


def _config(cls: type, window: int | None, layers: int, only_full: bool) -> Any:
    known = set(inspect.signature(cls.__init__).parameters)
    default = cls()
    given: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in known}
    given |= {name: layers for name in _LAYERS if name in known}
    given |= {"is_decoder": True} if hasattr(default, "is_decoder") else {}
    given |= {name: None for name in FIELDS_OF_TOKENS if name in known}
    for name in _PER_LAYER:
        of_default = getattr(default, name, None)
        if name in known and isinstance(of_default, list) and of_default:
            given[name] = _shortened(of_default, layers, only_full)
    if "layers_block_type" in known and not given.get("layers_block_type"):
        given["layers_block_type"] = ["mamba", "attention"] * (layers // 2)
    if cls.model_type in _TYPES:
        given["layer_types"] = [_TYPES[cls.model_type], "full_attention"] * (layers // 2)
    for name in FIELDS_OF_TOKENS:
        if isinstance(getattr(default, name, None), int):
            given[name] = 0  # some families insist on a number
    for name in _WINDOWS:
        if name in known and (window is not None or getattr(default, name, None) is not None):
            given[name] = window or 8
    if only_full and "layer_types" not in known:
        given |= {name: None for name in _WINDOWS if name in known}
    if window is not None and "max_window_layers" in known and "use_sliding_window" in known:
        given |= {"use_sliding_window": not only_full, "max_window_layers": layers // 2}
    if "text_config" in known and hasattr(default, "text_config"):
        return cls(text_config=_config(type(default.text_config), window, layers, only_full).to_dict())
    return cls(**given)


def _shortened(kinds: list, layers: int, only_full: bool) -> list:
    """A list with one entry per layer, made short: each kind in turn, the last layer of full attention."""
    full = next((kind for kind in kinds if kind in ("full_attention", "attention", "hybrid")), None)
    if only_full and full is not None:
        return [full] * layers
    distinct = list(dict.fromkeys(kinds))
    short = [distinct[i % len(distinct)] for i in range(layers)]
    if full is not None:
        short[-1] = full
    return short
