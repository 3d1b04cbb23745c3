"""Hints for the trainer: where a token that is about to be answered should look.

Exact recall appears late and suddenly when only the answers are taught. The rows know where each answer stands, so a
group of heads in three layers is shown the place. In layer `FOLLOW` the token before each answer token looks at the
place that it copies from. In layer `AHEAD` the question's last token looks at all places of the answer at once, as
larger models do, on which every method that scores by the end of the prompt relies. In layer `LINK` the two ends of a
pointer learn which key they belong to: the key pointed at looks at the key before it, and the answer at the key asked
for. Training only: the model's forward is untouched.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LINK, FOLLOW, AHEAD = 1, 2, 3
MOST = 192  # hints of a layer per step: each one costs a softmax over its row


def hint_loss(model: LlamaForCausalLM, hidden: tuple[torch.Tensor, ...], hints: torch.Tensor) -> torch.Tensor:
    """Mean -log attention that the hinted keys get from the first KV head's queries; fp32 scalar.

    Args:
        hidden: inputs of the layers, [rows, length, hidden] each.
        hints: int64 [k, 4] as (layer, row, query, key).
    """
    losses = [
        -_looks(model, hidden[layer], mine, layer).clamp(min=1e-6).log()
        for layer in (LINK, FOLLOW, AHEAD)
        if len(mine := hints[hints[:, 0] == layer][:MOST])
    ]
    return torch.cat(losses).mean() if losses else hidden[0].new_zeros(())


def _looks(model: LlamaForCausalLM, hidden: torch.Tensor, hints: torch.Tensor, number: int) -> torch.Tensor:
    """Attention [k] of each hint, averaged over the group's heads."""
    layer = model.model.layers[number]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    _, rows, queries, keys = hints.unbind(1)
    states = layer.input_layernorm(hidden)
    places = torch.arange(states.shape[1], device=states.device)[None]
    cos, sin = model.model.rotary_emb(states, places)
    key = states @ attention.k_proj.weight[:width].T
    query = states @ attention.q_proj.weight[: width * attention.num_key_value_groups].T
    query, key = apply_rotary_pos_emb(query.unflatten(-1, (-1, width)).transpose(1, 2), key[:, None], cos, sin)
    scores = query[rows, :, queries].float() @ key[rows, 0].float().transpose(1, 2) * attention.scaling
    scores = scores.masked_fill(places[:, None] > queries[:, None, None], float("-inf"))
    return scores.softmax(-1).gather(2, keys[:, None, None].expand(-1, scores.shape[1], 1)).mean((1, 2))
