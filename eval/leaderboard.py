"""`python -m eval.leaderboard`: every text method at every budget on one table.

Per method and budget: recall by task, perplexity of the text after a compressed prompt, attention-output error against
the full cache, bytes held, tokens stored, time per hook. The full cache stands on top. transformers' own quantised
caches are rows like ours (`hf-quanto(4)`, `hf-hqq(4)`, `hf-fp8`), and `--memory` adds what a decoded token needs beside
the cache. A cell (method, budget) is written to `--json` as soon as it is done, and a second start with the same file
measures only what is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from textkv import list_methods
from textkv.arguments import budgets, methods
from textkv.command import (
    Crew,
    add_crew,
    natural,
    question_count,
    run,
    some_text,
    text_file,
    token_count,
    write_rows,
    write_text,
)
from textkv.intervals import wilson
from textkv.mini.facts import TASKS
from textkv.mini.tasks import FIRST_EVALUATION_SEED
from textkv.provenance import run_meta
from textkv.records import checked, read_results

from .arguments import add_choice, add_dtype, add_outputs
from .curve import draw_curve
from .memory import check_length, decoding_row
from .quantized import PREFIX, takes_budget
from .textbench import (
    FULL,
    MODEL_HELP,
    Continuation,
    check_model,
    check_positions,
    continuation,
    examples,
    load_text_model,
    recall,
    share,
    text_rows,
)

AFTER = 128  # tokens of text that are predicted after the prompt
TEXTS = 4
WHOLE = "1.0"
Cell = tuple[str, str]
# What the table and the curve need of a row; a task's own is a row of recall.
RECALL = {"n": int, **dict.fromkeys(("recall", "low", "high", "kv_share", "kv_bits", "tokens_stored"), float)}
FIGURES = {"text": dict.fromkeys(("perplexity", "error", "kv_share"), float), "refused": {"reason": str}}
FIGURES["decoding"] = dict.fromkeys(("step_largest_share", "step_alive_share"), float)


@dataclass(frozen=True)
class Board:
    """What is measured in every cell: `n` examples per task at `length` tokens, `TEXTS` pieces of text, and what
    decoding a token takes after `memory` tokens (0 = not measured).
    """

    model: str
    tasks: tuple[str, ...]
    length: int
    n: int
    text: Path | None
    device: str
    dtype: str | None = None
    memory: int = 0


class Worker:
    """One process's model and data; cells are measured with them."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.model, tokenizer = load_text_model(board.model, board.device, board.dtype)
        check_positions(self.model, board.length, 0)
        self.asked = {task: examples(tokenizer, task, board.length, board.n) for task in board.tasks}
        self.rows = text_rows(tokenizer, board.text, TEXTS, board.length + AFTER)
        self.truth: Continuation | None = None

    def cell(self, method: str, budget: str) -> list[dict[str, Any]]:
        """The rows of one cell; one row with task "refused" if the method cannot do that budget."""
        try:
            return self.measure(method, budget)
        except ValueError as error:
            return [{"method": method, "budget": budget, "task": "refused", "reason": str(error)}]

    def measure(self, method: str, budget: str) -> list[dict[str, Any]]:
        """One row per task, one with task "recall" over all of them, one with task "text", and "decoding" if asked."""
        about = {"method": method, "budget": budget, "tokens_seen": self.board.length}
        found, rows = [], []
        for task, asked in self.asked.items():
            right, figures = recall(self.model, method, budget, asked)
            rows.append(about | {"task": task} | _recalled(sum(right), len(right)) | figures)
            found += right
        whole = about | {"task": "recall"} | _recalled(sum(found), len(found))
        names = [name for name in rows[0] if name.startswith(("kv_", "tokens_stored", "seconds_"))]
        whole |= {name: sum(row[name] for row in rows) / len(rows) for name in names}
        rows = [share(row) for row in [*rows, whole, about | self._text(method, budget)]]
        if self.board.memory:
            seen = decoding_row(self.model, method, budget, self.board.memory)
            rows.append(about | {"task": "decoding"} | seen)
        return rows

    def _text(self, method: str, budget: str) -> dict[str, Any]:
        self.truth = self.truth or continuation(self.model, FULL, WHOLE, self.rows, self.board.length)
        seen = continuation(self.model, method, budget, self.rows, self.board.length)
        perplexity = math.exp(seen.nll.mean().item())
        errors = {"error": seen.error(self.truth), "logit_error": seen.logit_error(self.truth)}
        return {"task": "text", "n": TEXTS, "perplexity": perplexity, **errors, **seen.held}


def _recalled(right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {"n": n, "recall": right / n, "low": low, "high": high}


def cells_of(methods: Sequence[str], budgets: Sequence[str]) -> list[Cell]:
    """The full cache, then every method at every budget, or once if the budget changes nothing.

    Raises ValueError for a bad method or budget.
    """
    cells = [(FULL, WHOLE)]
    for method in methods:
        for budget in budgets:
            cells.append((method, budget if takes_budget(method, budget) else WHOLE))
    return list(dict.fromkeys(cells))


def table(rows: Sequence[dict[str, Any]], budgets: Sequence[str]) -> Table:
    """Methods down, budgets across: recall, perplexity, share of the full cache's bytes."""
    at = {(row["method"], row["budget"], row["task"]): row for row in rows}
    made = Table("method", *(f"{b}: recall  perplexity  bytes" for b in budgets), title="text methods by budget")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for budget in budgets:
            key = (method, WHOLE if (method, WHOLE, "recall") in at else budget)
            facts, text = at.get((*key, "recall")), at.get((*key, "text"))
            there = facts and text
            cells.append(f"{facts['recall']:.2f}  {text['perplexity']:.2f}  {facts['kv_share']:.3f}" if there else "-")
        made.add_row(method, *cells)
    return made


def markdown(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """The board as a Markdown table, one line per cell; "largest" and "alive" are shares of one layer's K and V."""
    at = {(row["method"], row["budget"], row["task"]): row for row in rows}
    memory = any(row["task"] == "decoding" for row in rows)
    head = ["method", "budget", *tasks, "recall", "95 %", "perplexity", "error", "logit error", "bytes of full", "bits"]
    head += ["tokens stored", *(["largest", "alive"] if memory else [])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        if (method, budget, "refused") in at:
            lines.append(f"| {method} | {budget} | refused |" + " |" * (len(head) - 3))
            continue
        mine = {task: at[method, budget, task] for task in (*tasks, "recall", "text")}
        step = at.get((method, budget, "decoding"), {})
        all_, text = mine["recall"], mine["text"]
        cells = [f"{mine[task]['recall']:.2f}" for task in (*tasks, "recall")]
        cells += [f"{all_['low']:.2f}-{all_['high']:.2f}", f"{text['perplexity']:.2f}", f"{text['error']:.3f}"]
        # A board that was begun before logits were compared has none.
        cells += [f"{text['logit_error']:.4f}" if "logit_error" in text else "-"]
        cells += [f"{all_['kv_share']:.3f}", f"{all_['kv_bits']:.2f}", f"{all_['tokens_stored']:.0f}"]
        if memory:
            cells += [f"{step[f'step_{x}_share']:.2f}" if step else "-" for x in ("largest", "alive")]
        lines.append("| " + " | ".join([method, budget, *cells]) + " |")
    return "\n".join(lines) + "\n"


def measure(board: Board, cells: Sequence[Cell], crew: Crew, path: Path, meta: dict[str, Any]) -> list[dict]:
    """All rows, those that `path` already holds included; written after every cell.

    Raises:
        ValueError: `path` holds another board.
    """
    said = {"model": board.model, "tasks": list(board.tasks), "length": board.length, "n": board.n}
    said |= {"dtype": board.dtype} if board.dtype else {}
    said |= {"text": board.text.name} if board.text else {}
    said |= {"memory": board.memory} if board.memory else {}
    done: dict[Cell, list[dict[str, Any]]] = {}
    if path.exists():
        before, rows = read_results(path)
        if before.get("board") != said:
            raise ValueError(f"{path} holds another board ({before.get('board')}); give another --json")
        done = whole_cells(rows, board)
    missing = [cell for cell in cells if cell not in done]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    meta = meta | {"board": said}
    with crew.open(Worker, board) as there:
        jobs = there.results(Worker.cell, missing)
        for cell, found in track(jobs, "cells", len(missing), console=Console(stderr=True)):
            done[cell] = found
            write_rows(path, meta, [row for cell in cells for row in done.get(cell, [])])
    return [row for cell in cells for row in done[cell]]


def whole_cells(rows: Sequence[dict[str, Any]], board: Board) -> dict[Cell, list[dict[str, Any]]]:
    """Rows by cell, of those cells whose rows are all there and whole; the others are told, and measured again."""
    found: dict[Cell, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((str(row.get("method")), str(row.get("budget"))), []).append(row)
    wanted = {*board.tasks, "recall", "text", *(["decoding"] if board.memory else [])}
    good = {}
    for cell, mine in found.items():
        try:
            for row in mine:
                checked(row, {"method": str, "budget": str, "task": str} | FIGURES.get(row.get("task"), RECALL))
            lacking = wanted - {row["task"] for row in mine}
            if lacking and mine[0]["task"] != "refused":
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            good[cell] = mine
        except ValueError as error:
            print(f"{' at '.join(cell)}: {error}; it is measured again", file=sys.stderr)
    return good


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.leaderboard", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP + ", or biased:even")
    p.add_argument(
        "--methods", type=methods("all", PREFIX), default="all", help="all (of ours), methods, compositions, hf-..."
    )
    p.add_argument(
        "--budgets", type=budgets, default="0.5,0.2,0.1,0.05", help="comma-separated shares, or tokens as 64t"
    )
    add_choice(p, "tasks", TASKS)
    p.add_argument("--length", type=token_count, default=1024, help="tokens of a prompt with its answer (default 1024)")
    p.add_argument("--n", type=question_count, default=16, help="examples per task (default 16)")
    p.add_argument("--text", type=text_file, help="text for the perplexity; its last tenth is used")
    p.add_argument(
        "--memory",
        type=natural,
        default=0,
        metavar="TOKENS",
        help="also: the tensors made while decoding after so many",
    )
    add_dtype(p)
    add_crew(p, 2, "each with the model")
    add_outputs(p, "markdown", "plot", when="; gone on with if it exists", default="runs/leaderboard.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.leaderboard", parser(), work, argv, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what is missing and print the board."""
    if args.memory:
        check_length(args.memory)
    cells = cells_of([x for name in args.methods for x in (list_methods() if name == "all" else [name])], args.budgets)
    check_model(args.model)
    board = Board(args.model, tuple(args.tasks), args.length, args.n, args.text, args.device, args.dtype, args.memory)
    meta = run_meta("eval.leaderboard", argv, FIRST_EVALUATION_SEED)
    rows = measure(board, cells, Crew.of(args), args.json, meta)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, args.budgets))
    if args.markdown:
        write_text(args.markdown, f"`{meta['command']}`\n\n{markdown(rows, args.tasks)}")
    if args.plot:
        groups = [(task, task) for task in (*args.tasks, "recall")]
        draw_curve(rows, args.plot, groups, "recall", "eval.leaderboard")
    for row in rows:
        if row["task"] == "refused":
            print(f"refused: {row['method']} at {row['budget']}: {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
