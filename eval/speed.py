"""`python -m eval.speed`: what a method costs at the prompt's end and what it gives back at every decoded token.

A few layers of Llama-3.1-8B's shape with random weights read one prompt; methods take turns, and every figure is a
median over the rounds. `overhead` = time in the method's hooks over the time of the whole prompt; `decode_ratio` = one
token's attention over what the method kept against the full cache's, measured in the same round; `floor_bytes` = the
bytes of K and V that this attention cannot help reading. `--json` is written after every round. A CPU tells bytes and
tokens; its times are those of the reference kernels beside slow products of matrices, and are marked so.

`python -m eval.speed decode` compares whole decoded tokens with transformers' own cache: see `eval.decode_speed`, and
`python -m eval.speed dlm` what diffusion decoding costs outside the model: see `eval.dlm_speed`; `python -m eval.speed
rows` puts a batch of rows of very different lengths beside the rows alone: see `eval.dlm_rows`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from textkv import MethodCache, list_methods
from textkv.command import count, run, token_count, write_rows
from textkv.devices import check_room
from textkv.provenance import run_meta

from . import decode_speed, dlm_rows, dlm_speed
from .arguments import add_methods, add_outputs, checked_budget
from .textbench import FULL

WHOLE = "1.0"
LAYER = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336  # weights of one of `shaped`
STEPS = 8  # decoded tokens per round
TIMES = ("seconds_prefill", "overhead", "seconds_decode", "decode_ratio")  # what a CPU cannot say about a GPU


def shaped(layers: int, device: str) -> PreTrainedModel:
    """Random weights: hidden 4096, 32 heads over 8 KV heads of 128, MLP 14336; a small vocabulary."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=500000.0,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def clock(device: str) -> float:
    """Seconds, after all work on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def round_of(model: PreTrainedModel, method: str, budget: str, ids: torch.Tensor, device: str) -> dict[str, float]:
    """One prompt and `STEPS` tokens' attention: the figures of one round."""
    cache = MethodCache(model, method, budget)
    begin = clock(device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    prompt = clock(device) - begin
    hooks = sum(cache.seconds.values())
    config, rest = model.config, cache.at_rest
    shape = (1, config.num_attention_heads, 1, config.head_dim)
    q = torch.randn(shape, device=device, dtype=model.dtype)
    new = torch.randn((1, config.num_key_value_heads, *shape[2:]), device=device, dtype=model.dtype)
    begin = clock(device)
    for _ in range(STEPS):
        for layer in cache.layers:
            layer.feed(q, new, new, config.head_dim**-0.5)
    return {
        "seconds_prefill": prompt,
        "overhead": hooks / prompt,
        "seconds_decode": (clock(device) - begin) / STEPS / len(cache.layers),
        "kv_bytes": rest.kv_bytes,
        "kv_bytes_full": rest.full_bytes,
        "kv_bytes_peak": cache.peak_bytes,
        "tokens_stored": rest.tokens_stored,
    }


def can_run(method: str, budget: str, length: int, layers: int) -> bool:
    """Whether a method accepts this budget for this prompt and number of layers; said on stderr if not."""
    small = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=131072,
    )  # fmt: skip
    model = LlamaForCausalLM(small).eval()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, length, dtype=torch.int64), past_key_values=MethodCache(model, method, budget))
    except ValueError as error:
        print(f"left out: {method}: {error}", file=sys.stderr)
        return False
    return True


def measure(
    model: PreTrainedModel, methods: Sequence[str], budget: str, length: int, rounds: int, device: str
) -> Iterator[list[dict[str, Any]]]:
    """After every round, one row per method, the full cache first; "n" = rounds so far, which are interleaved.

    What comes before them warms the machine up: every method once on a GPU, where first calls compile kernels, and the
    full cache alone on a CPU.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    names = [FULL, *(method for method in methods if method != FULL)]
    budgets = {name: WHOLE if name == FULL else budget for name in names}
    for name in names if device.startswith("cuda") else [FULL]:
        round_of(model, name, budgets[name], ids, device)
    seen: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    turns = [(number, name) for number in range(rounds) for name in names]
    for number, name in track(turns, "prompts", console=Console(stderr=True)):
        for key, value in round_of(model, name, budgets[name], ids, device).items():
            seen[name][key].append(value)
        if name == names[-1]:
            about = {"device": device, "n": number + 1, "tokens_seen": length}
            yield [{"method": m, "budget": budgets[m]} | about | _row(model, seen[m], seen[FULL]) for m in names]


def _row(model: PreTrainedModel, mine: dict[str, list[float]], full: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of a method's rounds, and what follows from them."""
    row: dict[str, Any] = {key: median(values) for key, values in mine.items()}
    pairs = zip(mine["seconds_decode"], full["seconds_decode"], strict=True)
    row["decode_ratio"] = median(one / whole for one, whole in pairs)
    per_token = 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    row["floor_bytes"] = row["tokens_stored"] * per_token
    row["kv_share"] = row["kv_bytes"] / row["kv_bytes_full"]
    return row | {"layers": model.config.num_hidden_layers}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per method; columns that only a GPU's times would fill with meaning are marked."""
    cuda = rows[0]["device"].startswith("cuda")
    mark, caption = ("", None) if cuda else ("*", "* on this CPU, with the reference kernels; needs --device cuda")
    times = (f"{name}{mark}" for name in ("prompt s", "hooks / prompt", "decode ms", "of full"))
    made = Table("method", *times, "bytes of full", "floor KiB", caption=caption)
    for row in rows:
        made.add_row(
            row["method"], f"{row['seconds_prefill']:.3f}", f"{row['overhead']:.2%}",
            f"{1000 * row['seconds_decode']:.3f}", f"{row['decode_ratio']:.2f}", f"{row['kv_share']:.3f}",
            f"{row['floor_bytes'] / 1024:,.0f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.split("\n\n")[0])
    add_methods(p, "all", "0.2", all_known=True)
    p.add_argument("--length", type=token_count, help="tokens of the prompt (default 512 on a CPU, 16384 on a GPU)")
    p.add_argument("--layers", type=count, default=2, help="layers of the model (default 2: 1.8 GB in fp32)")
    p.add_argument("--rounds", type=count, default=3, help="rounds that count (default 3)")
    add_outputs(p, when=", after every round")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["decode"]:
        return decode_speed.main(argv[1:])
    if argv[:1] == ["dlm"]:
        return dlm_speed.main(argv[1:])
    if argv[:1] == ["rows"]:
        return dlm_rows.main(argv[1:])
    return run("eval.speed", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    cuda = args.device.startswith("cuda")
    if cuda:
        # Hooks are timed on the host: with this, a kernel is done when its call returns.
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    length = args.length or (16384 if cuda else 512)
    numbers = args.layers * (LAYER + 2 * 8 * 128 * length)  # weights, keys and values
    check_room(args.device, numbers * (2 if cuda else 4), f"--layers {args.layers} --length {length}")
    methods = [x for name in args.methods for x in (list_methods() if name == "all" else [name])]
    budget = checked_budget(methods, args.budget)
    methods = [method for method in methods if can_run(method, budget, length, args.layers)]
    meta = run_meta("eval.speed", argv, 0) | ({} if cuda else {"needs_gpu": TIMES})
    model = shaped(args.layers, args.device)
    for rows in measure(model, methods, budget, length, args.rounds, args.device):
        write_rows(args.json, meta, rows)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
