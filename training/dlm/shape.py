"""The sizes of the mini models: real members of their families, small enough to be shipped with the code.

All share the tokenizer. LLaDA has full heads, Dream and the guider share key heads among query heads, as the 7B
models do. The guider is half as deep: it only has to nod.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from dlm.mini import check_kind, family_of
from dlm.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM

WIDTH, INNER, HEADS, KEY_HEADS = 128, 384, 4, 2
LAYERS = {"llada": 6, "dream": 6, "guider": 3}
MAX_LENGTH = 2048
THETA = 10_000.0


def mini_config(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of one of the models for the vocabulary of `tokenizer`."""
    kind = family_of(check_kind(kind))
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if kind == "llada":
        return LLaDAConfig(
            d_model=WIDTH,
            n_layers=LAYERS[kind],
            n_heads=HEADS,
            mlp_hidden_size=INNER,
            max_sequence_length=MAX_LENGTH,
            rope_theta=THETA,
            mask_token_id=tokenizer.mask_token_id,
            **ids,
        )
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS[kind],
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": None,
    }
    if kind == "dream":
        return DreamConfig(**shared, rope_theta=THETA, mask_token_id=tokenizer.mask_token_id, **ids)
    # Qwen2Config takes the base of the rotation only inside this dict since transformers 5.
    rope = {"rope_type": "default", "rope_theta": THETA}
    return Qwen2Config(**shared, rope_parameters=rope, tie_word_embeddings=False, **ids)


@torch.no_grad()
def fresh_model(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained model, started for its small width.

    The library's spread of 0.02 suits thousands of channels; here weights get 1 / sqrt(inputs). What is added to the
    residual stream starts smaller still. Random query and key biases, where there are any, let attention tell
    relative positions apart from the beginning.
    """
    kinds = {"llada": LLaDAModelLM, "dream": DreamModel, "guider": Qwen2ForCausalLM}
    model = kinds[family_of(check_kind(kind))](mini_config(kind, tokenizer))
    # GPT-2's rule: two branches per layer add up, so each starts smaller by the square root of their number.
    added = (2 * LAYERS[family_of(kind)]) ** -0.5
    for name, parameter in model.named_parameters():
        # shape[1] is the number of inputs of a linear layer, and the width of an embedding.
        if parameter.ndim > 1:
            way_out = "blocks" in name and name.endswith(("attn_out.weight", "ff_out.weight"))
            shrink = added if way_out or name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            torch.nn.init.normal_(parameter, std=shrink * parameter.shape[1] ** -0.5)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            torch.nn.init.normal_(parameter, std=1.0)
    return model
