"""Heads that mix a full and a streaming branch by their gates, and what such a model loses (arXiv 2410.10819).

    o = gate * o_full + (1 - gate) * o_stream        per KV head, for all its query heads

The model runs twice: as it is (the teacher, without gradient), then mixed (the student). As in the authors' code, and
unlike the paper's formula, o_full is by default the teacher's: gates of 1 then lose exactly nothing, and no gradient
runs through the full branch. Their streaming mask is rounded to blocks of 128; ours is exact. One attention function is
registered with transformers; what a forward does comes with it as the argument `duo`, so no state lies on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from textkv.kinds import text_model

GATED = "duo_gated"
QUERY_BLOCK = 1024
"""Rows per step of the streaming branch: bounds its masks to QUERY_BLOCK x (sinks + recent + QUERY_BLOCK)."""

Branch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(layer, q [batch, heads, n, head_dim], k, v [batch, kv_heads, n, head_dim], scale) -> output like q."""


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention."""
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def streaming_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: int, recent: int
) -> torch.Tensor:
    """Query i sees keys j <= i with j < sinks or i - j < recent; its own token is one of the recent ones."""
    n, outs = q.shape[2], []
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        oldest = max(sinks, start - recent + 1)
        keys = torch.cat(
            [torch.arange(min(sinks, stop), device=q.device), torch.arange(min(oldest, stop), stop, device=q.device)]
        )
        back = torch.arange(start, stop, device=q.device)[:, None] - keys
        visible = (back >= 0) & ((keys < sinks) | (back < recent))
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=visible, scale=scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outs, 2)


class Teacher:
    """The model as it is; remembers each layer's attention output."""

    def __init__(self) -> None:
        self.outputs: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self.outputs[layer] = full_attention(q, k, v, scale)
        return self.outputs[layer]


class Student:
    """The mixed model.

    Args:
        gates: [layers, kv_heads] in 0..1.
        full: the teacher's outputs by layer; None = the full branch is computed from the student's own states.
    """

    def __init__(self, gates: torch.Tensor, sinks: int, recent: int, full: dict[int, torch.Tensor] | None) -> None:
        self.gates, self.sinks, self.recent, self.full = gates, sinks, recent, full

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        full = full_attention(q, k, v, scale) if self.full is None else self.full[layer]
        stream = streaming_attention(q, k, v, scale, self.sinks, self.recent)
        gate = self.gates[layer].repeat_interleave(q.shape[1] // k.shape[1]).to(q.dtype)[:, None, None]
        return gate * full + (1 - gate) * stream


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    duo: Branch | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer by `duo`, or plain causal attention; returns ([batch, n, heads, head_dim], None).

    Raises:
        ValueError: padding, soft-capped scores, learned sinks, or a sliding window that would hide tokens.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if unknown or (window is not None and query.shape[2] > window):
        what = f"passes {unknown[0]} to attention" if unknown else f"slides over {window} tokens"
        raise ValueError(f"the model {what}: its heads cannot be identified with {query.shape[2]} tokens")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("identification takes rows of one length: give no padding")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = full_attention(query, key, value, scale) if duo is None else duo(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def gated(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The model's text decoder, on our attention function as long as the context lasts."""
    decoder = text_model(model)
    before = decoder.config._attn_implementation
    nested = hasattr(model.config, "vision_config")
    model.set_attn_implementation({"text_config": GATED} if nested else GATED)
    try:
        yield decoder
    finally:
        model.set_attn_implementation({"text_config": before} if nested else before)


def distillation(
    decoder: torch.nn.Module,
    ids: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    window: tuple[int, int],
    own_full_branch: bool = False,
) -> torch.Tensor:
    """Mean squared difference of the last hidden states of student and teacher, in the gates' dtype.

    The authors' normalisation: the mean over hidden channels and supervised tokens (the paper writes sums).

    Args:
        ids: int64 [batch, n].
        chosen: bool [n], the supervised tokens.
        window: (sinks, recent) of the streaming branch.
        own_full_branch: o_full from the student's own states, as the paper's formula reads, with gradient.
    """
    teacher = Teacher()
    with torch.no_grad():
        goal = decoder(ids, use_cache=False, duo=teacher).last_hidden_state[:, chosen]
    student = Student(gates, *window, None if own_full_branch else teacher.outputs)
    got = decoder(ids, use_cache=False, duo=student).last_hidden_state[:, chosen]
    return (got.to(gates.dtype) - goal.to(gates.dtype)).square().mean()


AttentionInterface.register(GATED, attention)
AttentionMaskInterface.register(GATED, lambda attention_mask=None, **kwargs: attention_mask)
