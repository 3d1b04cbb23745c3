"""LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676): a block-causal mixture of experts, blocks of 32 positions.

Queries, keys and values come from one projection (all query heads first, then key heads, then value heads), are scaled
by norms of their own, and only a share of each head is rotated. The first layers are dense.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from dlm.models.backbone import Layer, RMSNorm, refuse
from dlm.models.experts import Experts, GroupRouter, SwiGLU
from dlm.models.qwen import QwenModel

BLOCK = 32  # the config names none: all published weights were trained with this
FIXED = {
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "attention_dropout": (0.0, 0, None),
    "tie_word_embeddings": (False,),
    "score_function": ("sigmoid",),
    "norm_head": (False,),
}


class LLaDA2MoeConfig(PreTrainedConfig):
    """config.json of LLaDA2.x; the defaults are those of LLaDA2-mini. It names no mask, so it is the published one.

    Raises:
        ValueError: a field that selects another graph, heads or groups that do not divide.
    """

    model_type = "llada2_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: int | float = 600000.0
    partial_rotary_factor: float = 0.5
    use_qkv_bias: bool = False
    use_bias: bool = False
    moe_intermediate_size: int = 512
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    initializer_range: float = 0.02
    use_cache: bool = False  # of no effect here; kept for the published code
    mask_token_id: int | None = 156895
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        refuse(self, kwargs | {"tie_word_embeddings": self.tie_word_embeddings}, FIXED)
        kwargs.pop("rope_scaling", None)
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        rotated = int(self.head_dim * self.partial_rotary_factor)
        if heads % self.num_key_value_heads or rotated % 2 or not 0 < rotated <= self.head_dim:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={heads}, and "
                f"partial_rotary_factor={self.partial_rotary_factor} turn an even number of head_dim={self.head_dim}"
            )
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2 or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group} must cut num_experts={self.num_experts} into groups of two or more, and "
                f"topk_group={self.topk_group} be at most n_group"
            )
        super().__post_init__(**kwargs)


class Projections(nn.Module):
    """The checkpoint's `attention`; the layer attends."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        heads, head = config.num_attention_heads, config.head_dim
        rows = (heads + 2 * config.num_key_value_heads) * head
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.query_layernorm = RMSNorm(head, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(head, config.rms_norm_eps)
        self.dense = nn.Linear(heads * head, config.hidden_size, bias=config.use_bias)


class LLaDA2MoeLayer(Layer):
    """One layer of LLaDA2 under the checkpoint's names."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.attention = Projections(config)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        if layer_idx < config.first_k_dense_replace:
            self.mlp = SwiGLU(width, config.intermediate_size)
        else:
            gate = GroupRouter(
                width, config.num_experts, config.num_experts_per_tok, config.n_group, config.topk_group,
                config.routed_scaling_factor,
            )  # fmt: skip
            self.mlp = Experts(gate, width, config.moe_intermediate_size, config.num_experts, config.num_shared_experts)
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.rows = {
            "q": slice(0, queries),
            "k": slice(queries, queries + keys),
            "v": slice(queries + keys, queries + 2 * keys),
        }

    def project(self, normed: torch.Tensor, part: Literal["q", "k", "v"]) -> torch.Tensor:
        """Queries, keys or values [batch, q, heads * head_dim] by their rows of the common projection."""
        one, rows = self.attention.query_key_value, self.rows[part]
        return F.linear(normed, one.weight[rows], None if one.bias is None else one.bias[rows])

    def mix(self, normed: torch.Tensor) -> torch.Tensor:
        """The feed-forward of normed states [batch, q, width]."""
        return self.mlp(normed)

    input_norm = property(lambda self: self.input_layernorm)
    to_out = property(lambda self: self.attention.dense)
    q_norm = property(lambda self: self.attention.query_layernorm)
    k_norm = property(lambda self: self.attention.key_layernorm)
    ffn_norm = property(lambda self: self.post_attention_layernorm)


class LLaDA2MoeModelLM(QwenModel):
    """LLaDA2 with its language-model head; the name is the published checkpoints' `architectures` entry."""

    config_class = LLaDA2MoeConfig
    config: LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeLayer"]

    layer_class, embedding = LLaDA2MoeLayer, "word_embeddings"
    unmask = "threshold(0.95)"

    @classmethod
    def block_of(cls, config: PreTrainedConfig) -> int | None:
        """32 positions."""
        return BLOCK
