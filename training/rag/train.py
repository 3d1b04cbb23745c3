"""Train a model to answer from passages, by rewards and, with the same compute, by plain supervised tuning.

    python -m training.rag.train --seeds 0,1,2 --seconds 50 --group 8 --json docs/porag.json --plot docs/porag.png

Every seed is measured before, after GRPO on the rewards (`porag`), and after supervised tuning of as many seconds of
CPU time (`supervised`), on the same held-out tasks. The same command goes on from the last checkpoint in `--runs`, and
measures no training twice. `mini` answers questions about its own kind of facts in a wording that it never saw; any
other model, questions about an invented world.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from textkv.command import (
    choices,
    count,
    naturals,
    output_folder,
    positive,
    question_count,
    results_file,
    run,
    seconds,
    some_text,
    token_count,
    write_rows,
    write_text,
)
from textkv.models.loading import MINI, load
from textkv.provenance import run_meta
from textkv.rag.embedders import load_embedder
from textkv.rag.rewards import Reward
from textkv.records import listed, read_fields
from training.rag.curve import draw
from training.rag.data import HELD_OUT, KINDS, tasks
from training.rag.measure import measure
from training.rag.tune import CPU_SECONDS, METHODS, Job, Tuning

MODULE = "training.rag.train"
BEFORE = "before"
METRIC, HEADS = "metric", "heads"
_TASKS = 4096  # to learn from; more than a training of minutes reads
_RESAMPLES = 10_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default=MINI, help="mini, smollm2, a folder, or a hub id")
    p.add_argument("--tasks", choices=KINDS, help="default: recall for mini, invented for others")
    p.add_argument("--methods", type=choices(*METHODS), default=",".join(METHODS), help="comma-separated")
    p.add_argument("--seeds", type=naturals, default="0,1,2")
    p.add_argument("--seconds", type=seconds, default="240", help="of CPU time, of each training")
    p.add_argument("--runs", type=output_folder(_is_runs, MODULE), default="runs/porag", help="folder of checkpoints")
    p.add_argument("--n", type=question_count, default=200, help="held-out tasks")
    p.add_argument("--passages", type=count, default=3, help="in a prompt")
    p.add_argument("--embedder", type=some_text, help="adds the cosine to the quality of an answer, e.g. minilm")
    told = "what answers are judged by: measured figures, or what heads predict of them that learn beside the model"
    p.add_argument("--reward", choices=(METRIC, HEADS), default=METRIC, help=told)
    p.add_argument("--rate", type=positive, default=Tuning.rate, help="learning rate")
    p.add_argument("--rank", type=count, default=Tuning.rank, help="of the adapters")
    p.add_argument("--prompts", type=count, default=Tuning.prompts, help="of a step")
    p.add_argument("--group", type=count, default=Tuning.group, help="answers to each of them")
    p.add_argument("--most", type=token_count, default=Tuning.most, help="tokens of an answer")
    p.add_argument("--temperature", type=positive, default=Tuning.temperature, help="answers are drawn at")
    p.add_argument("--json", type=results_file(MODULE), help="write the rows here, after every training")
    p.add_argument("--plot", type=results_file(MODULE), help="write the curve here, as PNG")
    return p


def _is_runs(folder: Path) -> bool:
    """Whether a folder holds trainings of this command."""
    return any(folder.glob("seed-*"))


class Study:
    """All trainings of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.kind = args.tasks or ("recall" if args.model == MINI else "invented")
        self.reward = Reward(embeds=load_embedder(args.embedder) if args.embedder else None)
        self.tunings = {seed: self._tuning(seed) for seed in args.seeds}

    def _tuning(self, seed: int) -> Tuning:
        taken = ("seconds", "rate", "rank", "prompts", "group", "most", "temperature")
        return Tuning(**{name: getattr(self.args, name) for name in taken}, heads=self.args.reward == HEADS, seed=seed)

    def row(self, method: str, seed: int) -> dict[str, Any]:
        """The figures of one training, made now or read where it was made."""
        folder = self.args.runs / f"seed-{seed}" / method
        same = {"settings": vars(self.tunings[seed]), "n": self.args.n, "model": self.args.model, "tasks": self.kind}
        known = folder / "row.json"
        if known.is_file():
            found = read_fields(known, {"about": dict, "row": dict})
            if found["about"] != same:
                raise ValueError(f"{folder} was made with other settings; use another --runs folder")
            return found["row"]
        if method == BEFORE:
            made = self._measured(method, None)
        else:
            made = self._measured(method, seed)
        write_text(known, json.dumps({"about": same, "row": made | {"seed": seed}}) + "\n")
        return made | {"seed": seed}

    def _measured(self, method: str, seed: int | None) -> dict[str, Any]:
        model, tokenizer = load(self.args.model)
        steps, used = 0, 0.0
        if seed is not None:
            # No seed sees the tasks of another.
            given = tasks(self.kind, tokenizer, _TASKS, seed * 10_000, self.args.passages)
            folder = self.args.runs / f"seed-{seed}" / method
            model = Job(
                method=method, model=model, tokenizer=tokenizer, tasks=given, tuning=self.tunings[seed],
                reward=self.reward, folder=folder,
            ).run()  # fmt: skip
            history = _history(folder)
            steps, used = history[-1]["step"], history[-1][CPU_SECONDS]
        held = tasks(self.kind, tokenizer, self.args.n, HELD_OUT, self.args.passages)
        found = measure(model, tokenizer, held, self.reward, self.args.most + 2)
        row = {"method": method, "steps": steps, "seconds": used} | found.row()
        return row | {"rewards": found.rewards, "matches": found.matches, "answers": found.answers[:4]}

    def rows(self, told: Callable[[list[dict]], None]) -> list[dict[str, Any]]:
        """All rows; `told` hears of those there are after each."""
        made: list[dict[str, Any]] = []
        for seed in self.args.seeds:
            for method in (BEFORE, *self.args.methods):
                made.append(self.row(method, seed))
                told(made)
        return made

    def curves(self) -> dict[str, list[list[dict]]]:
        """What trl logged at each step, by method and seed."""
        return {
            method: [_history(self.args.runs / f"seed-{seed}" / method) for seed in self.args.seeds]
            for method in self.args.methods
        }


def _history(folder: Path) -> list[dict]:
    path = folder / "trainer_state.json"
    logged = read_fields(path, {"log_history": list})["log_history"]
    return [entry for entry in listed(logged, dict, f"log_history of {path}") if CPU_SECONDS in entry]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method over its seeds: means, and 95 % intervals over the held-out tasks, each task with the mean
    of its seeds (bootstrap)."""
    made = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(own), "n": own[0]["n"]}
        for name, values in (("reward", "rewards"), ("exact_match", "matches")):
            by_task = np.mean([run_[values] for run_ in own], axis=0)
            picked = np.random.default_rng(0).integers(len(by_task), size=(_RESAMPLES, len(by_task)))
            low, high = np.percentile(by_task[picked].mean(1), [2.5, 97.5])
            row |= {name: float(by_task.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
            row[f"{name}_of_seeds"] = [run_[name] for run_ in own]
        row |= {name: float(np.mean([run_[name] for run_ in own])) for name in ("fidelity", "steps", "seconds")}
        made.append(row)
    return made


def work(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, measure, write and print."""
    logging.set_verbosity_error()
    study, meta = Study(args), run_meta(MODULE, argv, args.seeds[0])
    rows = study.rows(lambda made: write_rows(args.json, meta, summary(made)))
    for row in summary(rows):
        print(
            f"{row['method']:10} reward {row['reward']:.3f} ({row['reward_low']:.3f}-{row['reward_high']:.3f}), exact "
            f"match {row['exact_match']:.3f} ({row['exact_match_low']:.3f}-{row['exact_match_high']:.3f}), "
            f"{row['seeds']} seeds, {row['steps']:.0f} steps, {row['seconds']:.0f} s"
        )
    if args.plot:
        draw(study.curves(), summary(rows), args.plot, MODULE)


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run(MODULE, parser(), work, argv, kept="the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
