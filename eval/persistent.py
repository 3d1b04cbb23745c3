"""`python -m eval.persistent`: a cache that lives from step to step beside one that is filled anew, over long episodes.

All play the same seeds in turn, in one process: `fresh` reads the whole prompt at every step, `persistent` what is new
and lets go of screenshots that leave the history (`agentkv.persistent`), `changes` of a new screenshot only what looks
different (`agentkv.changes`). Rows of an arm (`cache`, `method`) hold
its success, what it read against what was new, its seconds against the fresh ones from step 5 on, and how flat its
bytes are once the history is full; rows with a `step` hold the same step by step, which `--plot` draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib import pyplot
from rich.table import Table

from agentkv.envs.browser import Browser
from agentkv.errors import EXPLAINED
from agentkv.play import LIVE, Plan, Play, open_folder, task_of
from agentkv.reading import read_run
from agentkv.run import AGENTS_BY_CACHE, EVALUATION_SEEDS, HISTORY, budget_of, fitting_scale, load
from agentkv.tables import stdout_console
from textkv.arguments import budget, methods
from textkv.command import (
    choices,
    count,
    episodes,
    natural,
    output_folder,
    run,
    seed,
    some_text,
    token_count,
    write_rows,
)
from textkv.intervals import wilson
from textkv.provenance import run_meta

from .arguments import add_outputs, checked_budget
from .curve import save
from .paired import difference
from .wide import Waiting, wide_agent

Episode = dict[str, Any]
SETTLED = 5  # the step (from 1) from which seconds are compared
RUN_FOLDERS = tuple(AGENTS_BY_CACHE)
CACHES = ["fresh", "persistent"]


@dataclass(frozen=True)
class Arm:
    """A method with one kind of cache, and its finished episodes by seed."""

    cache: str
    method: str
    budget: float | str
    episodes: dict[int, Episode]

    def steps(self) -> Iterator[tuple[int, Episode, Episode | None]]:
        """Every step: its number from 1, what was recorded, and what was recorded before it."""
        for episode in self.episodes.values():
            steps = episode["steps"]
            for number, (before, step) in enumerate(zip([None, *steps], steps, strict=False), 1):
                yield number, step, before


def new_tokens(step: Episode, before: Episode | None) -> int:
    """Tokens of a step's own turn: what the prompt grew by since the step before, without the answer between, which the
    model wrote itself; screenshots that left the history did not shrink it.
    """
    if before is None:
        return step["tokens_seen"]
    shown = {frame["step"] for frame in step["frames"]}
    gone = sum(frame["grid"][0] * frame["grid"][1] for frame in before["frames"] if frame["step"] not in shown)
    return step["tokens_seen"] + gone - before["tokens_seen"] - before["decode_tokens"]


def step_rows(arm: Arm) -> list[dict[str, Any]]:
    """A row for each step; `going`: share of the episodes that were not lost before it."""
    steps = list(arm.steps())
    rows = []
    for number in range(1, max((n for n, *_ in steps), default=0) + 1):
        mine = [(step, before) for n, step, before in steps if n == number]
        lost = sum(not e["success"] and len(e["steps"]) < number for e in arm.episodes.values())
        rows.append({
            "cache": arm.cache, "method": arm.method, "budget": arm.budget, "step": number, "n": len(mine),
            "going": 1 - lost / len(arm.episodes),
            "prefill_tokens": fmean(step["prefill_tokens"] for step, _ in mine),
            "new_tokens": fmean(new_tokens(step, before) for step, before in mine),
            "kv_bytes": fmean(step["kv_bytes"] for step, _ in mine),
            "seconds": median(step["seconds_prefill"] + step["seconds_decode"] for step, _ in mine),
            "seconds_prefill": median(step["seconds_prefill"] for step, _ in mine),
        })  # fmt: skip
    return rows


def arm_row(arm: Arm, fresh: Arm, history: int) -> dict[str, Any]:
    """The row of an arm beside the fresh arm of its method."""
    won = {seed: bool(episode["success"]) for seed, episode in arm.episodes.items()}
    theirs = {seed: bool(episode["success"]) for seed, episode in fresh.episodes.items()}
    gap, gap_low, gap_high, _ = difference(won, theirs)
    low, high = wilson(sum(won.values()), len(won))
    rows, beside = step_rows(arm), {row["step"]: row for row in step_rows(fresh)}
    later = [row for row in rows if row["step"] > 1]
    settled = [row for row in rows if row["step"] >= SETTLED and row["step"] in beside]
    held = [row["kv_bytes"] for row in rows if row["step"] > history]
    return {
        "cache": arm.cache, "method": arm.method, "budget": arm.budget, "n": len(won), "history": history,
        "success": fmean(won.values()), "low": low, "high": high,
        "difference": gap, "difference_low": gap_low, "difference_high": gap_high,
        "steps": fmean(len(episode["steps"]) for episode in arm.episodes.values()),
        "prefill_ratio": _share(later, "prefill_tokens", "new_tokens"),
        "seconds_ratio": _of(settled, beside, "seconds"),
        "prefill_seconds_ratio": _of(settled, beside, "seconds_prefill"),
        "bytes_spread": (max(held) - min(held)) / fmean(held) if held else None,
        "kv_bytes": fmean(row["kv_bytes"] for row in rows),
    }  # fmt: skip


def _share(rows: Sequence[dict[str, Any]], name: str, of: str) -> float | None:
    return sum(row[name] * row["n"] for row in rows) / sum(row[of] * row["n"] for row in rows) if rows else None


def _of(rows: Sequence[dict[str, Any]], beside: dict[int, dict[str, Any]], name: str) -> float | None:
    return median(row[name] / beside[row["step"]][name] for row in rows) if rows else None


def arms_of(out: Path, caches: Sequence[str]) -> list[Arm]:
    """What was played into the run folders of `out`; arms without an episode are left out."""
    found = []
    for cache in caches:
        recorded = read_run(out / cache)
        for method in recorded.about["methods"]:
            mine = {e["seed"]: e for e in recorded.episodes if e["method"] == method}
            if mine:
                found.append(Arm(cache, method, next(iter(mine.values()))["budget"], mine))
    return found


def rows_of(arms: Sequence[Arm], history: int) -> list[dict[str, Any]]:
    """Rows of the arms that have a fresh one beside them, then those of their steps."""
    fresh = {arm.method: arm for arm in arms if arm.cache == "fresh"}
    arms = [arm for arm in arms if arm.method in fresh]
    return [arm_row(arm, fresh[arm.method], history) for arm in arms] + [row for arm in arms for row in step_rows(arm)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per arm."""
    made = Table(
        "cache", "method", "n", "success", "95 %", "minus fresh", "read / new", f"seconds from step {SETTLED}",
        "bytes", "spread",
    )  # fmt: skip
    for row in rows:
        made.add_row(
            row["cache"], row["method"], str(row["n"]), f"{row['success']:.0%}", f"{row['low']:.0%}-{row['high']:.0%}",
            f"{row['difference']:+.0%} ({row['difference_low']:+.0%} to {row['difference_high']:+.0%})",
            _told(row["prefill_ratio"]), _told(row["seconds_ratio"]), f"{row['kv_bytes'] / 1e6:.2f} MB",
            _told(row["bytes_spread"]),
        )  # fmt: skip
    return made


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


PANELS = (
    ("going", "episodes not lost", 1.0),
    ("kv_bytes", "KV bytes at rest, MB", 1e-6),
    ("prefill_tokens", "tokens read", 1.0),
    ("seconds", "seconds of the model", 1.0),
)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Four panels over the steps, a line per arm: fresh dashed, persistent solid, changes dotted."""
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    arms = list(dict.fromkeys((row["method"], row["cache"]) for row in rows))
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(method for method, _ in arms))}
    for panel, (name, title, unit) in zip(panels.flat, PANELS, strict=True):
        for method, cache in arms:
            mine = [row for row in rows if (row["method"], row["cache"]) == (method, cache)]
            style = {"fresh": "--", "persistent": "-"}.get(cache, ":")
            values = [unit * row[name] for row in mine]
            panel.plot([r["step"] for r in mine], values, style, color=colours[method], label=f"{method}, {cache}")
        panel.set(title=title, ylim=(0, None))
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    panels[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path, "eval.persistent")


def play(plan: Plan, caches: Sequence[str], adapter: Any, waits: bool, browser: Browser, out: Path) -> None:
    """Every seed by all caches in turn, so that what else the machine does falls on all; `waits`: as `Waiting`."""
    budgets = {method: budget_of(method, plan) for method in plan.methods}
    for number in plan.seeds:
        for cache in caches:
            kind = AGENTS_BY_CACHE[cache]
            agents = {m: kind(adapter, m, plan.budget, plan.max_new_tokens) for m in plan.methods}
            policies = {m: Waiting(agent) for m, agent in agents.items()} if waits else agents
            one = Plan(**vars(plan) | {"seeds": (number,), "cache": cache})
            Play(one, policies, browser, out / cache, budgets).run()


def _is_study(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in RUN_FOLDERS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.persistent", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini-growing", help="a folder, or a hub id (mini-growing)")
    wide = "in place of --model: UI-TARS-1.5-7B's shapes with random weights and so many layers"
    p.add_argument("--wide", type=natural, default=0, help=wide)
    p.add_argument("--task", type=some_text, default="memory-colour-rounds", help="what is played (%(default)s)")
    p.add_argument("--methods", type=methods(), default="full,gui-kv", help="methods or compositions (full,gui-kv)")
    caches = choices(*AGENTS_BY_CACHE)
    p.add_argument("--caches", type=caches, default=CACHES, help=f"of {', '.join(AGENTS_BY_CACHE)} (the first two)")
    p.add_argument("--budget", type=budget, default="0.2", help="share of the prompt to keep, or tokens as 512t")
    p.add_argument("--history", type=count, default=HISTORY, help="screenshots in a prompt (5)")
    p.add_argument("--episodes", type=episodes, default=10, help="per arm (10)")
    p.add_argument("--max-steps", type=count, help="of an episode (default: the task's own limit)")
    p.add_argument("--max-new-tokens", type=token_count, default=64, help="length limit of one answer (64)")
    p.add_argument("--device-scale", type=count, default=1, help="device pixels per CSS pixel of a screenshot (1)")
    p.add_argument("--seed", type=seed, default=EVALUATION_SEEDS, help="first seed")
    p.add_argument("--chromium", type=some_text, help="path of the browser to use")
    own = output_folder(
        lambda folder: any((folder / name).is_dir() for name in RUN_FOLDERS), "python -m eval.persistent"
    )
    p.add_argument("--out", type=own, default="runs/persistent", help="folder of the runs; it is gone on with")
    add_outputs(p, "plot")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.persistent", parser(), work, argv, explained=EXPLAINED, kept="the same command goes on")


def plan_of(args: argparse.Namespace) -> Plan:
    """What is played. Raises ValueError for an unknown task, or a method that cannot keep the budget."""
    if args.task == LIVE:
        raise ValueError(f"task={args.task!r} is a page of yours; name one of `envs.task_ids()`")
    # A folder goes on with the model that it was begun with: random weights are told apart from it by name.
    model = f"random weights, {args.wide} layers" if args.wide else args.model
    plan = Plan(
        model, tuple(args.methods), checked_budget(args.methods, args.budget), (args.task,),
        tuple(range(args.seed, args.seed + args.episodes)), history=args.history, max_steps=args.max_steps,
        max_new_tokens=args.max_new_tokens, device=args.device, device_scale=float(args.device_scale),
    )  # fmt: skip
    task_of(args.task, plan)
    return plan


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Play what is missing, print."""
    plan, meta = plan_of(args), run_meta("eval.persistent", argv, args.seed)
    adapter = wide_agent(args.wide, plan.device) if args.wide else load(plan)
    plan = Plan(**vars(plan) | {"device_scale": fitting_scale(plan, adapter)})
    # The others are told beside it.
    caches = list(dict.fromkeys(["fresh", *args.caches]))
    for cache in caches:
        open_folder(args.out / cache, Plan(**vars(plan) | {"cache": cache}), True, meta, [])
    with Browser(args.chromium) as browser:
        play(plan, caches, adapter, bool(args.wide), browser, args.out)
    rows = rows_of(arms_of(args.out, caches), plan.history)
    write_rows(args.json, meta, rows)
    steps = [row for row in rows if "step" in row]
    if args.plot:
        draw(steps, args.plot)
    stdout_console().print(table([row for row in rows if "step" not in row]))


if __name__ == "__main__":
    sys.exit(main())
