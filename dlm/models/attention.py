"""The attention function of our diffusion models: every query sees every visible key, there is no causality.

Registered with transformers as "dlm", together with a mask function that hands the key mask on as it is. Without a
cache keys and values are tensors and this is plain exact attention. A cache that stores slots returns a view instead,
and the slots' layer attends; this function holds no state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "dlm"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Any,
    value: torch.Tensor | Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [batch, heads, q, head_dim] queries; returns ([batch, q, heads, head_dim], None).

    `key` is a tensor [batch, kv_heads, n, head_dim], or a view whose `layer.step(query, k, v, scale, mask)` attends and
    gives [batch, heads, q, head_dim]. `attention_mask` is true where a key may be seen: [batch, n] for all queries
    alike, or [batch, q, n].

    Raises:
        ValueError: a mask of another shape.
    """
    # transformers passes its own scaling; without one it is the usual 1 / sqrt(head_dim).
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dim() not in (2, 3):
        raise ValueError(
            f"attention mask of shape {tuple(attention_mask.shape)}: give the key mask [batch, keys], or "
            "[batch, queries, keys]"
        )
    if isinstance(key, torch.Tensor):
        out = full_attention(query, key, value, scale, attention_mask)
    else:
        out = key.layer.step(query, key.k, key.v, scale, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Every query [batch, heads, q, head_dim] over every visible key [batch, kv_heads, n, head_dim].

    `visible` is [batch, n], [batch, q, n] or None. A query without a visible key gives zeros.
    """
    kv_heads, heads, q = key.shape[1], query.shape[1], query.shape[2]
    # the heads that share a key head are just more queries (their mask, if it is per query, repeats): no copy of the
    # keys, and masked attention stays on the fused kernels, which know no grouped heads together with a mask
    folded = query if heads == kv_heads else query.reshape(query.shape[0], kv_heads, heads // kv_heads * q, -1)
    if visible is None:
        out = F.scaled_dot_product_attention(folded, key, value, scale=scale)
    else:
        mask = visible.bool()[:, None, None, :] if visible.dim() == 2 else visible.bool()[:, None]
        if mask.shape[2] > 1 and folded.shape[2] != q:
            mask = mask.repeat(1, 1, heads // kv_heads, 1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
        # the CPU's kernel gives zeros there by itself, which torch does not promise for every fused kernel
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out if heads == kv_heads else out.reshape(query.shape)


def mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Hands the key mask [batch, keys] on as it is."""
    return attention_mask


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)
