"""`python -m eval.webtasks`: which cache method loses how much of an agent's success at which budget?

Every method plays the same seeds of the same tasks at every budget and history length; the full cache is played once
per history. A cell (history, budget) is a run folder of `agentkv.run`, so finished episodes are never played again and
`python -m agentkv.report.picture` and `--replay` work on it. Work is dealt out to worker processes that share nothing
but the disk. Out come rows per cell, method and group of tasks (web, memory, all), differences to `full` and `snapkv`
on equal seeds, and the curve of success against bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agentkv.agent import Agent
from agentkv.envs.browser import Browser
from agentkv.errors import EXPLAINED
from agentkv.models import AGENTS, EMBEDDED
from agentkv.play import Plan, Play, open_folder, task_of
from agentkv.reading import is_whole, read_run
from agentkv.run import ANSWER, DEFAULT_TASKS, EVALUATION_SEEDS, budget_of, load, load_shared
from agentkv.stats import UNITS, summarise
from agentkv.tables import stdout_console
from agentkv.trace import RUN, episode_folder
from textkv import Budget, resolve_method
from textkv.arguments import budgets, device, methods
from textkv.command import (
    Ask,
    Crew,
    add_crew,
    episodes,
    lengths,
    names,
    output_folder,
    results_file,
    run,
    seed,
    some_text,
    token_count,
    write_rows,
)
from textkv.provenance import run_meta

from .curve import draw_curve
from .paired import difference

METHODS = "full,gui-kv,snapkv,pyramidkv,vl-cache,streaming_llm,window"
BUDGETS = "0.4,0.2,0.1,0.05"
FULL = "full"
RIVALS = (FULL, "snapkv")


@dataclass(frozen=True)
class Study:
    """The grid. Raises ValueError for an unknown method or task, a budget out of range, nothing to play."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    histories: tuple[int, ...]
    episodes: int
    seed: int
    out: Path
    model: str = "mini"
    agent: str | None = None
    max_new_tokens: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not (self.tasks and self.methods and self.budgets and self.histories):
            raise ValueError("tasks, methods, budgets and history must each name at least one")
        for method in self.methods:
            for budget in self.budgets:
                resolve_method(method, Budget.parse(budget))
        for _, plan in self.cells():
            for task in plan.tasks:
                task_of(task, plan)

    def cells(self) -> Iterator[tuple[Path, Plan]]:
        """(run folder, plan) per history and budget, the full cache apart: it has no budget."""
        rest = tuple(m for m in self.methods if m != FULL)
        for history in self.histories:
            if FULL in self.methods:
                yield self.out / f"history-{history}-full", self._plan((FULL,), "1", history)
            for budget in self.budgets if rest else ():
                yield self.out / f"history-{history}-budget-{budget}", self._plan(rest, budget, history)

    def _plan(self, methods: tuple[str, ...], budget: str, history: int) -> Plan:
        seeds = tuple(range(self.seed, self.seed + self.episodes))
        return Plan(
            self.model, methods, budget, self.tasks, seeds, history=history, agent=self.agent,
            max_new_tokens=self.max_new_tokens, device=self.device,
        )  # fmt: skip

    def jobs(self) -> list[tuple[Path, Plan]]:
        """The cells cut by task and seed, seeds outermost, so that a study cut short is still balanced."""
        cut = [
            (folder, Plan(**{**vars(plan), "tasks": (task,), "seeds": (seed,)}))
            for seed in range(self.seed, self.seed + self.episodes)
            for folder, plan in self.cells()
            for task in plan.tasks
        ]
        return [(folder, plan) for folder, plan in cut if _missing(folder, plan)]


def _missing(folder: Path, plan: Plan) -> bool:
    return any(not is_whole(episode_folder(folder, m, t, s)) for s, t, m in plan.episodes())


class Worker:
    """One process's model and browser, opened once; jobs are played with them. `ask`: a model that others share, in
    place of one's own.
    """

    def __init__(self, plan: Plan, chromium: str | None, ask: Ask | None = None) -> None:
        self.ask, self.adapter = ask, load(plan, weights=ask is None)
        self.browser = Browser(chromium).start()

    def play(self, folder: Path, plan: Plan) -> None:
        """Play one job. Raises ValueError on a machine that does not have the study's folder."""
        if not (folder / RUN).is_file():
            raise ValueError(f"{folder} is not there for a worker; let --out lie where all machines see it")
        agents = {m: Agent(self.adapter, m, plan.budget, plan.max_new_tokens, self.ask) for m in plan.methods}
        budgets = {m: budget_of(m, plan) for m in plan.methods}
        Play(plan, agents, self.browser, folder, budgets, quiet=True).run()

    def close(self) -> None:
        """End the browser."""
        self.browser.close()


def play(study: Study, crew: Crew, chromium: str | None, meta: dict[str, Any]) -> None:
    """Play what is missing."""
    for folder, plan in study.cells():
        open_folder(folder, plan, True, meta, [])
    # Absolute: a worker may run in another folder.
    jobs = [(folder.absolute(), plan) for folder, plan in study.jobs()]
    if not jobs:
        return
    # Fewer threads per process than cores would be idle, more would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    plan = jobs[0][1]
    with (
        crew.sharing(load_shared, plan) as ask,
        crew.open(Worker, plan, chromium, ask) as there,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task(f"{len(jobs)} jobs of {len(plan.methods)} or more episodes", total=len(jobs))
        for _ in there.results(Worker.play, jobs):
            progress.advance(bar)


def rows_of(study: Study) -> list[dict[str, Any]]:
    """One row per cell, method and group ("web", "memory", "all") and per task, from the traces."""
    rows = []
    for folder, plan in study.cells():
        episodes = read_run(folder).episodes
        for group in ("web", "memory"):
            part = [e for e in episodes if (group == "memory") == e["task"].startswith("memory-")]
            found = summarise(part)
            for row in found:
                row["task"] = group if row["task"] == "all" else row["task"]
            rows += [{**row, "history": plan.history} for row in found]
        rows += [{**row, "history": plan.history} for row in summarise(episodes) if row["task"] == "all"]
    return rows


def differences_of(study: Study) -> list[dict[str, Any]]:
    """Success of every method minus that of `full` and of `snapkv` on equal seeds, per cell and group of tasks."""
    won: dict[tuple[int, str, str], dict[tuple[str, int], bool]] = {}
    for folder, plan in study.cells():
        for e in read_run(folder).episodes:
            cell = won.setdefault((plan.history, "" if e["method"] == FULL else plan.budget, e["method"]), {})
            cell[e["task"], e["seed"]] = bool(e["success"])
    rows = []
    for (history, budget, method), mine in won.items():
        for rival in RIVALS:
            other = won.get((history, "" if rival == FULL else budget, rival))
            if rival == method or method == FULL or other is None:
                continue
            for group in ("web", "memory", "all"):
                part = {
                    k: v for k, v in mine.items() if group == "all" or (group == "memory") == k[0].startswith("mem")
                }
                mean, low, high, n = difference(part, other)
                row = {"method": method, "versus": rival, "budget": budget, "history": history, "task": group}
                rows.append(row | {"difference": mean, "low": low, "high": high, "n": n})
    return rows


def table(rows: Sequence[dict[str, Any]], history: int) -> Table:
    """Success and share of the full cache's bytes per method (down) and budget (across), web | memory."""
    mine = [r for r in rows if r["history"] == history and r["task"] in ("web", "memory", "all")]
    budgets = list(dict.fromkeys(r["budget"] for r in mine if r["method"] != FULL)) or [1.0]
    made = Table(title=f"success (web | memory pages) and KV bytes of full, {history} screenshots in a prompt")
    made.add_column("method")
    for budget in budgets:
        made.add_column(f"budget {budget}", justify="right")
    at = {(r["method"], r["budget"], r["task"]): r for r in mine}
    for method in dict.fromkeys(r["method"] for r in mine):
        cells = []
        for budget in budgets:
            found = [at.get((method, 1.0 if method == FULL else budget, group)) for group in ("web", "memory", "all")]
            shares = " | ".join(f"{r['success']:.0%}" if r else "-" for r in found[:2])
            cells.append(f"{shares}  {found[2]['kv_share']:.3f}" if found[2] else "-")
        made.add_row(method, *cells)
    return made


def _is_study(folder: Path) -> bool:
    return any(folder.glob(f"history-*/{RUN}"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.webtasks", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help="mini, a folder, or a hub id of a supported family")
    p.add_argument(
        "--agent",
        type=some_text,
        help=f"prompt and grammar: {', '.join(AGENTS)}, or module:Class; default: the checkpoint's",
    )
    p.add_argument("--tasks", type=names, help="comma-separated (default: those of agentkv.run)")
    p.add_argument("--methods", type=methods(), default=METHODS, help=f"methods or compositions (default {METHODS})")
    p.add_argument("--budgets", type=budgets, default=BUDGETS, help=f"shares or tokens (default {BUDGETS})")
    p.add_argument("--history", type=lengths, default="1,5", help="numbers of screenshots in a prompt (default 1,5)")
    p.add_argument("--episodes", type=episodes, default=4, help="per task, method, budget and history (default 4)")
    p.add_argument("--seed", type=seed, default=EVALUATION_SEEDS, help="first seed")
    add_crew(p, 2, "each with a browser and the model", models=True)
    p.add_argument("--device", type=device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument(
        "--max-new-tokens", type=token_count, help=f"length limit of one answer (default 64 for mini, else {ANSWER})"
    )
    p.add_argument("--chromium", type=some_text, help="path of the browser to use")
    own = output_folder(_is_study, "python -m eval.webtasks")
    p.add_argument("--out", type=own, default="runs/webtasks", help="folder of the study; it is gone on with")
    p.add_argument("--json", type=results_file("eval.webtasks"), help="write the figures here too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.webtasks", parser(), work, argv, explained=EXPLAINED, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Play what is missing; tables and curves of what was played."""
    study = Study(
        tuple(args.tasks or DEFAULT_TASKS), tuple(args.methods),
        tuple(args.budgets), tuple(args.history), args.episodes, args.seed, args.out,
        args.model, args.agent, args.max_new_tokens or (64 if args.model in EMBEDDED else ANSWER),
        args.device,
    )  # fmt: skip
    meta = run_meta("eval.webtasks", argv, args.seed, units=UNITS)
    play(study, Crew.of(args), args.chromium, meta)
    finish(study, meta, args.json)


def finish(study: Study, meta: dict[str, Any], extra: Path | None) -> None:
    """Tables, study.json and curve.png from the traces played so far."""
    rows, differences = rows_of(study), differences_of(study)
    for path in (study.out / "study.json", extra):
        write_rows(path, meta, rows, differences=differences)
    console = stdout_console()
    for history in study.histories:
        console.print(table(rows, history))
    pages = [study.out / f"curve-history-{history}.png" for history in study.histories]
    for history, page in zip(study.histories, pages, strict=True):
        draw_curve([row for row in rows if row["history"] == history], page)
    print(json.dumps([str(path) for path in (study.out / "study.json", *pages)]))


if __name__ == "__main__":
    sys.exit(main())
