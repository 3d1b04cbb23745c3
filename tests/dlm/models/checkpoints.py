"""Random checkpoints as they are published: the config.json with the fields of the real one, small; safetensors under
the official names, in one file or in shards with an index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLADA: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32, "embedding_dropout": 0.0,
    "embedding_size": 64, "eos_token_id": 61, "flash_attention": False, "include_bias": False,
    "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell",
    "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "mask_token_id": 60, "max_sequence_length": 128, "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "pad_token_id": 61,
    "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
    "rope_theta": 500000.0, "scale_logits": False, "torch_dtype": "float32", "transformers_version": "4.46.3",
    "use_cache": False, "vocab_size": 64, "weight_tying": False,
}  # fmt: skip
DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 61, "eos_token_id": 61, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 40, "mask_token_id": 60, "max_position_embeddings": 4096, "max_window_layers": 28,
    "model_type": "Dream", "num_attention_heads": 6, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 61, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.46.2", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 64,
}  # fmt: skip
CONFIGS = {"llada": LLADA, "Dream": DREAM}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoint with its shape, in the order of the layers."""
    return _llada_shapes(config) if config["model_type"] == "llada" else _dream_shapes(config)


def _llada_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, vocabulary = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    found = {"model.transformer.wte.weight": (vocabulary, width)}
    for i in range(config["n_layers"]):
        block = f"model.transformer.blocks.{i}."
        found |= {f"{block}{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
        found |= {f"{block}{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        found |= {f"{block}{name}.weight": (inner, width) for name in ("ff_proj", "up_proj")}
        found[f"{block}ff_out.weight"] = (width, inner)
    return found | {"model.transformer.ln_f.weight": (width,), "model.transformer.ff_out.weight": (vocabulary, width)}


def _dream_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {f"{layer}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, out in (("q", width), ("k", kv_width), ("v", kv_width)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (out, width)
            found[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        found[f"{layer}self_attn.o_proj.weight"] = (width, width)
        found |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (width, inner)
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def random_state(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights strong enough that attention is far from uniform and every bias and norm counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        state[name] = (1 + 0.3 * noise if is_norm else noise / shape[-1] ** 0.5 * 1.5).to(dtype)
    return state


def write(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder: config.json and the weights in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index: dict[str, str] = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        names = list(state)[part::shards]
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def published(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A small checkpoint of the family "llada" or "Dream" with some config fields changed; None removes a field."""
    config = CONFIGS[family] | changes
    for name in [name for name, value in changes.items() if value is None]:
        del config[name]
    return write(folder, config, random_state(config, seed))
