"""The oracle of the checks: plain exact attention over a full cache in which dropped tokens are masked."""

from __future__ import annotations

import torch
from transformers import AttentionInterface

MASKED = "conformance_masked"
"""Name under which it is registered as an attention implementation."""


def masked_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    kept=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Plain exact attention over a full cache; `kept[layer]` bool [batch, stored heads, n] hides dropped prompt tokens.

    The oracle of `equals_masked_full_attention`: it shares no code with the cache.
    """
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    m, n = query.shape[2], k.shape[2]
    visible = torch.ones(m, n, dtype=torch.bool).tril(n - m).expand(*query.shape[:2], m, n).clone()
    if sliding_window is not None:
        visible &= ~visible.new_ones(m, n).tril(n - m - sliding_window)
    if kept is not None and module.layer_idx in kept:
        shown = kept[module.layer_idx]
        shown = shown.repeat_interleave(query.shape[1] // shown.shape[1], 1)
        visible[..., : shown.shape[-1]] &= shown[:, :, None]
    scores = query @ k.mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:  # a sink takes its part of the softmax and gives nothing
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2).contiguous(), None
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(MASKED, masked_attention)
