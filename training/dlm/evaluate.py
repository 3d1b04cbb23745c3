"""Measure exact answers: `python -m training.dlm.evaluate --model llada --n 200`.

Held-out problems (seeds from 1,000,000 on); an answer counts when the number behind `####` is right. The diffusion
models write one token per step with no cache by their own rule, the guider is decoded greedily. Prints a table by
number of steps; `--json FILE` writes the rows with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.decode import decode
from dlm.mini import KINDS, load_mini
from dlm.mini.problems import FIRST_EVALUATION_SEED, SHARES, Problem, final_answer, make_problem
from textkv.arguments import device
from textkv.command import question_count, results_file, run, some_text, token_count, write_rows
from textkv.intervals import wilson
from textkv.provenance import run_meta
from training.command import add_threads, set_threads

BATCH_TOKENS = 16_384


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], gen_length: int
) -> list[str]:
    """The model's answer to each problem, up to its first end token: one token per step, no cache."""
    prompts = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt").to(model.device)
    ids, visible = prompts["input_ids"], prompts["attention_mask"]
    if hasattr(model, "decoding_spec"):
        block = min(32, gen_length)
        out = decode(model, ids, visible, gen_length=gen_length, block_length=block, cache="none").ids
    else:
        settings = {"max_new_tokens": gen_length, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        out = model.generate(ids, attention_mask=visible, **settings)[:, ids.shape[1] :]
    # From the first end on: what a model writes behind it is no part of its answer.
    ended = (out == tokenizer.eos_token_id).cummax(1).values
    return tokenizer.batch_decode(out.masked_fill(ended, tokenizer.pad_token_id), skip_special_tokens=True)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, gen_length: int, task: str = "arithmetic"
) -> list[dict[str, Any]]:
    """One row over all `n` problems of `task` and one for each number of steps; `working` = share with every step
    right."""
    # 32 tokens stand for the prompt; a batch is as large as its canvases have tokens.
    begin, size = time.perf_counter(), max(1, BATCH_TOKENS // (gen_length + 32))
    problems = [make_problem(FIRST_EVALUATION_SEED + number, task=task) for number in range(n)]
    texts = [
        text for at in range(0, n, size) for text in answers(model, tokenizer, problems[at : at + size], gen_length)
    ]
    seconds = time.perf_counter() - begin
    found = [
        (len(p.changes), final_answer(text) == p.total, text == p.answer)
        for p, text in zip(problems, texts, strict=True)
    ]
    common = {"model": model.config.model_type.lower(), "gen_length": gen_length}
    rows = []
    for name, steps in [("all", SHARES[task]), *((f"{k} steps", [k]) for k in SHARES[task])]:
        mine = [(right, working) for k, right, working in found if k in steps]
        right, shown = sum(right for right, _ in mine), sum(working for _, working in mine)
        low, high = wilson(right, len(mine))
        share = max(len(mine), 1)
        figures = {"n": len(mine), "accuracy": right / share, "low": low, "high": high, "working": shown / share}
        # Time is shared out by number of problems: they were answered in mixed batches.
        rows.append(common | {"task": name} | figures | {"seconds": seconds * len(mine) / max(n, 1)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per row."""
    made = Table("problems", "n", "exact answers", "95 %", "exact working")
    for row in rows:
        interval = f"{row['low']:.3f}-{row['high']:.3f}"
        made.add_row(row["task"], str(row["n"]), f"{row['accuracy']:.3f}", interval, f"{row['working']:.3f}")
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.dlm.evaluate", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="llada", help=f"{', '.join(KINDS)}, or a folder of the training")
    p.add_argument("--task", choices=tuple(SHARES), default="arithmetic", help="1 to 3 steps, or hard: 4 to 6")
    p.add_argument("--n", type=question_count, default=200, help="problems")
    p.add_argument("--gen-length", type=token_count, default=64, help="tokens of the canvas behind the prompt")
    p.add_argument("--device", type=device, default="", help="cpu, cuda ... (default: a GPU where there is one)")
    add_threads(p)
    p.add_argument("--json", type=results_file("training.dlm.evaluate"), help="write the rows here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.dlm.evaluate", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure, print."""
    set_threads(args)
    model, tokenizer = load_mini(args.model, device=args.device)
    rows = measure(model, tokenizer, args.n, args.gen_length, args.task)
    Console().print(table(rows))
    write_rows(args.json, run_meta("training.dlm.evaluate", argv, FIRST_EVALUATION_SEED), rows)


if __name__ == "__main__":
    sys.exit(main())
