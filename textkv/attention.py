"""The one attention function and the one mask function that we register with transformers.

Both are pure: state lives in the cache layer that the view points back to. Without a cache of ours (training, or a
plain forward) keys and values are tensors and the function is ordinary exact attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from textkv.layer import ATTENTION, View


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | View,
    value: torch.Tensor | View,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of [batch, heads, m, head_dim] queries; returns ([batch, m, heads, head_dim], None).

    Raises:
        ValueError: soft-capped scores, learned sinks, a sliding window that would hide tokens, a 4-D mask.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _refuse(kwargs, seen=key.layer.seen if isinstance(key, View) else 0, new=query.shape[2])
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention mask of shape {tuple(attention_mask.shape)}: give the 2-D padding mask [batch, tokens]; "
            "which stored tokens are visible is the cache's business"
        )
    if isinstance(key, View):
        out = key.layer.step(query, key.k, key.v, scale, attention_mask)
    else:
        out = _without_cache(query, key, value, scale, attention_mask, dropout)
    return out.transpose(1, 2).contiguous(), None


def mask(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """Hands the 2-D padding mask [batch, tokens] on as it is: causality and eviction are the layer's business."""
    return attention_mask


def use(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the model's text attention on this cache; a vision tower keeps its own. Returns the model."""
    if getattr(model.config, "text_config", None) is not None and hasattr(model.config, "vision_config"):
        model.set_attn_implementation({"text_config": ATTENTION})
    else:
        model.set_attn_implementation(ATTENTION)
    return model


def _refuse(kwargs: dict, seen: int, new: int) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"the model passes {name} to attention, which this cache does not support")
    window = kwargs.get("sliding_window")
    if window is not None and seen + new > window:
        raise ValueError(
            f"the model's layers slide over {window} tokens and {seen + new} were seen: this cache keeps one length "
            "rule per method; use a model without sliding windows or shorter texts"
        )


def _without_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, padding: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Exact attention over plain keys: no cache at all, or one of transformers' own that is longer than the queries."""
    m, n = q.shape[2], k.shape[2]
    padded = padding is not None and not bool(padding[:, -n:].all())
    visible = None
    if padded or 1 < m < n:
        # torch's own causal flag aligns the first query with the first key; ours is the last with the last.
        visible = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
        if padded:
            own = torch.zeros_like(visible).diagonal_scatter(visible.new_ones(m), n - m)
            visible = (visible & padding[:, None, None, -n:].bool()) | own
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None and m > 1, scale=scale, dropout_p=dropout,
        enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)
