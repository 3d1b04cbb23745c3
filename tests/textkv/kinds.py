"""One tiny random model of each kind that a cache must know: dense, with sliding windows, with linear states, with
attention sinks."""

from __future__ import annotations

from functools import cache

import torch
from transformers import PreTrainedModel

import textkv
from agentkv.eval import tiny as families
from tests.textkv import tiny

KINDS = {"dense": "llama", "sliding": "gemma3_text", "hybrid": "qwen3_next", "sinks": "gpt_oss"}
METHODS = [
    ("full", None), ("snapkv", 0.4), ("adakv", 0.4), ("streaming_llm", 0.4), ("lacache", 0.4), ("h2o", 0.4),
    ("kivi(4)", None), ("snapkv+mikv(16,2)", 0.4), ("minicache", None), ("duo_attention", 0.4),
    ("h2o+turboquant(4)", 0.4),
]  # fmt: skip
"""A method of each way to keep less: none, per layer, per head, a ring, moved keys, while decoding, packed, both,
shared by layers, whole heads, coded one by one."""


def model_of_kind(kind: str, implementation: str = "eager") -> PreTrainedModel:
    """The model, built once, without any hook of ours and on the given attention."""
    model = _built(kind)
    textkv.release(model)
    model.set_attn_implementation(implementation)
    return model


@cache
def _built(kind: str) -> PreTrainedModel:
    return tiny.build("llama") if kind == "dense" else families.build(KINDS[kind])


def ids(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, n] that every model here knows."""
    return torch.randint(1, 90, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, new: torch.Tensor, cache=None, mask: torch.Tensor | None = None, **kwargs):
    """Logits of one forward; positions count what the mask lets be seen, as `generate` counts them."""
    if mask is not None:
        at = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        kwargs = {"attention_mask": mask, "position_ids": at} | kwargs
    return model(new, past_key_values=cache, **kwargs).logits


def steps(model: PreTrainedModel, new: torch.Tensor, cache, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of feeding tokens one at a time."""
    out = []
    for i in range(new.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out.append(logits(model, new[:, i : i + 1], cache, mask))
    return torch.cat(out, 1)
