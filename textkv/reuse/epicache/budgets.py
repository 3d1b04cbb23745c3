"""How many entries each layer gets: by how much its keys suffer when a text is read in blocks (arXiv 2509.17396,
section 3.3 and Eq. 10).

Paper and released code differ here: the code scales by minimum and maximum and clamps without renormalising, so that
layers together get more than there is. This is the paper's formula, with a floor, and its sum is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from textkv.budgets import round_to_sum
from textkv.cache import MethodCache


def layer_entries(sensitivity: Sequence[float], budget: int, alpha: float = 1.0, floor: float = 0.25) -> list[int]:
    """Entries of each layer, whose sum is exactly `budget` times the number of layers.

    Args:
        sensitivity: of each layer, at least 0: `1 - cosine` of `sensitivities`.
        budget: entries of a KV head, mean over layers.
        alpha: 0 = all layers alike; the larger, the more the most sensitive ones get.
        floor: share of the budget that every layer has.

    Raises:
        ValueError: no layers, a negative or infinite number, a budget below 1, or a floor that is no share.
    """
    given = torch.tensor(list(sensitivity), dtype=torch.float64)
    if not len(given) or not bool(given.isfinite().all()) or bool((given < 0).any()):
        raise ValueError(f"sensitivity={list(sensitivity)}: give one finite number of at least 0 for each layer")
    if budget < 1 or alpha < 0 or not 0 <= floor <= 1:
        raise ValueError(
            f"budget={budget}, alpha={alpha}, floor={floor}: at least 1, at least 0, and a share in [0, 1]"
        )
    # 0 ** 0 is 1 for torch too: alpha=0 makes all layers alike, those without any sensitivity as well.
    weights = given**alpha
    share = weights / weights.sum() if weights.sum() > 0 else torch.full_like(given, 1 / len(given))
    least = int(floor * budget)
    return (least + round_to_sum(share * len(given) * (budget - least), len(given) * (budget - least))).tolist()


@torch.inference_mode()
def sensitivities(
    model: PreTrainedModel, ids: Sequence[int], block: int = 4096, sinks: int = 128, overlap: float = 0.5
) -> list[float]:
    """`1 - cosine` between each layer's keys as the model reads a text, and as it reads it block by block and forgets
    all but the first `sinks` tokens and the last `overlap` of the block before. One text of any kind is enough.

    Raises:
        ValueError: a text that ends within its first block, which tells nothing.
    """
    if len(ids) <= block:
        raise ValueError(f"the text has {len(ids)} tokens, a block {block}: give a longer text, or smaller blocks")
    cache = MethodCache(model, "full")
    apart: list[list[float]] = []
    given = torch.tensor([list(ids)], device=model.device)
    whole = MethodCache(model, "full")
    model(given, past_key_values=whole, logits_to_keep=1)
    for first in range(0, len(ids), block):
        part = given[:, first : first + block]
        model(part, past_key_values=cache, logits_to_keep=1)
        stop = first + part.shape[1]
        if first:
            pairs = zip(cache.context.layers, whole.context.layers, strict=True)
            apart.append([_apart(ours.stored().keys[:, :, -part.shape[1] :], truth.stored().keys[:, :, first:stop])
                          for ours, truth in pairs])  # fmt: skip
        known = max(sinks, stop - int(overlap * part.shape[1]))
        gone = _between(sinks, known, first, block, overlap)
        if gone:
            cache.forget([gone])
    return torch.tensor(apart).mean(0).clamp(min=0).tolist()


def _between(sinks: int, known: int, first: int, block: int, overlap: float) -> list[tuple[int, int]]:
    """What goes after the block that began at `first`: [start, end) from what the block before left to `known`."""
    left = max(sinks, first - int(overlap * block) if first else 0)
    return [(left, known)] if left < known else []


def _apart(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """1 - mean cosine of keys [1, kv_heads, n, head_dim]: both lie at the same positions, so that RoPE cancels."""
    return 1 - float(F.cosine_similarity(ours.float(), truth.float(), dim=-1).mean())
