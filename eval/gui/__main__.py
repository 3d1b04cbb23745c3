"""`python -m eval.gui --benchmark NAME --data DIR`: a GUI agent with compressed caches on an offline benchmark.

The data is the user's: nothing is fetched. Answers are kept in FILE.jsonl beside `--json FILE.json` as they come; the
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentkv.errors import EXPLAINED
from agentkv.play import Plan
from agentkv.run import load
from agentkv.tables import stdout_console
from textkv import resolve_method
from textkv.command import (
    checked,
    count,
    results_file,
    run,
    token_count,
    write_rows,
)
from textkv.provenance import run_meta

from ..agents import add_agent, add_data
from ..leaderboard import Cell, cells_of
from . import android_control, gui_odyssey, mind2web, osworld_g, screenspot, ui_vision  # noqa: F401  (register)
from .bench import Answers, Bench
from .figures import UNITS, rows_of, table
from .items import BENCHMARKS, Benchmark, Item, read


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.gui", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--benchmark",
        type=checked(BENCHMARKS.find),
        required=True,
        help=f"{', '.join(BENCHMARKS.names())}, or module:Class",
    )
    add_data(p, "folder of its annotation files")
    add_agent(p, "0.2")
    p.add_argument("--limit", type=count, help="the first so many questions only")
    p.add_argument("--max-new-tokens", type=token_count, help="limit of one answer (default: the family's)")
    p.add_argument(
        "--json",
        type=results_file("eval.gui", beside=(".jsonl",)),
        help="rows (default runs/BENCHMARK.json); the answers lie beside it",
    )
    return p


@dataclass
class Request:
    """A request that can be carried out."""

    benchmark: Benchmark
    items: list[Item]
    problems: list[str]
    path: Path
    answers: Answers
    bench: Bench


def cells(args: argparse.Namespace) -> list[Cell]:
    """Methods at budgets. Raises ValueError for one that cannot be."""
    for method in args.method:
        for budget in args.budget:
            resolve_method(method, budget)
    return [cell for cell in cells_of(args.method, args.budget) if cell[0] in args.method]


def check(args: argparse.Namespace) -> Request:
    """Everything that can be wrong with a request, before any work.

    Raises:
        ValueError, FileNotFoundError: what cannot be carried out.
    """
    benchmark, grid = args.benchmark(), cells(args)
    items, problems = read(benchmark, args.data, args.images)
    path = args.json or Path("runs") / f"{benchmark.name}.json"
    board = {"benchmark": benchmark.name, "data": str(args.data), "model": args.model, "agent": args.agent}
    answers = Answers(path.with_suffix(".jsonl"), board | {"max_new_tokens": args.max_new_tokens})
    adapter = load(Plan(args.model, (), "1", (), (0,), device=args.device, agent=args.agent))
    bench = Bench(benchmark, items[: args.limit], adapter, grid, args.max_new_tokens)
    return Request(benchmark, items[: args.limit], problems, path, answers, bench)


def measure(bench: Bench, answers: Answers) -> None:
    """Ask for everything that is missing, with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("questions", total=bench.left(answers))
        for one in bench.run(answers):
            progress.update(bar, advance=1, description=f"{one.method} {one.budget}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.gui", parser(), work, argv, explained=EXPLAINED, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what is missing and print."""
    request = check(args)
    print(*request.problems, sep="\n", end="\n" * bool(request.problems), file=sys.stderr)
    measure(request.bench, request.answers)
    rows = rows_of(request.benchmark, request.items, request.answers.done.values())
    write_rows(request.path, run_meta("eval.gui", argv, 0, units=UNITS, left_out=request.problems), rows)
    stdout_console().print(table(request.benchmark, rows))
    print(request.path)


if __name__ == "__main__":
    sys.exit(main())
