"""Diffusion models under the module names of Qwen: SDAR, its mixture of experts, LLaDA-MoE, Fast-dLLM v2.

They differ in biases, in norms of queries and keys, in the feed-forward, and in what a token sees. Block-causal models
count their blocks in positions from 0 on, so the end of a prompt shares a block with the first tokens of the answer.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import PreTrainedConfig

from dlm.models.backbone import Layer, MaskedDiffusionModel, RMSNorm, refuse
from dlm.models.experts import Experts, SoftmaxRouter, SwiGLU

# fields of the published config.json that select another graph, and the values that select these
FIXED = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "attention_dropout": (0.0, 0, None),
}


class QwenConfig(PreTrainedConfig):
    """The fields that the config.json of all these models have; every published one names its own values.

    Raises:
        ValueError: a field that selects another graph, heads that do not divide.
    """

    model_type = "qwen_diffusion"
    fixed: ClassVar[dict[str, tuple]] = {}

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: int | float = 1000000.0
    initializer_range: float = 0.02
    use_cache: bool = False  # of no effect here; kept for the published code
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        own = {name: getattr(self, name) for name in self.fixed if hasattr(self, name)}
        refuse(self, kwargs | own, FIXED | self.fixed)
        kwargs.pop("rope_scaling", None)  # transformers claims this name; None, the only value allowed, says nothing
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        if self.head_dim % 2 or heads % self.num_key_value_heads:
            raise ValueError(
                f"head_dim={self.head_dim} must be even and num_key_value_heads={self.num_key_value_heads} divide "
                f"num_attention_heads={heads}"
            )
        super().__post_init__(**kwargs)


class SDARConfig(QwenConfig):
    """config.json of SDAR: head_dim 128 whatever the width, blocks of 4 (other weights: 8 to 64)."""

    model_type = "sdar"
    fixed = {"attention_bias": (False,), "tie_word_embeddings": (False,)}

    block_size: int = 4


class SDARMoeConfig(SDARConfig):
    """config.json of SDAR-30B-A3B: Qwen3-MoE's fields."""

    model_type = "sdar_moe"
    fixed = SDARConfig.fixed | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True


class FastDLLMConfig(QwenConfig):
    """config.json of Fast-dLLM v2 (Qwen2.5 with blocks); the files name no mask, so it is the published one."""

    model_type = "Fast_dLLM_Qwen"
    fixed = {"attention_bias": (True,)}

    bd_size: int = 32
    mask_token_id: int | None = 151665
    eos_token_id: int | list[int] | None = 151645


class LLaDAMoEConfig(QwenConfig):
    """config.json of LLaDA-MoE-7B-A1B, whose `model_type` is LLaDA's; it names no mask, so it is the published one.

    The published config class has no usable defaults (its sizes are -1), so the file must name what shapes the network.

    Raises:
        ValueError: as `QwenConfig`, and a field that the file leaves out, or layers that are not all of experts.
    """

    model_type = "llada"
    has_no_defaults_at_init = True
    fixed = {
        "attention_bias": (False,), "qk_layernorm": (True,), "norm_topk_prob": (False, None),
        "moe_router_score_function": ("softmax", None), "moe_router_enable_expert_bias": (False, None),
        "routed_scaling_factor": (1, None), "partial_rotary_factor": (1, None),
        "shared_expert_intermediate_size": (None, 0), "router_num_group": (None, 1), "clip_qkv": (None,),
        "tie_word_embeddings": (False,),
    }  # fmt: skip

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    expert_intermediate_size: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: int | float | None = None
    mask_token_id: int | None = 156895
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs) -> None:
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "expert_intermediate_size",
                  "num_experts", "num_experts_per_tok", "max_position_embeddings", "rope_theta")  # fmt: skip
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"{missing[0]} is missing in this LLaDA-MoE config; take it from the checkpoint's config")
        dense = [i for i, experts in enumerate(kwargs.get("moe_layer_freq") or ()) if not experts]
        if dense:
            raise ValueError(f"moe_layer_freq makes layer {dense[0]} dense; in this network every layer has experts")
        super().__post_init__(**kwargs)


class Attention(nn.Module):
    """The checkpoint's `self_attn`: projections and norms; the layer attends."""

    def __init__(self, config: QwenConfig, bias: bool, norms: bool) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        if norms:
            self.q_norm, self.k_norm = RMSNorm(head, config.rms_norm_eps), RMSNorm(head, config.rms_norm_eps)


class QwenLayer(Layer):
    """One layer; `bias` of queries, keys and values, `norms` of queries and keys."""

    bias: ClassVar[bool] = False
    norms: ClassVar[bool] = True

    def __init__(self, config: QwenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, self.bias, self.norms)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.feed_forward(config)

    def feed_forward(self, config: QwenConfig) -> nn.Module:
        """The checkpoint's `mlp`."""
        return SwiGLU(config.hidden_size, config.intermediate_size)

    def mix(self, normed):
        """The feed-forward of normed states [batch, q, width]."""
        return self.mlp(normed)

    input_norm = property(lambda self: self.input_layernorm)
    to_q = property(lambda self: self.self_attn.q_proj)
    to_k = property(lambda self: self.self_attn.k_proj)
    to_v = property(lambda self: self.self_attn.v_proj)
    to_out = property(lambda self: self.self_attn.o_proj)
    q_norm = property(lambda self: self.self_attn.q_norm if self.norms else None)
    k_norm = property(lambda self: self.self_attn.k_norm if self.norms else None)
    ffn_norm = property(lambda self: self.post_attention_layernorm)


class FastDLLMLayer(QwenLayer):
    """A layer of Qwen2.5."""

    bias, norms = True, False


class SDARMoeLayer(QwenLayer):
    """A layer of Qwen3-MoE."""

    def feed_forward(self, config: SDARMoeConfig) -> nn.Module:
        """Experts whose weights sum to 1 if the config says so."""
        gate = SoftmaxRouter(config.hidden_size, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        return Experts(gate, config.hidden_size, config.moe_intermediate_size, config.num_experts)


class LLaDAMoELayer(QwenLayer):
    """A layer of LLaDA-MoE."""

    def feed_forward(self, config: LLaDAMoEConfig) -> nn.Module:
        """Experts with the probabilities of the softmax over all of them."""
        gate = SoftmaxRouter(config.hidden_size, config.num_experts, config.num_experts_per_tok, False)
        return Experts(gate, config.hidden_size, config.expert_intermediate_size, config.num_experts)


class QwenModel(MaskedDiffusionModel):
    """What models named like Qwen's have in common; `layer_class` is a layer's, `embedding` the embedding's name."""

    layer_class: ClassVar[type[Layer]] = QwenLayer
    embedding: ClassVar[str] = "embed_tokens"
    rope_dtype = None
    shift = 0

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        layers = (self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                self.embedding: nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    embed = property(lambda self: self.model[self.embedding])
    layers = property(lambda self: self.model.layers)
    final_norm = property(lambda self: self.model.norm)
    head = property(lambda self: self.lm_head)


class SDARForCausalLM(QwenModel):
    """SDAR (dense); the name is the published checkpoints' `architectures` entry."""

    config_class = SDARConfig
    config: SDARConfig
    _no_split_modules = ["QwenLayer"]
    unmask = "threshold(0.85)"

    @classmethod
    def block_of(cls, config: PreTrainedConfig) -> int | None:
        """The blocks of these weights."""
        return config.block_size


class SDARMoeForCausalLM(SDARForCausalLM):
    """SDAR-30B-A3B."""

    config_class = SDARMoeConfig
    config: SDARMoeConfig
    _no_split_modules = ["SDARMoeLayer"]
    layer_class = SDARMoeLayer


class FastDLLMForCausalLM(QwenModel):
    """Fast-dLLM v2 (arXiv 2509.26328): row j predicts position j + 1, blocks of 32 written 8 positions at a time."""

    config_class = FastDLLMConfig
    config: FastDLLMConfig
    _no_split_modules = ["FastDLLMLayer"]
    # The small checkpoint has no head of its own.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    layer_class = FastDLLMLayer
    shift = 1
    unmask = "threshold(0.9)"
    sub_block = 8

    @classmethod
    def block_of(cls, config: PreTrainedConfig) -> int | None:
        """The blocks of these weights."""
        return config.bd_size


class LLaDAMoEModelLM(QwenModel):
    """LLaDA-MoE-7B-A1B (arXiv 2509.24389): every token sees every other."""

    config_class = LLaDAMoEConfig
    config: LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoELayer"]
    layer_class = LLaDAMoELayer
    unmask = "confidence"
