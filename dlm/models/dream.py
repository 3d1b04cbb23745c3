"""Dream-v0-7B (Base, Instruct; Dream-Coder and DiffuCoder have the same graph), arXiv 2508.15487: Qwen2's transformer
without a causal mask, with biases on queries, keys and values. Row j of the logits predicts position j + 1, as in the
autoregressive model that it was made from. Modules are named as in the published checkpoints.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from dlm.models.backbone import Layer, RMSNorm, refuse
from dlm.models.qwen import QwenModel

# fields of the published config.json that select another graph, and the values that select this one
FIXED = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "attention_bias": (True,),
    "attention_dropout": (0.0,),
    "tie_word_embeddings": (False,),
}


class DreamConfig(PreTrainedConfig):
    """config.json of a Dream checkpoint; the defaults are those of Dream-v0-7B, but for the mask token, which must be
    named. Fields that this class does not declare are kept and saved again.

    Raises:
        ValueError: a field that selects another graph, widths or heads that do not divide.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: int | float = 1000000.0
    initializer_range: float = 0.02
    use_cache: bool = False  # of no effect here; kept for the published code
    mask_token_id: int | None = None
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        refuse(self, {**kwargs, "tie_word_embeddings": self.tie_word_embeddings}, FIXED)
        # transformers claims this name for a form of its own; None, the only value allowed, says nothing
        kwargs.pop("rope_scaling", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not make even heads with "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


class DreamProjections(nn.Module):
    """The checkpoint's `self_attn`: only the four projections; the layer attends."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        width = config.hidden_size
        kv_width = width // config.num_attention_heads * config.num_key_value_heads
        self.q_proj = nn.Linear(width, width, bias=True)
        self.k_proj = nn.Linear(width, kv_width, bias=True)
        self.v_proj = nn.Linear(width, kv_width, bias=True)
        self.o_proj = nn.Linear(width, width, bias=False)


class DreamLayer(Layer):
    """One layer of Dream under the checkpoint's names."""

    def __init__(self, config: DreamConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, inner = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = DreamProjections(config)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    input_norm = property(lambda self: self.input_layernorm)
    to_q = property(lambda self: self.self_attn.q_proj)
    to_k = property(lambda self: self.self_attn.k_proj)
    to_v = property(lambda self: self.self_attn.v_proj)
    to_out = property(lambda self: self.self_attn.o_proj)
    ffn_norm = property(lambda self: self.post_attention_layernorm)
    gate = property(lambda self: self.mlp.gate_proj)
    up = property(lambda self: self.mlp.up_proj)
    down = property(lambda self: self.mlp.down_proj)


class DreamModel(QwenModel):
    """Dream with its language-model head; the name is the published checkpoints' `architectures` entry."""

    config_class = DreamConfig
    config: DreamConfig
    _no_split_modules = ["DreamLayer"]
    layer_class = DreamLayer

    # Dream was made from Qwen2.5 and kept its head: the row of a token predicts the next one.
    shift = 1
    unmask = "entropy"
    # The context of its training; the config's 131,072 is Qwen2.5's.
    context_advised = 2048
