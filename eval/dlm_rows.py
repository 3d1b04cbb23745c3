"""`python -m eval.speed rows`: a batch of rows of very different lengths beside the same rows one by one.

Rows are prompts of 8 to `--length` tokens with 4 to `--gen-length` masks behind them, both spread evenly in their
logarithms and paired at random: `--n 16` rows of which the longest has some twenty times the shortest's. A row that is
finished leaves, padding is never computed, and rows go on at their own pace; so the batch should compute what the rows
compute alone. `excess` = query tokens of the batch over the sum of the rows alone, `seconds_ratio` = seconds of the
rows one by one over those of the batch, medians of rounds in turns (on a CPU those of the processor), `equal` = rows
whose tokens are those that they get alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from dlm.cache import list_caches, resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import decode_prompts
from dlm.mini import load_mini
from dlm.stats import Decoded
from textkv.command import checked, count, names, run, seed, token_count, write_rows
from textkv.provenance import run_meta

from .arguments import add_outputs
from .decoding import split_entry

LEAST = 8, 4  # tokens of the shortest prompt, and its masks
WORDS = 5, 90  # ids that no model of ours gives a meaning of its own


def entries(text: str) -> list[str]:
    """Comma-separated caches, each with a rule or without; "all" = every cache with two rules."""
    if text == "all":
        return [f"{cache}+{rule}" for cache in list_caches(block_causal=False) for rule in ("confidence", "klass")]
    for entry in (found := names(text)):
        cache, rule = split_entry(entry)
        resolve_cache(cache)
        DecodingConfig(unmask=rule)
    return found


def spread(least: int, most: int, n: int) -> list[int]:
    """n whole numbers from `least` to `most`, evenly in their logarithms."""
    return [round(least * (most / least) ** (i / max(1, n - 1))) for i in range(n)]


def prompts(n: int, length: int, generated: int, mask: int, number: int) -> list[list[int]]:
    """n rows, a prompt and the masks behind it."""
    chance = random.Random(number)
    masks = spread(LEAST[1], generated, n)
    chance.shuffle(masks)
    return [
        [chance.randrange(*WORDS) for _ in range(tokens)] + [mask] * gap
        for tokens, gap in zip(spread(LEAST[0], length, n), masks, strict=True)
    ]


class Bench:
    """The rows together and one by one under one configuration."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[list[int]], entry: str) -> None:
        cache, rule = split_entry(entry)
        self.model, self.rows, self.entry = model, rows, entry
        self.config = DecodingConfig(gen_length=0, infill=True, cache=cache, unmask=rule, eos="none")
        self.together: list[float] = []
        self.alone: list[float] = []

    def _decode(self, rows: Sequence[list[int]]) -> tuple[Decoded, float]:
        clock = time.perf_counter if self.model.device.type == "cuda" else time.process_time
        start = clock()
        done = decode_prompts(self.model, rows, self.config)
        return done, clock() - start

    def round(self) -> dict[str, Any]:
        """Both once: what they computed and whether they agree."""
        batch, seconds = self._decode(self.rows)
        ones, times = zip(*(self._decode([row]) for row in self.rows), strict=True)
        self.together.append(seconds)
        self.alone.append(sum(times))
        needed = sum(one.stats.query_tokens for one in ones)
        same = [
            torch.equal(mine[-len(row) :], one.ids[0, -len(row) :])
            for mine, one, row in zip(batch.ids, ones, self.rows, strict=True)
        ]
        return {
            "forwards": batch.stats.forwards, "forwards_alone": sum(one.stats.forwards for one in ones),
            "query_tokens": batch.stats.query_tokens, "needed_tokens": needed,
            "excess": batch.stats.query_tokens / needed, "equal": sum(same) / len(same),
        }  # fmt: skip


@torch.inference_mode()
def measure(
    model: PreTrainedModel, arms: Sequence[str], rows: Sequence[list[int]], rounds: int
) -> Iterator[dict[str, Any]]:
    """A row of figures for each of `arms`."""
    for entry in arms:
        bench = Bench(model, rows, entry)
        bench._decode(rows[:1])  # what is set up at the first call is nobody's time
        for _ in range(rounds):
            figures = bench.round()
        ratio = median(one / whole for one, whole in zip(bench.alone, bench.together, strict=True))
        about = {"method": entry, "device": str(model.device), "n": len(rows), "rounds": rounds}
        about |= {"shortest": min(map(len, rows)), "longest": max(map(len, rows))}
        yield about | figures | {
            "seconds": median(bench.together), "seconds_alone": median(bench.alone), "seconds_ratio": ratio
        }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> Table:
    """One line per cache and rule."""
    made = Table(
        "cache + rule", "forwards", "alone", "query tokens", "needed", "excess", "equal", "seconds", "alone", "x"
    )
    for row in found:
        made.add_row(
            row["method"], str(row["forwards"]), str(row["forwards_alone"]), f"{row['query_tokens']:,}",
            f"{row['needed_tokens']:,}", f"{row['excess']:.3f}", f"{row['equal']:.0%}", f"{row['seconds']:.2f}",
            f"{row['seconds_alone']:.2f}", f"{row['seconds_ratio']:.2f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.speed rows", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--grid", type=checked(entries), default="all", help="cache+rule, ... (default: all caches, 2 rules)"
    )
    p.add_argument("--n", type=count, default=16, help="rows of the batch (16)")
    p.add_argument("--length", type=token_count, default=192, help="tokens of the longest prompt (192)")
    p.add_argument("--gen-length", type=token_count, default=64, help="the most masks of a row (64)")
    p.add_argument("--rounds", type=count, default=1)
    p.add_argument("--seed", type=seed, default=0, help="of the prompts (0)")
    add_outputs(p, when=", after every cache and rule")
    return p


def main(argv: Sequence[str]) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.speed rows", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    for name, least in zip(("length", "gen_length"), LEAST, strict=True):
        if (value := getattr(args, name)) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is below the shortest row's {least}; use {least} or more"
            )
    model = load_mini("llada", torch.bfloat16 if args.device.startswith("cuda") else torch.float32, args.device)[0]
    rows = prompts(args.n, args.length, args.gen_length, model.decoding_spec.mask_id, args.seed)
    meta, found = run_meta("eval.speed", ["rows", *argv], args.seed), []
    for figures in measure(model, args.grid, rows, args.rounds):
        found.append(figures)
        write_rows(args.json, meta, found)
    Console(width=None if sys.stdout.isatty() else 140).print(table(found))
