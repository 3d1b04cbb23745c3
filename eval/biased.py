"""The embedded text model with the key biases of a Qwen2.5, and the answers it gave before.

Qwen2 adds a bias to its keys before the rotary embedding. In Qwen2.5-7B its norm is about 605 in the first layer, 921
in the last and 22 in most others, far above what the tokens contribute, and int4 caches with a scale per token lose the
tokens in it. A bias given to a trained model would change it, so each head is widened from 32 to 64 channels in such a
way that all scores stay what they were, up to fp32 rounding:

- every rotary pair gets a twin that turns at the same rate, into which tokens write nothing;
- "even", "slow", "fast": the bias lies in pairs that carry the tokens' own content, and its negative in their twins. A
  query reads both alike, so the bias cancels in the score and nowhere else: a cache that stores either badly shows it.
  "even" is all channels alike, signal and bias in the same ones; "slow" the two slowest pairs, which hardly turn over
  a prompt (the few large, constant key channels known of Qwen2.5); "fast" the two fastest, whose offset turns with
  every token, the worst case for a constant centre;
- "beside": the bias lies in the twins alone and queries are blind to them, as to offsets that a softmax does not see.

Use it in float32: bfloat16 keys of this size no longer hold what the tokens contribute, in any cache.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from textkv.mini import load_mini

Placement = Literal["even", "slow", "fast", "beside"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
NORMS = (605.0, 22.0, 921.0)
"""Of the key bias in the first layer, in those between, and in the last: Qwen2.5-7B's."""
EVERY_LAYER = (605.0, 605.0, 921.0)
"""A harder case: the embedded model finds its facts in the layers between, which a Qwen2.5-7B biases least."""

_PAIRS = {"even": slice(None), "slow": slice(-2, None), "fast": slice(2), "beside": slice(None)}


@torch.no_grad()
def biased_mini(
    placement: Placement = "even", norms: tuple[float, float, float] = NORMS, seed: int = 0
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """(the embedded model as a Qwen2 in eval mode and float32, tokenizer).

    Args:
        placement: where the bias lies; see the module.
        norms: of `k_proj.bias` in the first layer, in those between, and in the last.
        seed: of the bias's phases. Its size is the same in all pairs that have one.

    Raises:
        ValueError: unknown placement.
        FileNotFoundError: the embedded model has no weights.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} is not known; use one of {', '.join(PLACEMENTS)}")
    small, tokenizer = load_mini()
    model = Qwen2ForCausalLM(_widened(small)).eval()
    weights = small.state_dict()
    generator = torch.Generator().manual_seed(seed)
    last = small.config.num_hidden_layers - 1
    for name in [name for name in weights if ".self_attn." in name]:
        weights[name] = _wide_weight(weights[name], name, small, twins=placement != "beside")
        if name.endswith("k_proj.weight"):
            norm = norms[0] if ".layers.0." in name else norms[2] if f".layers.{last}." in name else norms[1]
            weights[name.replace("weight", "bias")] = _bias(small, placement, norm, generator)
    for name, fresh in model.state_dict().items():
        weights.setdefault(name, torch.zeros_like(fresh))  # biases of queries and values
    model.load_state_dict(weights)
    rotary = model.model.rotary_emb
    rotary.inv_freq.copy_(small.model.rotary_emb.inv_freq.repeat_interleave(2))
    return model, tokenizer


def _widened(small: LlamaForCausalLM) -> Qwen2Config:
    """A Qwen2 of the same shape with twice the head_dim."""
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return Qwen2Config(
        **{name: getattr(small.config, name) for name in shared},
        head_dim=2 * small.config.head_dim, attn_implementation="sdpa",
    )  # fmt: skip


def _wide_weight(weight: torch.Tensor, name: str, small: LlamaForCausalLM, twins: bool) -> torch.Tensor:
    """An attention weight with every head widened; channel 2 i of each half is the old i, 2 i + 1 its twin."""
    dim = small.config.head_dim
    if name.endswith("o_proj.weight"):
        heads = weight.unflatten(1, (-1, 2, dim // 2))
        return torch.stack([heads, torch.zeros_like(heads)], -1).flatten(1)
    heads = weight.unflatten(0, (-1, 2, dim // 2))
    read = torch.zeros_like(heads)
    if name.endswith("q_proj.weight"):
        heads = heads * 2**0.5  # scores are divided by the root of head_dim, which has doubled
        read = heads if twins else read
    return torch.stack([heads, read], 3).flatten(0, 3)


def _bias(small: LlamaForCausalLM, placement: Placement, norm: float, generator: torch.Generator) -> torch.Tensor:
    """k_proj.bias [kv_heads * 2 * head_dim] of that norm."""
    heads, half = small.config.num_key_value_heads, small.config.head_dim // 2
    phase = torch.rand(heads, half, generator=generator) * 2 * torch.pi
    pairs = torch.zeros(heads, 2, half)
    chosen = _PAIRS[placement]
    pairs[..., chosen] = torch.stack([phase.cos(), phase.sin()], 1)[..., chosen]
    own = torch.zeros_like(pairs) if placement == "beside" else -pairs
    bias = torch.stack([own, pairs], -1).flatten()
    return bias * (norm / bias.norm())
