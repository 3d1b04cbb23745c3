"""Measure a model on real pages it never saw: `python -m training.agent.evaluate --episodes 20`.

Greedy decoding with the full cache on seeds from 1,000,000 on, per task, with the history's screenshots and without
them (`--blind`: earlier steps stay in the prompt as text). Prints a table; `--json FILE` writes the rows with 95 %
Wilson intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from agentkv import envs
from agentkv.envs.browser import Browser
from agentkv.errors import EXPLAINED
from agentkv.grammars import ParseError
from agentkv.models import ModelAdapter, load_adapter
from textkv.command import episodes, results_file, run, some_text, write_rows
from textkv.intervals import wilson
from textkv.provenance import run_meta
from training.agent.tasks import MEMORY, TASKS
from training.command import add_threads, set_threads

FIRST_SEED = 1_000_000
MAX_NEW_TOKENS = 32


@torch.inference_mode()
def answer(
    adapter: ModelAdapter, goal: str, past: list[tuple[Image.Image, str]], shot: Image.Image, frames: int
) -> Any:
    """(text, action or ParseError) for one screenshot; `frames` screenshots at most, the current one included."""
    first = len(past) - frames + 1
    history = [(image if number >= first else None, text) for number, (image, text) in enumerate(past)]
    prompt = adapter.prompt(goal, history, shot)
    out = adapter.model.generate(**prompt.inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text = adapter.words_of(out[0, prompt.inputs["input_ids"].shape[1] :].tolist())
    return text, adapter.parse(text, prompt.frames[-1])


def play(adapter: ModelAdapter, env: envs.WebEnv, seed: int, frames: int) -> tuple[bool, int]:
    """One episode: (solved, steps). An answer that is no action ends it."""
    observation, info = env.reset(seed=seed)
    past: list[tuple[Image.Image, str]] = []
    over = False
    while not over:
        shot = Image.fromarray(observation["screenshot"])
        text, action = answer(adapter, observation["goal"], past, shot, frames)
        past.append((shot, text))
        if isinstance(action, ParseError):
            return False, len(past)
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    return bool(info["success"]), len(past)


def measure(
    adapter: ModelAdapter,
    browser: Browser,
    tasks: Sequence[str],
    episodes: int,
    frames: int,
    first_seed: int = FIRST_SEED,
) -> list[dict[str, Any]]:
    """One row per task; `history` = screenshots per prompt."""
    rows = []
    for task in tasks:
        env, begin = envs.make(task, browser), time.perf_counter()
        played = [play(adapter, env, first_seed + number, frames) for number in range(episodes)]
        env.close()
        won = sum(solved for solved, _ in played)
        low, high = wilson(won, episodes)
        row = {"method": "full", "budget": 1.0, "task": task, "history": frames, "n": episodes}
        row |= {"success": won / episodes, "low": low, "high": high}
        row |= {"steps": sum(steps for _, steps in played) / episodes, "seconds": time.perf_counter() - begin}
        rows.append(row)
        print(f"{task} history {frames}: {won}/{episodes}", file=sys.stderr, flush=True)
    return rows


def mean(rows: Sequence[dict[str, Any]]) -> float:
    """Mean success over tasks."""
    return sum(row["success"] for row in rows) / max(len(rows), 1)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table, the memory pages last."""
    made = Table("task", "screenshots", "n", "success", "95 %", "steps")
    for row in sorted(rows, key=lambda row: (row["task"] in MEMORY, row["history"])):
        interval = f"{row['low']:.2f}-{row['high']:.2f}"
        made.add_row(
            row["task"], str(row["history"]), str(row["n"]), f"{row['success']:.2f}", interval, f"{row['steps']:.1f}"
        )
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.agent.evaluate", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help='"mini" or a model folder')
    p.add_argument("--episodes", type=episodes, default=20, help="per task")
    p.add_argument("--task", action="append", choices=TASKS, help="only this task; may be repeated")
    p.add_argument("--blind", action="store_true", help="also play the memory pages without earlier screenshots")
    p.add_argument("--json", type=results_file("training.agent.evaluate"), help="write the rows here")
    add_threads(p, default=1)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.agent.evaluate", parser(), work, argv, explained=EXPLAINED)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Play, print."""
    set_threads(args)
    adapter, tasks = load_adapter(args.model), args.task or list(TASKS)
    with Browser() as browser:
        rows = measure(adapter, browser, tasks, args.episodes, adapter.history_frames)
        if args.blind:
            rows += measure(adapter, browser, [task for task in tasks if task in MEMORY], args.episodes, 1)
    Console().print(table(rows))
    write_rows(args.json, run_meta("training.agent.evaluate", argv, FIRST_SEED), rows)


if __name__ == "__main__":
    sys.exit(main())
