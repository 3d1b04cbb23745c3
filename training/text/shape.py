"""The mini text model's size: a real Llama with grouped queries, small enough to be shipped with the code.

`rope_theta` is 500,000: of the 16 frequencies per head the lowest six turn by about a radian or less over 4,096
tokens, so a question can find its fact by content at any distance, and the high ones still tell neighbours apart.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

MAX_LENGTH = 4096


def mini_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The configuration of the embedded text model for `tokenizer`'s vocabulary (about 1 million parameters)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fresh_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained model of the embedded one's size."""
    return started(mini_config(tokenizer))


@torch.no_grad()
def started(config: LlamaConfig) -> LlamaForCausalLM:
    """An untrained model, started for its small width.

    The library's spread of 0.02 suits thousands of channels; here weights get 1 / sqrt(inputs). What is added to the
    residual stream starts smaller still, so that a token's own embedding is not drowned before anything is learned.
    """
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    added = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            shrink = added if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            torch.nn.init.normal_(parameter, std=shrink * parameter.shape[1] ** -0.5)
    return model
