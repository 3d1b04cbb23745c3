"""LLaDA-8B (Base, Instruct, and LLaDA-1.5, which has the same graph), arXiv 2502.09992: a Llama-like transformer
without a causal mask, rotation in fp32, row j of the logits for position j. Modules are named as in the published
checkpoints.

Not here: LLaDA-MoE (the same `model_type`, refused by its `num_experts`) and the block-causal LLaDA2.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from dlm.models.backbone import Layer, MaskedDiffusionModel, RMSNorm, refuse

# fields of the published config.json that select another graph, and the values that select this one
FIXED = {
    "num_experts": (None, 0),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "activation_type": ("silu",),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "multi_query_attention": (None, False),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "weight_tying": (False,),
    "tie_word_embeddings": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "attention_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "residual_dropout": (0.0,),
}


class LLaDAConfig(PreTrainedConfig):
    """config.json of a LLaDA checkpoint; the defaults are those of LLaDA-8B, but for the mask token, which must be
    named. Fields that this class does not declare are kept and saved again.

    Raises:
        ValueError: a field that selects another graph, widths that do not divide, fewer key heads than query heads.
    """

    model_type = "llada"
    # The published config.json has OLMo's names; transformers reads its own through this map.
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = 12288
    mlp_ratio: int | float = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: int | float = 500000.0
    init_std: float = 0.02
    use_cache: bool = False  # of no effect here; kept for the published code
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        refuse(self, {**kwargs, "tie_word_embeddings": self.tie_word_embeddings}, FIXED)
        kwargs.pop("rope_scaling", None)  # transformers claims this name; None, the only value allowed, says nothing
        # written out, because the published code's defaults for these are another graph's
        kwargs = {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None} | kwargs
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.mlp_hidden_size = self.mlp_hidden_size or int(self.mlp_ratio * self.d_model)
        self.embedding_size = self.embedding_size or self.vocab_size
        if self.n_kv_heads != self.n_heads:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} with n_heads={self.n_heads} is not supported: in LLaDA every query head "
                "has its own key head; use the same number"
            )
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} does not make even heads with n_heads={self.n_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"embedding_size={self.embedding_size} is below vocab_size={self.vocab_size}")
        super().__post_init__(**kwargs)


class LLaDALayer(Layer):
    """One block of LLaDA under the checkpoint's names; `ff_proj` is the gate, `ff_out` the way down."""

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, inner = config.d_model, config.mlp_hidden_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    input_norm = property(lambda self: self.attn_norm)
    to_q = property(lambda self: self.q_proj)
    to_k = property(lambda self: self.k_proj)
    to_v = property(lambda self: self.v_proj)
    to_out = property(lambda self: self.attn_out)
    ffn_norm = property(lambda self: self.ff_norm)
    gate = property(lambda self: self.ff_proj)
    up = property(lambda self: self.up_proj)
    down = property(lambda self: self.ff_out)


class LLaDAModelLM(MaskedDiffusionModel):
    """LLaDA with its language-model head; the name is the published checkpoints' `architectures` entry."""

    config_class = LLaDAConfig
    config: LLaDAConfig
    _no_split_modules = ["LLaDALayer"]

    shift = 0
    unmask = "confidence"
    # `rope_full_precision` of the published config.
    rope_dtype = torch.float32

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDALayer(config, i) for i in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    embed = property(lambda self: self.model.transformer.wte)
    layers = property(lambda self: self.model.transformer.blocks)
    final_norm = property(lambda self: self.model.transformer.ln_f)
    head = property(lambda self: self.model.transformer.ff_out)
