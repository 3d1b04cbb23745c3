"""`python -m eval.agentnetbench --data DIR`: step accuracy of a GUI agent with compressed caches on recorded tasks.

The data is the user's: nothing is fetched. Answers are kept in FILE.jsonl beside `--json FILE.json` as they come; the
same command goes on, `--rescore` scores them again without the model, and `--replay` scores the recorded truth itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentkv.errors import EXPLAINED, user_errors
from agentkv.models import AGENTS
from agentkv.play import Plan
from agentkv.run import load, split_methods
from agentkv.tables import stdout_console
from agentkv.trace import write_json
from textkv import Budget, resolve_method, split_list
from textkv.devices import device_of
from textkv.provenance import run_meta

from ..leaderboard import cells_of
from .bench import OWN, TEACHER, Answers, Bench, Cell
from .figures import UNITS, draw, replay_rows, rows_of, table, type_table
from .records import Trajectory, read
from .scoring import PROTOCOLS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.agentnetbench", description=__doc__.split("\n\n")[0])
    p.add_argument("--data", type=Path, required=True, help="folder of <task>.json files in AgentNetBench's layout")
    p.add_argument("--images", type=Path, help="folder of their pictures (default: images in --data)")
    p.add_argument("--model", default="mini", help="mini (embedded), a folder, or a hub id of a supported family")
    p.add_argument(
        "--agent", help=f"prompt and grammar: {', '.join(AGENTS)}, or module:Class; default: the checkpoint's"
    )
    p.add_argument("--method", default="full,gui-kv", help="comma-separated methods or compositions")
    p.add_argument("--budget", default="0.4", help="comma-separated shares of the prompt to keep, or tokens as 512t")
    p.add_argument("--screenshots", default="5", help="in a prompt, the current one included: 5, or 1,3,5, or 1..5")
    p.add_argument("--protocol", default="v1", help=f"comma-separated, of {', '.join(PROTOCOLS)} (default v1)")
    p.add_argument(
        "--history", choices=(TEACHER, OWN), default=TEACHER, help="earlier answers in a prompt: recorded, or its own"
    )
    p.add_argument("--max-new-tokens", type=int, default=256, help="length limit of one answer (default 256)")
    p.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--json", type=Path, default=Path("runs/agentnetbench.json"), help="rows; gone on with if it exists")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--replay", action="store_true", help="score the ground truth itself; no model, no pictures")
    how.add_argument("--rescore", action="store_true", help="score the saved answers again, without the model")
    return p


def numbers_of(text: str) -> tuple[int, ...]:
    """ "1..3,5" -> (1, 2, 3, 5). Raises ValueError for anything that is not numbers of screenshots."""
    found: list[int] = []
    for part in split_list(text):
        first, _, last = part.partition("..")
        if not (first.isdigit() and (last or first).isdigit()):
            raise ValueError(f"screenshots={part!r} is no number; write 5, or 1,3,5, or 1..5")
        found += range(int(first), int(last or first) + 1)
    if not found or min(found) < 1:
        raise ValueError(f"screenshots={text!r} shows nothing; use at least 1")
    return tuple(dict.fromkeys(found))


def protocols_of(text: str) -> tuple[str, ...]:
    """The protocols that were named. Raises ValueError for an unknown one, or none."""
    named = tuple(dict.fromkeys(split_list(text)))
    if wrong := [name for name in named if name not in PROTOCOLS] or ([] if named else [text]):
        raise ValueError(f"protocol {wrong[0]!r} is unknown; use {', '.join(PROTOCOLS)}")
    return named


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid. Raises ValueError for a method, budget or number that cannot be."""
    methods = split_methods(args.method)
    budgets = [str(Budget.parse(b)) for b in split_list(args.budget)]
    if not budgets:
        raise ValueError("no budget was named; use --budget 0.4, or several: --budget 0.2,0.4")
    for method in methods:
        for budget in budgets:
            resolve_method(method, budget)
    asked = [cell for cell in cells_of(methods, budgets) if cell[0] in methods]
    return [Cell(*cell, number) for number in numbers_of(args.screenshots) for cell in asked]


def measure(args: argparse.Namespace, trajectories: Sequence[Trajectory], path: Path) -> Answers:
    """Answers to every step by every cell, those of an earlier start included."""
    grid = cells(args)
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} leaves no room for an answer; use 256")
    board = {"data": str(args.data), "model": args.model, "agent": args.agent, "history": args.history}
    answers = Answers(path, board | {"max_new_tokens": args.max_new_tokens})
    adapter = load(Plan(args.model, (), "1", (), (0,), device=device_of(args.device), agent=args.agent))
    bench = Bench(trajectories, adapter, grid, args.history, args.max_new_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("steps", total=bench.left(answers))
        for one in bench.run(answers):
            said = f"{one.method} {one.budget} · {one.screenshots} · {one.task}"
            progress.update(bar, advance=1, description=said)
    return answers


def rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """What the request asks for, and a line for all that was left out of the data. Raises ValueError and
    FileNotFoundError for what cannot be carried out.
    """
    protocols = protocols_of(args.protocol)
    needs_model = not (args.replay or args.rescore)
    if needs_model:
        cells(args)
    trajectories, problems = read(args.data, args.images, look=needs_model)
    for line in problems:
        print(line, file=sys.stderr)
    truth = replay_rows(trajectories, protocols)
    if args.replay:
        return truth, problems
    path = args.json.with_suffix(".jsonl")
    answers = Answers.saved(path) if args.rescore else measure(args, trajectories, path)
    found = rows_of(trajectories, answers.done.values(), protocols)
    if not found:
        raise ValueError(f"{path} holds no answer to a step of {args.data}")
    return [*truth, *(row | {"history": answers.board["history"]} for row in found)], problems


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 for a request that cannot be carried out, 130 after Ctrl-C (what was answered is kept)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    try:
        with user_errors():
            found, problems = rows(args)
    except EXPLAINED as error:
        print(f"eval.agentnetbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.agentnetbench: stopped; the same command goes on", file=sys.stderr)
        return 130
    meta = run_meta("eval.agentnetbench", argv, 0, units=UNITS, left_out=problems)
    write_json(args.json, {"meta": meta, "rows": found})
    console = stdout_console()
    console.print(table(found))
    console.print(type_table(found))
    print(*(str(path) for path in (args.json, *draw(found, args.json))), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
