"""The work of `kvpress_side` with our caches: same prompts, pairs and lines; transformers' own cache beside them."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from textkv import MethodCache, release, use

DYNAMIC = "DynamicCache"


@torch.inference_mode()
def answer(model: PreTrainedModel, ids: torch.Tensor, cache: Any, spoken: int) -> tuple[list[int], float, float]:
    """(tokens said, seconds of the prompt, seconds of a decoded token) of one prompt int64 [1, n]."""
    begin = perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    read, said = perf_counter() - begin, [int(logits[0, -1].argmax())]
    begin = perf_counter()
    while len(said) < spoken:
        logits = model(torch.tensor([said[-1:]]), past_key_values=cache).logits
        said.append(int(logits[0, -1].argmax()))
    return said, read, (perf_counter() - begin) / max(1, spoken - 1)


def lines(model: PreTrainedModel, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line for each prompt and method, all methods in turn; `DYNAMIC` is transformers' own cache."""
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt])
        release(model)
        cache = DynamicCache()
        said, read, step = answer(model, ids, cache, job["spoken"])
        size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        yield {"prompt": number, "method": DYNAMIC, "budget": 1.0, "said": said, "kv_bytes": size} | {
            "read": read, "step": step
        }  # fmt: skip
        use(model)
        for pair in job["pairs"]:
            for budget in [1.0] if not pair["press"] else job["budgets"]:
                yield _line(model, ids, number, pair, budget, job)


def _line(
    model: PreTrainedModel, ids: torch.Tensor, number: int, pair: dict[str, Any], budget: float, job: dict[str, Any]
) -> dict[str, Any]:
    cache = MethodCache(model, pair["ours"], budget)
    said, read, step = answer(model, ids, cache, job["spoken"])
    line = {"prompt": number, "method": pair["name"], "budget": budget, "said": said, "read": read, "step": step}
    line["kv_bytes"] = cache.kv_bytes()
    if pair["press"] and number < job["overlap"]:
        line["kept"] = [
            [[p for p in head if p >= 0] for head in layer[0].tolist()] for layer in cache.at_rest.kept
        ]  # fmt: skip
    return line
