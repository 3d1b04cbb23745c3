"""`python -m eval.conversations --model smollm2`: what is left of a long conversation under a fixed budget.

Every method reads each conversation block by block, and never holds more than its budget and a block; the questions
come afterwards, and no cache changes by them. `epicache` keeps a cache for each topic and picks one for each question;
other methods (`snapkv`, `window`, any composition) compress the one that they have after every block; `full` keeps all.

Every conversation is written to FILE.jsonl as soon as a method has answered it; the same command goes on there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from textkv import Budget, MethodCache, resolve_method
from textkv.arguments import budgets, methods
from textkv.command import count, lengths, question_count, run, some_text, text_file, token_count, write_rows
from textkv.models.embedder import Embedder
from textkv.provenance import run_meta
from textkv.reuse.chat import ends
from textkv.reuse.epicache import EpiCache, Settings, own_vectors
from textkv.reuse.epicache.prompts import Prompts

from .arguments import add_dtype, add_outputs
from .dialogues import DIGITS, SEED, Question, Talk, generate, graded, read_talks
from .outcomes import Outcome, Outcomes
from .textbench import MODEL_HELP, check_model, load_text_model

EPICACHE, FULL, OWN = "epicache", "full", "own"
SINKS = 4  # first tokens behind the system prompt that epicache never drops
LATER = "unknown"  # questions come when the cache has been compressed


@dataclass(frozen=True)
class Board:
    """What is measured: settings that change every figure."""

    model: str
    block: int
    probe: int
    episodes: int
    embedder: str
    data: str | None
    questions: int
    level: str
    dtype: str | None


class Reader:
    """A model that answers questions about conversations by one method after another.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_text_model(args.model, args.device, args.dtype)
        self.prompts = Prompts(self.tokenizer)
        self._least = SINKS + len(self.prompts.before) + 1
        self._ends = ends(self.model, self.tokenizer)
        name = args.embedder
        self._embed = own_vectors(self.model, self.tokenizer) if name == OWN else Embedder.load(name).embed

    def talks(self, tokens: int) -> list[Talk]:
        """The conversations of one length, or those of the file."""
        if self.args.data:
            return [talk for talk in read_talks(self.args.data) if talk.questions][: self.args.conversations]
        numbers = range(self.args.conversations)
        return [generate(self.tokenizer, tokens, number, self.args.questions) for number in numbers]

    def entries(self, talk: Talk, budget: str) -> int:
        """How many tokens a head keeps of a conversation: of a short one a share may be less than what always stays,
        the system prompt and the sinks, and one token more."""
        return max(Budget.parse(budget).count(len(self.prompts.history(talk.turns))), self._least)

    def answers(self, method: str, budget: str, talk: Talk) -> tuple[list[str], dict[str, float]]:
        """What is said to each question, and what was held."""
        run = self._by_episodes if method == EPICACHE else self._by_blocks
        return run(method, self.entries(talk, budget), talk)

    @torch.inference_mode()
    def _by_blocks(self, method: str, entries: int, talk: Talk) -> tuple[list[str], dict[str, float]]:
        begun = perf_counter()
        cache = MethodCache(self.model, method, None if method == FULL else f"{entries}t")
        ids = torch.tensor([self.prompts.history(talk.turns)], device=self.model.device)
        for block in ids.split(self.args.block, 1):
            self.model(block, past_key_values=cache, logits_to_keep=1)
        figures = _figures(cache, cache.peak_bytes, perf_counter() - begun)
        cache.freeze()
        # A copy for each question: some methods cannot take tokens back.
        return [self._say(cache.fork(), question) for question in talk.questions], figures

    def _say(self, cache: MethodCache, question: Question) -> str:
        given, said = list(self.prompts.question(question.text, question.begun)), []
        while len(said) < self.args.max_new:
            ids = torch.tensor([given], device=self.model.device)
            token = int(self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
            if token in self._ends:
                break
            said.append(token)
            given = [token]
        cache.reset()
        return self.tokenizer.decode(said)

    def _by_episodes(self, method: str, entries: int, talk: Talk) -> tuple[list[str], dict[str, float]]:
        args, begun = self.args, perf_counter()
        settings = Settings(
            entries, args.block, args.episodes, probe=min(args.probe, args.block), sinks=SINKS, level=args.level
        )
        with TemporaryDirectory() as folder:
            memory = EpiCache(self.model, self.tokenizer, self._embed, settings, folder)
            memory.read(talk.turns)
            seconds = perf_counter() - begun
            said = [memory.ask(x.text, args.max_new, x.begun).text for x in talk.questions]
            cache = memory.cache_of(memory.episodes[0])
            figures = _figures(cache, memory.peak_bytes, seconds) | {"episodes": len(memory.episodes)}
        return said, figures


def _figures(cache: MethodCache, peak: int, seconds: float) -> dict[str, float]:
    return {
        "kv_bytes": cache.kv_bytes(), "kv_bytes_full": cache.full_bytes(), "kv_bytes_peak": peak,
        "tokens_seen": cache.tokens_seen, "seconds_prefill": seconds,
    }  # fmt: skip


def measure(reader: Reader, cells: Sequence[tuple[str, str]], lengths: Sequence[int], outcomes: Outcomes) -> Iterator:
    """Everything that `outcomes` lacks, conversation after conversation, so that a run that was stopped says something
    about each method; yields after each."""
    for tokens in lengths:
        first = 0
        for talk in reader.talks(tokens):
            todo = [c for c in cells if not outcomes.has(c, str(tokens), LATER, first, len(talk.questions))]
            for cell in track(todo, f"{tokens} tokens, from question {first}", console=Console(stderr=True)):
                said, figures = reader.answers(*cell, talk)
                marks = [graded(text, question) for text, question in zip(said, talk.questions, strict=True)]
                right, scores = [x for x, _ in marks], [x for _, x in marks]
                outcomes.add(Outcome(*cell, str(tokens), LATER, first, right, scores, figures))
                yield
            first += len(talk.questions)


def rows_of(cells: Sequence[tuple[str, str]], lengths: Sequence[int], outcomes: Outcomes, n: int) -> list[dict]:
    """One row per method, budget and length: `accuracy` is the share of right answers, `score` the mean of what each
    earned (digits in place, or F1 of words)."""
    tasks = [str(tokens) for tokens in lengths]
    made = []
    for row in outcomes.rows(cells, tasks, (LATER,), n):
        if row["task"] in tasks:
            told = {k: v for k, v in row.items() if k not in ("task", "asked", "recall", "digits")}
            told |= {"tokens": int(row["task"]), "accuracy": row["recall"], "score": row["digits"]}
            made.append(told)
    return made


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    made = Table(
        "method", "budget", "tokens", "n", "accuracy", "95 %", "score", "MB", "peak MB", "full MB", "s to read"
    )
    for x in rows:
        made.add_row(
            x["method"], x["budget"], str(x["tokens"]), str(x["n"]), f"{x['accuracy']:.2f}",
            f"{x['low']:.2f}-{x['high']:.2f}", f"{x['score']:.2f}", f"{x['kv_bytes'] / 1e6:.1f}",
            f"{x['kv_bytes_peak'] / 1e6:.1f}", f"{x['kv_bytes_full'] / 1e6:.1f}", f"{x['seconds_prefill']:.1f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.conversations", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="smollm2", help=MODEL_HELP)
    p.add_argument(
        "--methods", type=methods(EPICACHE), default="full,window,snapkv,epicache", help="epicache, any method"
    )
    p.add_argument(
        "--budgets",
        type=budgets,
        default="0.25,0.1667",
        help="shares, or tokens as 256t (default 4x, 6x)",
    )
    p.add_argument(
        "--tokens",
        type=lengths,
        default="2048",
        help="lengths of generated conversations (default 2048)",
    )
    p.add_argument("--conversations", type=question_count, default=4, help="of each length (default 4)")
    p.add_argument("--questions", type=question_count, default=8, help="about each generated one (default 8)")
    p.add_argument("--data", type=text_file, help="LoCoMo or LongMemEval JSON in place of generated conversations")
    p.add_argument("--block", type=count, default=256, help="tokens read at a time (default 256)")
    p.add_argument("--probe", type=count, default=128, help="epicache: most tokens of a probe (default 128)")
    p.add_argument("--episodes", type=count, default=4, help="epicache: topics (default 4)")
    p.add_argument("--level", choices=("pair", "uniform"), default="pair", help="epicache: do heads compete?")
    p.add_argument(
        "--embedder",
        type=some_text,
        default=OWN,
        help="own: the model's token embeddings; minilm, a folder, or a hub id",
    )
    p.add_argument(
        "--max-new", type=token_count, default=DIGITS + 4, help=f"tokens of an answer (default {DIGITS + 4})"
    )
    add_dtype(p)
    add_outputs(p, when="; gone on with if it exists", default="runs/conversations.json", beside=(".jsonl",))
    return p


def checked(args: argparse.Namespace) -> tuple[Board, list[tuple[str, str]]]:
    """What is measured, and its cells.

    Raises:
        ValueError, FileNotFoundError: a value that cannot be.
    """
    cells = [(m, b) for m in args.methods for b in (["1"] if m == FULL else args.budgets)]
    for method, _ in cells:
        # Built once before anything is measured: a share stands for a number that only a conversation tells.
        resolve_method("full" if method == EPICACHE else method, "256t")
    Settings(block=args.block, probe=min(args.probe, args.block), episodes=args.episodes, level=args.level)
    check_model(args.model)
    data = str(args.data) if args.data else None
    fields = ("model", "block", "probe", "episodes", "embedder", "questions", "level", "dtype")
    board = Board(**{name: getattr(args, name) for name in fields}, data=data)
    return board, cells


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.conversations", parser(), work, argv, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what is missing and print."""
    board, cells = checked(args)
    outcomes = Outcomes(args.json.with_suffix(".jsonl"), asdict(board))
    meta = run_meta("eval.conversations", argv, SEED, board=asdict(board))
    reader = Reader(args)
    n = max(sum(len(talk.questions) for talk in reader.talks(tokens)) for tokens in args.tokens)
    for _ in measure(reader, cells, args.tokens, outcomes):
        write_rows(args.json, meta, rows_of(cells, args.tokens, outcomes, n))
    rows = rows_of(cells, args.tokens, outcomes, n)
    write_rows(args.json, meta, rows)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
