"""`python -m eval.peers install|compare`: see `eval.peers`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from textkv.command import (
    fractions,
    natural,
    question_count,
    results_file,
    run,
    some_text,
    text_file,
    token_count,
    write_rows,
)
from textkv.provenance import run_meta

from ..arguments import add_choice
from ..ruler import TASKS
from ..textbench import MODEL_HELP, check_model
from . import compare, place
from .pairs import PAIRS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m eval.peers", description="kvpress beside our caches, on the same prompts."
    )
    commands = p.add_subparsers(required=True, dest="command", metavar="command")
    commands.add_parser("install", help="make the peer's environment (kvpress needs another transformers)")
    beside = commands.add_parser("compare", help="run both and print the table")
    beside.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP)
    add_choice(beside, "methods", list(PAIRS))
    add_choice(beside, "tasks", list(TASKS))
    beside.add_argument("--budgets", type=fractions, default="0.5,0.25", help="shares to keep (default 0.5,0.25)")
    beside.add_argument("--length", type=token_count, default=1024, help="tokens of a prompt, question included (1024)")
    beside.add_argument("--n", type=question_count, default=4, help="prompts of each task (default 4)")
    beside.add_argument("--overlap", type=natural, default=2, help="prompts whose kept tokens are compared (default 2)")
    beside.add_argument("--text", type=text_file, help="text to fill prompts with (a small grammar's sentences)")
    beside.add_argument("--json", type=results_file("eval.peers"), help="write the rows here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.peers", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Make the environment, or compare."""
    if args.command == "install":
        print(place.install())
        return
    check_model(args.model)
    rows = compare.compared(
        args.model, args.methods, args.budgets, args.length, args.tasks, args.n, args.overlap, args.text
    )
    write_rows(args.json, run_meta("eval.peers", argv, 0), rows)
    Console().print(compare.table(rows))


if __name__ == "__main__":
    sys.exit(main())
