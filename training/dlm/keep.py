"""Put a trained model in place: `python -m training.dlm.keep runs/mini_llada/latest --n 500`.

Measures the export on held-out problems and moves it to the package's `weights` folder, file by file and atomically,
if it answers more of them than what lies there. The figures go beside it, into evaluation.json and README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlm.mini import WEIGHTS, family_of, load_mini, task_of
from dlm.mini.problems import FIRST_EVALUATION_SEED
from textkv.command import checked, question_count, run, some_text, token_count
from training.command import add_threads, set_threads
from training.dlm.evaluate import measure
from training.export import read_trained, trained_folder
from training.keep import Rows, consider, recorded

TITLES = {"llada": "LLaDA", "dream": "Dream", "guider": "guider (Qwen2)", "llada-hard": "LLaDA for longer problems"}


def readme(rows: Rows, trained: dict[str, Any], hardware: str) -> str:
    """The README of the weights: what they are, their seed and data, and what was measured."""
    kind, n, length = trained["model"], rows[0]["n"], rows[0]["gen_length"]
    how = "greedy" if family_of(kind) == "guider" else "one token per step, no cache, the model's own rule"
    told = "from scratch" if family_of(kind) == kind else f"from the weights of `{family_of(kind)}` on"
    task = f" --task {task_of(kind)}" if task_of(kind) != "arithmetic" else ""
    lines = [
        f"# The embedded mini {TITLES[kind]}",
        "",
        f"Trained {told} by `python -m training.dlm.train --model {kind} --seed {trained['seed']}` on drawn",
        f"problems (`dlm/mini/problems.py`): {trained['step']} optimizer steps, {trained['seconds'] / 60:.0f} minutes",
        f"({hardware}). Weights in fp16.",
        "",
        f"Held-out problems, seeds from {FIRST_EVALUATION_SEED:,} on, {how}",
        f"(`python -m training.dlm.evaluate --model {kind}{task} --n {n} --gen-length {length}`):",
        "",
        "| problems | n | exact answers | 95 % | exact working |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        share, interval = f"{row['accuracy']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}"
        lines.append(f"| {row['task']} | {row['n']} | {share} | {interval} | {row['working']:.3f} |")
    return "\n".join([*lines, ""])


def solved(n: int, gen_length: int, task: str) -> Callable[[Path], tuple[float, Rows]]:
    """Share of exact answers of a model folder to `n` problems of `task`, and the rows."""

    def score(folder: Path) -> tuple[float, Rows]:
        rows = measure(*load_mini(folder), n, gen_length, task)
        return rows[0]["accuracy"], rows

    return score


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.dlm.keep", description=__doc__.split("\n\n")[0])
    p.add_argument("latest", type=checked(trained_folder), help="the export of a training: RUNS/latest")
    p.add_argument("--n", type=question_count, default=500, help="problems")
    p.add_argument("--gen-length", type=token_count, default=64, help="tokens of the canvas behind the prompt")
    p.add_argument("--hardware", type=some_text, default="two CPU cores", help="where it was trained, for the README")
    add_threads(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.dlm.keep", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure, install."""
    set_threads(args)
    kind = read_trained(args.latest)["model"]
    before = recorded(WEIGHTS / kind)
    told = partial(readme, hardware=args.hardware)
    exact = consider(args.latest, WEIGHTS / kind, solved(args.n, args.gen_length, task_of(kind)), told)
    print(f"{kind}: {exact:.3f} exact, in place {'nothing' if before < 0 else f'{before:.3f}'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
