"""`python -m eval.speed decode`: what a method costs per chunk of a prompt and per decoded token, beside DynamicCache.

A few layers of SmolLM2-135M's shape with random weights. `calls` = operations of torch per decoded token and layer, by
the profiler; `transfers` = questions of the host to a tensor among them (`.item()`, `bool(tensor)`), which would wait
for a device; `calls_dynamic` = the calls of transformers' `DynamicCache`. `prefill_ratio` and `decode_ratio` are
seconds over those of `DynamicCache`, medians of rounds in which both take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from textkv import MethodCache, release, use
from textkv.command import count, lengths, run, write_rows
from textkv.devices import check_room
from textkv.provenance import run_meta

from .arguments import add_methods, add_outputs, checked_budget

METHODS = "full,snapkv,adakv,window,streaming_llm,h2o,tova,cake,d2o,kivi(4),gear(4),turboquant(4)"
CHUNK = 2048
LAYER = 2 * 576 * (576 + 192) + 3 * 576 * 1536  # weights of one of `shaped`
_ASKS = ("aten::_local_scalar_dense",)


def shaped(layers: int, device: str) -> PreTrainedModel:
    """SmolLM2-135M's layers with random weights: hidden 576, 9 heads over 3 KV heads of 64, MLP 1536."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(device)
    return model.bfloat16() if device.startswith("cuda") else model


def read(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> float:
    """Reads a prompt in chunks; seconds."""
    if isinstance(cache, MethodCache):
        cache.begin(ids)
    start = _clock(ids)
    for chunk in ids.split(CHUNK, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return _clock(ids) - start


def decode(model: PreTrainedModel, cache: Cache, token: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each decoded token."""
    took = []
    for _ in range(steps):
        start = _clock(token)
        model(token, past_key_values=cache)
        took.append(_clock(token) - start)
    return took


def calls(model: PreTrainedModel, cache: Cache, token: torch.Tensor) -> tuple[float, float]:
    """Operations, and questions of the host, per decoded token and layer; the first token warms up."""
    for _ in range(2):
        model(token, past_key_values=cache)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(token, past_key_values=cache)
    names = [event.name for event in seen.events() if event.name.startswith("aten::")]
    layers = model.config.num_hidden_layers
    return len(names) / layers, sum(name in _ASKS for name in names) / layers


@torch.inference_mode()
def measure(
    model: PreTrainedModel, methods: Sequence[str], budget: str, length: int, rounds: int, steps: int
) -> Iterator[dict[str, Any]]:
    """A row per method."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    token = ids[:, :1]
    release(model)
    read(model, DynamicCache(config=model.config), ids[:, : 2 * CHUNK])
    for method in methods:
        make: Callable[[], Cache] = lambda method=method: MethodCache(model, method, budget)  # noqa: E731
        prefill: list[float] = []
        ratios: list[float] = []
        seconds: list[float] = []
        for _ in range(rounds):
            release(model)
            plain = DynamicCache(config=model.config)
            before = read(model, plain, ids)
            cache = make()
            own = read(model, cache, ids)
            prefill.append(own / before)
            # Both decode in turns: what else the machine does falls on both.
            theirs, ours = [], []
            for _ in range(steps):
                release(model)
                theirs += decode(model, plain, token, 1)
                use(model)
                ours += decode(model, cache, token, 1)
            ratios.append(median(ours) / median(theirs))
            seconds.append(median(ours))
        count, asks = calls(model, cache, token)
        release(model)
        plain_count, _ = calls(model, plain, token)
        yield {
            "method": method, "budget": budget, "tokens_seen": length, "device": str(device), "n": rounds,
            "layers": model.config.num_hidden_layers, "calls": count, "transfers": asks, "calls_dynamic": plain_count,
            "calls_ratio": count / plain_count, "prefill_ratio": median(prefill), "decode_ratio": median(ratios),
            "seconds_decode": median(seconds), "kv_bytes": cache.kv_bytes(),
        }  # fmt: skip


def _clock(like: torch.Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per method and context length."""
    made = Table("method", "tokens", "calls", "of DynamicCache", "transfers", "prompt, x", "decode, x", "decode ms")
    for row in rows:
        made.add_row(
            row["method"], f"{row['tokens_seen']:,}", f"{row['calls']:.0f}", f"{row['calls_ratio']:.2f}",
            f"{row['transfers']:.1f}", f"{row['prefill_ratio']:.2f}", f"{row['decode_ratio']:.2f}",
            f"{1000 * row['seconds_decode']:.2f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.speed decode", description=__doc__.split("\n\n")[0])
    add_methods(p, METHODS, "0.5")
    p.add_argument("--lengths", type=lengths, default="1024,8192,32768", help="tokens of the prompts")
    p.add_argument("--layers", type=count, default=4)
    p.add_argument("--rounds", type=count, default=3)
    p.add_argument("--steps", type=count, default=16, help="decoded tokens per round")
    add_outputs(p, when=", after every method")
    return p


def main(argv: Sequence[str]) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.speed decode", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    rows, budget = [], checked_budget(args.methods, args.budget)
    most = max(args.lengths)
    asked = f"--layers {args.layers} --lengths {most}"
    check_room(args.device, 4 * args.layers * (LAYER + 2 * 3 * 64 * most), asked)
    meta = run_meta("eval.speed", ["decode", *argv], 0)
    model = shaped(args.layers, args.device)
    for length in args.lengths:
        for row in measure(model, args.methods, budget, length, args.rounds, args.steps):
            rows.append(row)
            Console(stderr=True).print(f"{row['method']} at {length:,}: decode x {row['decode_ratio']:.2f}")
            write_rows(args.json, meta, rows)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
