"""Measure recall by greedy decoding: `python -m training.text.evaluate --lengths 256,1024 --n 100`.

`model.generate` with the full cache on held-out examples (seeds from 1,000,000 on), per task and length. An answer
counts when every token of it is right. Prints a table, and how much attention rests on the first token in held-out
plain sentences; `--json FILE` writes both, the rows with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.arguments import device
from textkv.command import checked, lengths, question_count, results_file, run, some_text, write_rows
from textkv.intervals import wilson
from textkv.mini import load_mini
from textkv.mini.facts import TASKS, check_task
from textkv.mini.filler import Filler
from textkv.mini.speller import Speller
from textkv.mini.tasks import EVALUATION_FILLER, FIRST_EVALUATION_SEED, Example, make_example
from textkv.provenance import run_meta
from training.command import add_threads, set_threads
from training.text.sinks import sink_mass

BATCH_TOKENS = 16_384
PLAIN_ROWS, PLAIN_LENGTH = 4, 512  # in which attention on the first token is looked at


@torch.inference_mode()
def answers(model: PreTrainedModel, examples: Sequence[Example]) -> list[bool]:
    """Whether greedy decoding gives each example's whole answer. Prompts and answers must be of one length each."""
    prompts = torch.from_numpy(np.stack([e.prompt_ids for e in examples])).to(model.device)
    wanted = np.stack([e.answer_ids for e in examples])
    settings = {"max_new_tokens": wanted.shape[1], "min_new_tokens": wanted.shape[1], "do_sample": False}
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    return (out[:, prompts.shape[1] :].cpu().numpy() == wanted).all(1).tolist()


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], lengths: Sequence[int], n: int
) -> list[dict[str, Any]]:
    """One row per task and length, `n` examples each."""
    rows = []
    for task in tasks:
        for length in lengths:
            begin, size, right = time.perf_counter(), max(1, BATCH_TOKENS // length), 0
            examples = [make_example(task, length, FIRST_EVALUATION_SEED + k, tokenizer) for k in range(n)]
            for first in range(0, n, size):
                right += sum(answers(model, examples[first : first + size]))
            low, high = wilson(right, n)
            row = {"method": "full", "budget": 1.0, "task": task, "tokens_seen": length, "n": n}
            rows.append(row | {"recall": right / n, "low": low, "high": high, "seconds": time.perf_counter() - begin})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tasks down, lengths across."""
    lengths = sorted({row["tokens_seen"] for row in rows})
    made = Table("task", *(f"{length:,} tokens" for length in lengths))
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {row["tokens_seen"]: row for row in rows if row["task"] == task}
        cells = (f"{mine[k]['recall']:.2f} ({mine[k]['low']:.2f}-{mine[k]['high']:.2f})" for k in lengths)
        made.add_row(task, *cells)
    return made


def resting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Mean attention on the first token in held-out plain sentences: fp32 [layers, heads], on the CPU."""
    speller, rng = Speller(tokenizer), np.random.default_rng(FIRST_EVALUATION_SEED)
    filler, room = Filler.grammar(speller, EVALUATION_FILLER), PLAIN_LENGTH - len(speller.start)
    rows = np.stack([np.concatenate([speller.start, filler.draw(rng, room)[0]]) for _ in range(PLAIN_ROWS)])
    return sink_mass(model, torch.from_numpy(rows.astype(np.int64)).to(model.device)).cpu()


def sink_table(mass: torch.Tensor) -> Table:
    """Layers down, heads across."""
    heads = (f"head {number}" for number in range(mass.shape[1]))
    made = Table("layer", *heads, title="attention on the first token")
    for number, row in enumerate(mass.tolist()):
        made.add_row(str(number), *(f"{share:.3f}" for share in row))
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.text.evaluate", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help='"mini" or a folder that the training wrote')
    p.add_argument("--lengths", type=lengths, default="256,512,1024,2048", help="prompt and answer, in tokens")
    p.add_argument("--n", type=question_count, default=100, help="examples per task and length")
    told = f"only this task; may be repeated ({', '.join(TASKS)})"
    p.add_argument("--task", type=checked(check_task), action="append", help=told)
    p.add_argument("--device", type=device, default="", help="cpu, cuda ... (default: a GPU where there is one)")
    add_threads(p)
    p.add_argument("--json", type=results_file("training.text.evaluate"), help="write the rows here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.text.evaluate", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure, print."""
    set_threads(args)
    model, tokenizer = load_mini(None if args.model == "mini" else args.model, device=args.device)
    rows = measure(model, tokenizer, args.task or TASKS, args.lengths, args.n)
    mass = resting(model, tokenizer)
    Console().print(table(rows), sink_table(mass))
    meta = run_meta("training.text.evaluate", argv, FIRST_EVALUATION_SEED)
    write_rows(args.json, meta, rows, on_first_token=mass.tolist())


if __name__ == "__main__":
    sys.exit(main())
