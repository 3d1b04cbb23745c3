"""`python -m eval.agentnetbench --data DIR`: step accuracy of a GUI agent with compressed caches on recorded tasks.

The data is the user's: nothing is fetched. Answers are kept in FILE.jsonl beside `--json FILE.json` as they come; the
same command goes on, `--rescore` scores them again without the model, and `--replay` scores the recorded truth itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentkv.errors import EXPLAINED
from agentkv.play import Plan
from agentkv.run import load
from agentkv.tables import stdout_console
from textkv import resolve_method
from textkv.command import (
    Crew,
    add_crew,
    checked,
    choices,
    names,
    results_file,
    run,
    token_count,
    write_rows,
)
from textkv.provenance import run_meta

from ..agents import add_agent, add_data
from ..leaderboard import cells_of
from ..outcomes import ALL
from .bench import MAX_NEW_TOKENS, OWN, TEACHER, Answer, Answers, Bench, Cell
from .figures import UNITS, draw, replay_rows, rows_of, table, type_table
from .records import Trajectory, read
from .scoring import PROTOCOLS
from .sharing import share


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.agentnetbench", description=__doc__.split("\n\n")[0])
    add_data(p, "folder of <task>.json files in AgentNetBench's layout")
    add_agent(p, "0.4")
    p.add_argument(
        "--screenshots",
        type=checked(numbers_of),
        default="5",
        help="in a prompt, the current one included: 5, or 1,3,5, or 1..5",
    )
    p.add_argument(
        "--protocol",
        type=choices(*PROTOCOLS),
        default="v1",
        help=f"comma-separated, of {', '.join(PROTOCOLS)} (default v1)",
    )
    p.add_argument(
        "--history", choices=(TEACHER, OWN), default=TEACHER, help="earlier answers in a prompt: recorded, or its own"
    )
    p.add_argument(
        "--max-new-tokens",
        type=token_count,
        default=MAX_NEW_TOKENS,
        help=f"limit of one answer (default {MAX_NEW_TOKENS})",
    )
    p.add_argument(
        "--json",
        type=results_file("eval.agentnetbench", beside=(".jsonl",)),
        help="rows (default runs/agentnetbench.json); the answers lie beside it",
    )
    p.add_argument("--brief", action="store_true", help="rows over all tasks alone, none of single ones")
    add_crew(p, 1, "each with the model; 1 = this one", models=True)
    how = p.add_mutually_exclusive_group()
    how.add_argument("--replay", action="store_true", help="score the ground truth itself; no model, no pictures")
    how.add_argument("--rescore", action="store_true", help="score the saved answers again, without the model")
    return p


def numbers_of(text: str) -> tuple[int, ...]:
    """ "1..3,5" -> (1, 2, 3, 5). Raises ValueError for anything that is not numbers of screenshots."""
    found: list[int] = []
    for part in names(text):
        first, _, last = part.partition("..")
        if not re.fullmatch(r"[0-9]{1,3}", first) or not re.fullmatch(r"[0-9]{1,3}", last or first):
            raise ValueError(f"screenshots={part!r} is no number up to 999; write 5, or 1,3,5, or 1..5")
        if int(last or first) < int(first):
            raise ValueError(f"screenshots={part!r} ends before it begins; write 1..5")
        found += range(int(first), int(last or first) + 1)
    if not found or min(found) < 1:
        raise ValueError(f"screenshots={text!r} shows nothing; use at least 1")
    return tuple(dict.fromkeys(found))


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid. Raises ValueError for a method, budget or number that cannot be."""
    for method in args.method:
        for budget in args.budget:
            resolve_method(method, budget)
    asked = [cell for cell in cells_of(args.method, args.budget) if cell[0] in args.method]
    return [Cell(*cell, number) for number in args.screenshots for cell in asked]


@dataclass
class Request:
    """A request that can be carried out: what is scored, the answers so far, and who gives those that are missing."""

    path: Path
    protocols: tuple[str, ...]
    trajectories: list[Trajectory]
    problems: list[str]
    answers: Answers | None = None
    grid: Sequence[Cell] = ()
    left: Iterator[Answer] = field(default_factory=lambda: iter(()))
    brief: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """The ground truth's rows, then those of all answers."""
        rows = replay_rows(self.trajectories, self.protocols)
        if self.answers is not None:
            history = {"history": self.answers.board.get("history")}
            answers = self.answers.in_order(self.trajectories, self.grid)
            found = rows_of(self.trajectories, answers, self.protocols)
            rows += [row | history for row in found]
        return [row for row in rows if row["task"] == ALL or not self.brief]


def check(args: argparse.Namespace) -> Request:
    """Everything that can be wrong with a request, before any work.

    Raises:
        ValueError, FileNotFoundError: what cannot be carried out.
    """
    protocols, asks = tuple(args.protocol), not (args.replay or args.rescore)
    path = args.json or Path("runs") / ("agentnetbench-replay.json" if args.replay else "agentnetbench.json")
    grid = cells(args) if asks else []
    crew = Crew.of(args)
    # Workers on other machines run in other folders.
    where = [x and x.absolute() if crew.elsewhere else x for x in (args.data, args.images)]
    request = Request(path, protocols, *read(*where, look=asks), grid=grid, brief=args.brief)
    lines = path.with_suffix(".jsonl")
    if args.rescore:
        request.answers = Answers.saved(lines)
    elif asks:
        board = {"data": str(args.data), "model": args.model, "agent": args.agent, "history": args.history}
        request.answers = Answers(lines, board | {"max_new_tokens": args.max_new_tokens})
        plan = Plan(args.model, (), "1", (), (0,), device=args.device, agent=args.agent)
        how = args.history, args.max_new_tokens
        if crew.alone:
            request.left = Bench(request.trajectories, load(plan), grid, *how).run(request.answers)
        else:
            request.left = share(crew, plan, request.trajectories, grid, request.answers, *how)
    return request


def measure(request: Request) -> None:
    """Ask for everything that is missing, with a bar."""
    answers = request.answers
    total = sum(answers.left(one, cell) for one in request.trajectories for cell in request.grid)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("steps", total=total)
        for one in request.left:
            said = f"{one.method} {one.budget} · {one.screenshots} · {one.task}"
            progress.update(bar, advance=1, description=said)


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    kept = "the same command goes on, --rescore tells what is there"
    return run("eval.agentnetbench", parser(), work, argv, explained=EXPLAINED, kept=kept)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what is missing and print."""
    request = check(args)
    print(*request.problems, sep="\n", end="\n" * bool(request.problems), file=sys.stderr)
    if request.grid:
        measure(request)
    rows = request.rows()
    meta = run_meta("eval.agentnetbench", argv, 0, units=UNITS, left_out=request.problems)
    write_rows(request.path, meta, rows)
    console = stdout_console()
    console.print(table(rows))
    console.print(type_table(rows))
    print(*(str(path) for path in (request.path, *draw(rows, request.path))), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
