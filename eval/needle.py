"""`python -m eval.needle`: at which depth of a prompt of which length is a fact lost?

One cell per length and depth: the share of held-out facts that greedy decoding gives back, after the method has
compressed the prompt. Prints a table per method, writes the rows (`--json`) and a heat map per method (`--plot`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table

from textkv.command import checked, count, lengths, question_count, run, some_text, write_rows
from textkv.intervals import wilson
from textkv.mini.facts import TASKS, check_task
from textkv.mini.tasks import FIRST_EVALUATION_SEED
from textkv.provenance import run_meta

from .arguments import add_methods, add_outputs, checked_budget
from .curve import save
from .textbench import FULL, MODEL_HELP, examples, load_text_model, recall, share


def measure(
    model: str, methods: Sequence[str], budget: str, task: str, lengths: Sequence[int], depths: int, n: int, device: str
) -> list[dict[str, Any]]:
    """One row per method, length and depth (`depths` of them from 0 to 1, at least 2)."""
    loaded, tokenizer = load_text_model(model, device)
    places = [index / (depths - 1) for index in range(depths)]
    rows = []
    grid = [(length, depth) for length in lengths for depth in places]
    for length, depth in track(grid, "cells", console=Console(stderr=True)):
        asked = examples(tokenizer, task, length, n, depth)
        for method in methods:
            right, figures = recall(loaded, method, "1.0" if method == FULL else budget, asked)
            low, high = wilson(sum(right), n)
            row = {"method": method, "budget": budget, "task": task, "tokens_seen": length, "depth": depth, "n": n}
            rows.append(share(row | {"recall": sum(right) / n, "low": low, "high": high} | figures))
    return rows


def table(rows: Sequence[dict[str, Any]], method: str) -> Table:
    """Depths down, lengths across."""
    mine = {(row["depth"], row["tokens_seen"]): row["recall"] for row in rows if row["method"] == method}
    lengths = sorted({length for _, length in mine})
    made = Table("depth", *(f"{length:,} tokens" for length in lengths), title=method)
    for depth in sorted({depth for depth, _ in mine}):
        made.add_row(f"{depth:.2f}", *(f"{mine[depth, length]:.2f}" for length in lengths))
    return made


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One heat map per method, side by side: x = length, y = depth, red 0 to green 1."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["tokens_seen"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(methods), figsize=(1.6 + 2.6 * len(methods), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, method in zip(panels[0], methods, strict=True):
        at = {(row["depth"], row["tokens_seen"]): row["recall"] for row in rows if row["method"] == method}
        grid = [[at[depth, length] for length in lengths] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        panel.set(title=method, xlabel="tokens")
    panels[0, 0].set_ylabel("depth (0 = first)")
    figure.colorbar(image, ax=panels[0, -1], label="recall")
    save(figure, path, "eval.needle")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.needle", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP)
    add_methods(p, "full,snapkv,streaming_llm", "0.2")
    p.add_argument("--task", type=checked(check_task), default="needle", help=f"one of {', '.join(TASKS)}")
    p.add_argument("--lengths", type=lengths, default="256,512,1024,2048", help="tokens of a prompt with its answer")
    p.add_argument("--depths", type=count, default=5, help="places of the fact, from first to last (default 5)")
    p.add_argument("--n", type=question_count, default=16, help="facts per cell (default 16)")
    add_outputs(p, "plot")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.needle", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    if args.depths < 2:
        raise ValueError(f"depths={args.depths}: use at least 2")
    budget = checked_budget(args.methods, args.budget)
    rows = measure(args.model, args.methods, budget, args.task, args.lengths, args.depths, args.n, args.device)
    for method in args.methods:
        Console().print(table(rows, method))
    write_rows(args.json, run_meta("eval.needle", argv, FIRST_EVALUATION_SEED), rows)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
