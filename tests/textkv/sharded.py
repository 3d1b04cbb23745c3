"""One process of several that share a tiny model's heads: `torchrun sharded.py FOLDER FILE`.

FOLDER holds the model; every process writes FILE.RANK: what each method kept and said, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import agentkv  # noqa: F401 (its methods)
from textkv import MethodCache
from textkv.method import REGISTRY, list_methods

TOKENS, COMPARE = 96, ("tova", "cake", "snapkv+adakv", "gear", "duo_attention")


def apart() -> list[str]:
    """Every method that looks at each head alone."""
    return [name for name in list_methods() if REGISTRY.find(name).heads_apart] + ["snapkv+kivi(4)"]


def told(model, method: str) -> dict:
    """The answer to a fixed prompt, and the positions that each layer and head kept of it."""
    ids = torch.randint(100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    cache = MethodCache(model, method, 0.4)
    cache.begin(ids, spans=[[(8, 30), (40, 70)]])
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=6, pad_token_id=0)
    return {"tokens": out[0, TOKENS:].tolist(), "kept": [x[0].tolist() for x in cache.at_rest.kept]}


def refusal(model, method: str) -> str:
    """Why a method is not built; "" if it is."""
    try:
        MethodCache(model, method, 0.4)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: str, file: str) -> None:
    """See the module."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    found = {name: told(model, name) for name in apart()}
    found |= {name: refusal(model, name) for name in COMPARE}
    Path(f"{file}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
