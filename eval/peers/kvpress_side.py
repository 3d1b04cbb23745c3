"""What runs in the peer's environment: `python kvpress_side.py JOB.json OUT.jsonl`. Imports nothing of ours.

The job names a model folder, prompts as ids and presses; one line is written for each prompt and press: the tokens
said, the tokens kept, the bytes that the cache's tensors hold, and seconds.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def press_of(told: dict[str, Any], ratio: float) -> Any:
    """The press of a pair, None for the full cache."""
    if not told["press"]:
        return None
    made = getattr(kvpress, told["press"])(compression_ratio=ratio, **told["settings"])
    return getattr(kvpress, told["wrapper"])(made, **told["around"]) if told["wrapper"] else made


def attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules on which head-wise presses leave their marks."""
    return [layer.self_attn for layer in model.model.layers]


@torch.inference_mode()
def answer(model: Any, ids: torch.Tensor, press: Any, spoken: int) -> tuple[list[int], DynamicCache, float, float]:
    """(tokens said, cache, seconds of the prompt, seconds of a decoded token)."""
    for module in attention_layers(model):
        module.masked_key_indices = None
    cache, length, begin = DynamicCache(), ids.shape[1], perf_counter()
    with press(model) if press else nullcontext():
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    read, said = perf_counter() - begin, [int(logits[0, -1].argmax())]
    begin = perf_counter()
    while len(said) < spoken:
        # Positions go on behind the whole prompt, as in the pipeline of kvpress.
        at = torch.tensor([[length + len(said) - 1]])
        logits = model(torch.tensor([said[-1:]]), past_key_values=cache, position_ids=at).logits
        said.append(int(logits[0, -1].argmax()))
    return said, cache, read, (perf_counter() - begin) / max(1, spoken - 1)


@torch.inference_mode()
def kept(model: Any, ids: torch.Tensor, press: Any) -> list[list[list[int]]]:
    """Prompt positions that are left, [layers][kv_heads][n]: equal keys are found in the whole cache's."""
    for module in attention_layers(model):
        module.masked_key_indices = None
    whole, short = DynamicCache(), DynamicCache()
    model(ids, past_key_values=whole, logits_to_keep=1)
    with press(model) if press else nullcontext():
        model(ids, past_key_values=short, logits_to_keep=1)
    found = []
    for every, some, module in zip(whole.layers, short.layers, attention_layers(model), strict=True):
        left = [
            torch.cdist(k, w).argmin(-1) for k, w in zip(some.keys[0].double(), every.keys[0].double(), strict=True)
        ]
        heads = [set(one.tolist()) for one in left]
        if module.masked_key_indices is not None:
            for _, head, position in zip(*(index.tolist() for index in module.masked_key_indices), strict=True):
                heads[head].discard(position)
        found.append([sorted(one) for one in heads])
    return found


def held(model: Any, cache: DynamicCache) -> int:
    """Bytes of the cache's tensors, and of the marks that head-wise presses leave on the model."""
    total = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    marks = (module.masked_key_indices or () for module in attention_layers(model))
    return total + sum(index.nbytes for found in marks for index in found)


def main(job_path: str, out_path: str) -> None:
    """Every prompt by every press in turn, so that what else the machine does meets all of them."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    models = {}
    for eager in {pair["eager"] for pair in job["pairs"]}:
        kind = "eager" if eager else "sdpa"
        models[eager] = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, attn_implementation=kind, local_files_only=True
        ).eval()
    with open(out_path, "w", encoding="utf-8") as out:
        for number, prompt in enumerate(job["prompts"]):
            ids = torch.tensor([prompt])
            for pair in job["pairs"]:
                for budget in [1.0] if not pair["press"] else job["budgets"]:
                    line = {"prompt": number, "method": pair["name"], "budget": budget}
                    model, press = models[pair["eager"]], press_of(pair, 1 - budget)
                    try:
                        said, cache, read, step = answer(model, ids, press, job["spoken"])
                        line |= {"said": said, "kv_bytes": held(model, cache), "read": read, "step": step}
                        if press and number < job["overlap"]:
                            line["kept"] = kept(model, ids, press)
                    except Exception as error:  # whatever a press cannot do is a row of the table
                        line["refused"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    out.write(json.dumps(line) + "\n")
                    out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
