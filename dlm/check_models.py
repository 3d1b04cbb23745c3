"""`python -m dlm.check_models`: every diffusion model class with small random weights, saved, loaded and decoded.

One row per published `model_type`: whether the saved folder loads with the same logits; whether decoding without cache
writes what the model's own sampler writes, in as many forwards; whether the default cache writes the tokens of no cache
(exact for block-causal models, not promised for the others); and what both cost. That the networks compute what the
published ones do is for the tests, which hold them against slow loops.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dlm.decode import decode
from dlm.models import DecodingSpec, load_model
from dlm.models.loading import MODELS, LLaDAMoEModelLM
from textkv.command import run
from textkv.expression import parse_call

TOKENS = {"vocab_size": 64, "mask_token_id": 60, "eos_token_id": 61, "pad_token_id": 61}
QWEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
SMALL: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "max_sequence_length": 256},
    "Dream": QWEN,
    "llada2_moe": QWEN | EXPERTS | {"head_dim": 16, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2},
    "sdar": QWEN | {"head_dim": 16},
    "sdar_moe": QWEN | EXPERTS | {"head_dim": 16, "moe_intermediate_size": 16},
    "Fast_dLLM_Qwen": QWEN,
    "llada (MoE)": QWEN | EXPERTS | {"expert_intermediate_size": 16, "rope_theta": 5e4},
}


def sampled(
    forward: Callable[[list[int]], torch.Tensor], spec: DecodingSpec, prompt: list[int], length: int, unmask: str
) -> tuple[list[int], int]:
    """The model's sampler, as plain as it can be: one row, one list, everything computed anew; no end of text.

    It shares nothing with `decode`: no canvas, no cache, no rule, no schedule.

    Args:
        forward: ids -> logits [tokens, V].
        unmask: "confidence", "entropy" (one token a forward) or "threshold(tau)".

    Returns:
        The `length` tokens behind `prompt`, and forwards.
    """
    rule, arguments, _ = parse_call(unmask)
    tau = arguments[0] if rule == "threshold" else float("inf")
    # Blocks are counted from 0 in a block-causal model, whose last block is whole, else from the end of the prompt.
    begin, end, size = len(prompt), len(prompt) + length, min(32, length)
    if spec.block is not None:
        begin, end, size = 0, -(-end // spec.block) * spec.block, spec.sub_block or spec.block
    ids, forwards = prompt + [spec.mask_id] * (end - len(prompt)), 0
    for low in range(begin, end, size):
        while masks := [p for p in range(low, min(low + size, end)) if ids[p] == spec.mask_id]:
            seen = end if spec.block is None else (low // spec.block + 1) * spec.block
            logits, forwards = forward(ids[:seen]), forwards + 1
            logits[:, spec.mask_id] = -torch.inf
            if spec.block is not None and spec.shift and masks[0] == low and low % spec.block == 0:
                masks = masks[:1]  # a block begins with the token that the block before gives it
            chance = {p: logits[p - spec.shift].float().softmax(0) for p in masks}
            sure = (lambda c: -torch.special.entr(c).sum()) if rule == "entropy" else torch.max
            score = {p: float(sure(c)) for p, c in chance.items()}
            surest = max(masks, key=lambda p: (score[p], -p))
            for p in masks:
                if p == surest or score[p] >= tau:
                    ids[p] = int(chance[p].argmax())
    return ids[len(prompt) : len(prompt) + length], forwards


@torch.no_grad()
def check(name: str) -> dict[str, Any]:
    """One row of the table."""
    kind = LLaDAMoEModelLM if name == "llada (MoE)" else MODELS[name]
    torch.manual_seed(0)
    config = kind.config_class(**SMALL[name], **TOKENS, architectures=[kind.__name__])
    made = kind(config).eval()
    ids = torch.randint(0, 60, (1, 9))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(Path(folder))
        model, _ = load_model(folder)
    default, plain = (decode(model, ids, gen_length=16, cache=cache, eos="none") for cache in (None, "none"))
    spec, prompt = model.decoding_spec, ids[0].tolist()
    own = sampled(lambda x: model(torch.tensor([x])).logits[0], spec, prompt, 16, spec.unmask)
    return {
        "model": name,
        "block": model.decoding_spec.block or "all",
        "rule": model.decoding_spec.unmask,
        # Not bit for bit: what was read lies at other addresses, where a product may be summed in another order.
        "logits": torch.allclose(model(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-5),
        "generate": (plain.ids[0].tolist(), plain.stats.forwards) == own,
        "cached = uncached": torch.equal(default.ids, plain.ids),
        "forwards": default.stats.forwards,
        "query tokens": default.stats.query_tokens,
        "without cache": plain.stats.query_tokens,
    }


def parser() -> argparse.ArgumentParser:
    """The command line: there is nothing to say."""
    return argparse.ArgumentParser(prog="python -m dlm.check_models", description=__doc__.split("\n\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a model does not load or decode as its sampler, or an exact cache differs from none."""
    return run("dlm.check_models", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Check and print."""
    rows = [check(name) for name in SMALL]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("yes" if x is True else "no" if x is False else str(x) for x in row.values()))
    Console().print(table)
    exact = all(row["cached = uncached"] or row["block"] == "all" for row in rows)
    good = exact and all(row["logits"] and row["generate"] for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
