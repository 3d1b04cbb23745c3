"""`python -m eval.board --model smollm2`: what each method still finds in a prompt, on a real model.

RULER's kind of tasks (`eval.ruler`) at one length, every method at every budget, with the question known to the cache
when it compresses (it ends the prompt, as in most papers' tables) or unknown (it comes afterwards, to a cache that does
not change any more, as a second user's question would). One reading of a prompt serves all methods (`textkv.reading`).

Every batch of a cell is written to FILE.jsonl as soon as it is done; the same command goes on, and FILE.json always
holds the rows so far.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from textkv import Method, MethodCache, list_methods, resolve_method
from textkv.arguments import budgets, methods
from textkv.command import question_count, run, some_text, text_file, token_count, write_rows, write_text
from textkv.provenance import run_meta
from textkv.reading import Reading, ReadsItself
from textkv.report import scanned

from .arguments import add_choice, add_dtype, add_outputs
from .leaderboard import Cell, cells_of
from .outcomes import ALL, Outcome, Outcomes
from .quantized import PREFIX
from .ruler import DIGITS, SEED, TASKS, Maker, Prompt, score
from .textbench import BATCH_TOKENS, MODEL_HELP, check_model, check_positions, held, load_text_model

KNOWN, UNKNOWN = "known", "unknown"
SPOKEN = DIGITS + 3  # tokens of an answer: a blank, the digits one by one, and one more, so that a fifth digit shows


@dataclass(frozen=True)
class Board:
    """What is asked of which model: prompts of `length` tokens, question included."""

    model: str
    tasks: tuple[str, ...]
    asked: tuple[str, ...]
    length: int
    text: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts of one task and size that run together: `text` int64 [rows, n], `question` int64 [rows, m]."""

    task: str
    first: int
    text: torch.Tensor
    question: torch.Tensor
    answers: tuple[str, ...]


def batches(maker: Maker, task: str, n: int, device: str) -> Iterator[Batch]:
    """The first `n` prompts of a task, those of one size together as far as they follow each other."""
    most, waiting, first = max(1, BATCH_TOKENS // maker.length), [], 0
    for number in range(n):
        prompt = maker.make(task, number)
        if waiting and (len(waiting) == most or len(prompt.question) != len(waiting[0].question)):
            yield _batch(task, first, waiting, device)
            waiting, first = [], number
        waiting.append(prompt)
    yield _batch(task, first, waiting, device)


def _batch(task: str, first: int, prompts: list[Prompt], device: str) -> Batch:
    text, question = (
        torch.from_numpy(np.stack(rows)).to(device)
        for rows in ([p.text for p in prompts], [p.question for p in prompts])
    )
    return Batch(task, first, text, question, tuple(p.answer for p in prompts))


@torch.inference_mode()
def answer(
    model: PreTrainedModel, cache: MethodCache, logits: torch.Tensor, question: torch.Tensor | None
) -> torch.Tensor:
    """Greedy tokens int64 [batch, SPOKEN] after what a cache has read.

    Args:
        logits: [batch, vocabulary] of the token that comes next.
        question: int64 [batch, m] to be read first. From then on the cache only grows: no method acts on it.
    """
    if question is not None:
        cache.freeze()
        logits = model(question, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    said = [logits.argmax(-1, keepdim=True)]
    while len(said) < SPOKEN:
        logits = model(said[-1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        said.append(logits.argmax(-1, keepdim=True))
    return torch.cat(said, 1)


class Bench:
    """A model and its prompts; batches are read once and answered by every cell.

    Args:
        cells: (method, budget), as `cells_of` gives them.
        n: prompts per task.

    Raises:
        ValueError: prompts longer than the model knows, or a text shorter than they are.
    """

    def __init__(self, board: Board, cells: Sequence[Cell], n: int, device: str) -> None:
        self.board, self.n, self.device = board, n, device
        self.cells: dict[Cell, Method] = {cell: resolve_method(*cell) for cell in cells}
        self.model, self.tokenizer = load_text_model(board.model, device, board.dtype)
        check_positions(self.model, board.length, SPOKEN)
        self.maker = Maker(self.tokenizer, board.length, Path(board.text) if board.text else None)

    def run(self, outcomes: Outcomes) -> Iterator[Outcome]:
        """Everything that `outcomes` lacks, batch after batch; each outcome is added as soon as it is there."""
        for batch in self.batches():
            size = len(batch.answers)
            for asked in self.board.asked:
                missing = [c for c in self.cells if not outcomes.has(c, batch.task, asked, batch.first, size)]
                for outcome in self._answers(batch, asked, missing) if missing else ():
                    outcomes.add(outcome)
                    yield outcome

    def batches(self) -> Iterator[Batch]:
        """All batches, the tasks by turns: what is done of a run that was stopped says something about each."""
        rounds = zip_longest(*(batches(self.maker, task, self.n, self.device) for task in self.board.tasks))
        return (batch for of_tasks in rounds for batch in of_tasks if batch is not None)

    def _answers(self, batch: Batch, asked: str, cells: Sequence[Cell]) -> Iterator[Outcome]:
        later = batch.question if asked == UNKNOWN else None
        prompts = batch.text if asked == UNKNOWN else torch.cat([batch.text, batch.question], 1)
        reading = Reading(self.model, prompts, [self.cells[cell] for cell in cells])
        for cell in cells:
            try:
                cache, logits = self._read(reading, prompts, self.cells[cell])
                said = answer(self.model, cache, logits, later)
            except ValueError as error:  # a budget that leaves a method no slot, a head size that it cannot pack
                yield Outcome(*cell, batch.task, asked, batch.first, [], [], {}, str(error))
                continue
            told = self.tokenizer.batch_decode(said, skip_special_tokens=True)
            scores = [score(text, wanted) for text, wanted in zip(told, batch.answers, strict=True)]
            right, digits = [whole for whole, _ in scores], [share for _, share in scores]
            figures = held(cache, len(prompts)) | {"tokens_seen": prompts.shape[1]}
            # Only a method that retrieves compares; its answer is over by now.
            looked = scanned(cache.context)
            figures |= {} if looked is None else {"scanned": looked}
            # A cache and its layers know each other: emptied, they hold no memory until the collector comes.
            cache.reset()
            yield Outcome(*cell, batch.task, asked, batch.first, right, digits, figures)
        reading.close()

    def _read(self, reading: Reading, prompts: torch.Tensor, method: Method) -> tuple[MethodCache, torch.Tensor]:
        """The cache after the prompt, and the logits of the next token."""
        try:
            return reading.open(method), reading.logits
        except ReadsItself:
            cache = MethodCache(self.model, method)
            with torch.inference_mode():
                return cache, self.model(prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()

    def left(self, outcomes: Outcomes) -> int:
        """How many outcomes are still to come."""
        keys = ((cell, batch, asked) for batch in self.batches() for asked in self.board.asked for cell in self.cells)
        return sum(not outcomes.has(cell, b.task, asked, b.first, len(b.answers)) for cell, b, asked in keys)


def lines(rows: Sequence[dict[str, Any]], asked: str, tasks: Sequence[str]) -> list[list[str]]:
    """The table of one way of asking, heads first: shares of right answers, right digits, questions, and bytes as
    shares of the full cache's."""
    told = [["method", "budget", *tasks, ALL, "95 %", "digits", "n", "bytes of full", "on the host", "scanned"]]
    mine = [row for row in rows if row["asked"] == asked]
    for cell in dict.fromkeys((row["method"], row["budget"]) for row in mine):
        at = {row["task"]: row for row in mine if (row["method"], row["budget"]) == cell}
        if ALL not in at:
            told.append([*cell, "refused", *[""] * (len(told[0]) - 3)])
            continue
        whole = at[ALL]
        shares = [f"{at[task]['recall']:.2f}" if task in at else "-" for task in (*tasks, ALL)]
        interval = f"{whole['low']:.2f}-{whole['high']:.2f}"
        told.append([*cell, *shares, interval, f"{whole['digits']:.2f}", str(whole["n"])])
        host = f"{whole['host_bytes'] / whole['kv_bytes_full']:.3f}" if whole.get("host_bytes") else ""
        told[-1] += [f"{whole['kv_share']:.3f}", host, f"{whole['scanned']:.3f}" if "scanned" in whole else ""]
    return told


def title(asked: str) -> str:
    """What a table shows."""
    return f"answers right in every digit, question {asked} to the cache"


def table(rows: Sequence[dict[str, Any]], asked: str, tasks: Sequence[str]) -> Table:
    """`lines` for a terminal."""
    heads, *cells = lines(rows, asked, tasks)
    made = Table(*heads, title=title(asked))
    for cell in cells:
        made.add_row(*cell)
    return made


def markdown(rows: Sequence[dict[str, Any]], board: Board, command: str) -> str:
    """All tables as Markdown, with the command that prints them."""
    told = [f"`{command}`"]
    for asked in board.asked:
        heads, *cells = lines(rows, asked, board.tasks)
        told += ["", f"{title(asked).capitalize()}; n prompts of {board.length:,} tokens in a row:", ""]
        told += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        told += [f"| {' | '.join([f'`{cell[0]}`', *cell[1:]])} |" for cell in cells]
    return "\n".join(told) + "\n"


def measure(bench: Bench, outcomes: Outcomes, path: Path, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows; `path` is written anew after every batch of questions."""
    board, last = bench.board, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def write() -> list[dict[str, Any]]:
        rows = outcomes.rows(bench.cells, board.tasks, board.asked, bench.n)
        write_rows(path, meta, rows)
        return rows

    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        progress = bar.add_task("cells", total=bench.left(outcomes))
        for outcome in bench.run(outcomes):
            bar.update(progress, advance=1, description=f"{outcome.task}, {outcome.asked}")
            batch = outcome.task, outcome.asked, outcome.first
            if last not in (None, batch):
                write()
            last = batch
    return write()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.board", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP)
    p.add_argument(
        "--methods", type=methods("all", PREFIX), default="all", help="comma-separated: all, methods, compositions"
    )
    p.add_argument("--budgets", type=budgets, default="0.5,0.25,0.1", help="comma-separated shares, or tokens as 64t")
    add_choice(p, "tasks", TASKS)
    add_choice(p, "asked", (KNOWN, UNKNOWN), ": is the question there when it cuts?")
    p.add_argument(
        "--length", type=token_count, default=1024, help="tokens of a prompt, question included (default 1024)"
    )
    p.add_argument("--n", type=question_count, default=48, help="prompts per task (default 48)")
    p.add_argument("--text", type=text_file, help="text whose lines stand between the facts; default: plain sentences")
    add_dtype(p)
    add_outputs(p, "markdown", when="; gone on with if it exists", default="runs/board.json", beside=(".jsonl",))
    return p


def board_of(args: argparse.Namespace) -> tuple[Board, list[Cell]]:
    """What the command line asks for.

    Raises:
        ValueError: an unknown or impossible value.
        FileNotFoundError: no such model or text.
    """
    asked = [x for name in args.methods for x in (list_methods() if name == "all" else [name])]
    if theirs := [name for name in asked if name.startswith(PREFIX)]:
        raise ValueError(f"{theirs[0]}: caches of transformers read their own prompts; see python -m eval.leaderboard")
    cells = cells_of(asked, args.budgets)
    check_model(args.model)
    text = str(args.text) if args.text else None
    return Board(args.model, tuple(args.tasks), tuple(args.asked), args.length, text, args.dtype), cells


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.board", parser(), work, argv, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what is missing and print the board."""
    board, cells = board_of(args)
    # Tasks and ways of asking, like methods and questions, may be added to what a file holds already.
    said = {name: value for name, value in asdict(board).items() if name not in ("tasks", "asked")}
    outcomes = Outcomes(args.json.with_suffix(".jsonl"), said)
    meta = run_meta("eval.board", argv, SEED, board=said)
    rows = measure(Bench(board, cells, args.n, args.device), outcomes, args.json, meta)
    for asked in board.asked:
        Console(width=None if sys.stdout.isatty() else 200).print(table(rows, asked, board.tasks))
    if args.markdown:
        write_text(args.markdown, markdown(rows, board, meta["command"]))
    for row in rows:
        if row["task"] == "refused":
            print(f"refused: {row['method']} at {row['budget']}, question {row['asked']}: {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
