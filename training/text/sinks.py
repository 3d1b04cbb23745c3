"""Attention sinks for the trainer: where a head looks that has nothing to look for.

Large models put the idle part of their attention on the first token, and StreamingLLM, LaCache and every method that
keeps first tokens rely on it (arXiv 2309.17453). In a model of this size and training length that does not come by
itself, so heads of the upper layers are shown to rest there while they read filler and ordinary text: a head that gives
the first token less than `ENOUGH` of its attention pays. What is left stays free, and facts, questions and answers, and
the first layer, which gathers neighbours, are not touched. Training only, as the hints (`training.text.hints`).
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

from training.text.hints import looks

LAYERS = (1, 2, 3)
ENOUGH = 0.8
MOST = 128  # idle tokens per step: each one costs a softmax over its row in every head


def sink_loss(model: LlamaForCausalLM, hidden: tuple[torch.Tensor, ...], idle: torch.Tensor) -> torch.Tensor:
    """Mean of max(0, log(ENOUGH / attention on the first token)) over idle tokens, heads and layers; fp32 scalar.

    Args:
        hidden: inputs of the layers, [rows, length, hidden] each.
        idle: int64 [k, 2] as (row, query).
    """
    if not len(idle):
        return hidden[0].new_zeros(())
    rows, queries = idle[:MOST].unbind(1)
    groups = model.config.num_key_value_heads
    resting = torch.stack([looks(model, hidden[n], n, rows, queries, groups)[..., 0] for n in LAYERS])
    return (math.log(ENOUGH) - resting).clamp(min=0).mean()


@torch.inference_mode()
def sink_mass(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Attention on the first token, mean over the tokens from the second half of `ids` int64 [rows, length] on:
    fp32 [layers, heads]."""
    hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    queries = torch.arange(ids.shape[1] // 2, ids.shape[1], device=ids.device)
    places = torch.cartesian_prod(torch.arange(len(ids), device=ids.device), queries).split(256)
    groups = model.config.num_key_value_heads
    return torch.stack(
        [
            torch.cat([looks(model, hidden[n], n, *part.unbind(1), groups)[..., 0].exp() for part in places]).mean(0)
            for n in range(model.config.num_hidden_layers)
        ]
    )
