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
    losses = []
    for layer in (LINK, FOLLOW, AHEAD):
        _, rows, queries, keys = hints[hints[:, 0] == layer][:MOST].unbind(1)
        if len(rows):
            seen = looks(model, hidden[layer], layer, rows, queries)
            found = seen.gather(2, keys[:, None, None].expand(-1, seen.shape[1], 1)).exp().mean((1, 2))
            losses.append(-found.clamp(min=1e-6).log())
    return torch.cat(losses).mean() if losses else hidden[0].new_zeros(())


def looks(
    model: LlamaForCausalLM,
    hidden: torch.Tensor,
    number: int,
    rows: torch.Tensor,
    queries: torch.Tensor,
    groups: int = 1,
) -> torch.Tensor:
    """Log of the attention of some tokens in layer `number`: fp32 [k, heads of the first `groups` KV heads, length].

    Args:
        hidden: input of the layer, [rows, length, hidden].
        rows, queries: int64 [k], which tokens.
    """
    layer = model.model.layers[number]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    states = layer.input_layernorm(hidden)
    places = torch.arange(states.shape[1], device=states.device)[None]
    cos, sin = model.model.rotary_emb(states, places)
    key = states @ attention.k_proj.weight[: width * groups].T
    query = states @ attention.q_proj.weight[: width * groups * attention.num_key_value_groups].T
    query, key = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    asked = query[rows, :, queries].float().unflatten(1, (groups, -1))
    scores = asked @ key[rows].float().transpose(2, 3) * attention.scaling
    scores = scores.masked_fill(places > queries[:, None, None, None], float("-inf"))
    return scores.log_softmax(-1).flatten(1, 2)
