"""`python -m eval.rag --model smollm2`: answers with no search, one, one every so many tokens, and by ATLAS.

Two-hop questions about an invented world, whose second fact is named only by the first (fixed seed), or questions of
your own about a folder of documents: `--documents DIR --questions FILE`, a line of JSON each: {"question": ..,
"answer": ..}. Every method has the same examples, the same index and the same number of passages per search; theta is
a quantile of scores in answers to questions of another world. A row says: `accuracy` (the answer's words stand in
what was said), `retrievals`, `tokens` (read and written, all that was computed, but for the examples, which are read
once) and `seconds` of CPU time, all per question; `accuracy_change` and `retrievals_change` are differences to `fixed`
on the same questions, with paired 95 % intervals. Every answer is written to FILE.jsonl as soon as it is there; the
same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from textkv import models
from textkv.arguments import method
from textkv.command import (
    count,
    finite,
    fraction,
    question_count,
    readable_folder,
    run,
    seed,
    some_text,
    text_file,
    token_count,
    write_rows,
)
from textkv.intervals import wilson
from textkv.provenance import run_meta
from textkv.rag import Index, Reader, read_folder
from textkv.rag.atlas import QUANTILE, Atlas, calibrated
from textkv.rag.dynamic import DynamicReader, Interval, Limits, Never, Policy
from textkv.rag.index import words_of
from textkv.rag.invented import World
from textkv.rag.trigger import MODES, Trigger
from textkv.records import parse, read_text

from .arguments import add_choice, add_outputs
from .bootstrap import resampled
from .outcomes import Store
from .paired import difference
from .textbench import MODEL_HELP

BASELINE = "fixed"  # what the others are compared with
METHODS = ("none", "single", "fixed", *(f"atlas-{mode}" for mode in MODES))
WORDS = 3  # of a query by ATLAS: with the paper's six, BM25 finds once more what was read already
EXAMPLES, CALIBRATION = 1_000_003, 1_000_007  # seeds of their worlds
_EXAMPLES, _CALIBRATED = 4, 4


@dataclass(frozen=True)
class Asked:
    """A question and the words that answer it."""

    question: str
    answer: str


def right(said: str, answer: str) -> float:
    """1.0 where the answer's words stand together in what was said last: after "the answer is", if it was said."""
    last = re.split(r"answer is", said, flags=re.IGNORECASE)[-1]
    return float(f" {' '.join(words_of(answer))} " in f" {' '.join(words_of(last))} ")


def examples(first: int = EXAMPLES) -> str:
    """Answered questions of two facts each, from a world of their own, in the form of the questions to come. Two have
    the first passage only: an answer goes on although the passages end."""
    shown = []
    for number, story in enumerate(World.drawn(first).stories[:_EXAMPLES]):
        question = list(story.double())[number % 2]
        lines = [f"[{n}] {fact}" for n, fact in enumerate(question.steps[: 1 + number // 2], 1)]
        lines += [
            f"Question: {question.text}",
            f"Answer: {' '.join(question.steps)} So the answer is {question.answer}.",
        ]
        shown.append("\n".join(lines))
    return "\n\n".join([*shown, ""]) + "\n"


def own_questions(path: Path) -> list[Asked]:
    """Lines of JSON with a question and an answer.

    Raises:
        ValueError: a line that is something else, or no line.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                row = parse(line)
                found.append(Asked(str(row["question"]), str(row["answer"])))
            except (ValueError, TypeError, KeyError):
                told = 'write {"question": "..", "answer": ".."}'
                raise ValueError(f"line {number} of {path} is no question with an answer; {told}") from None
    if not found:
        raise ValueError(f"{path} holds no question; write one a line, as JSON")
    return found


@dataclass
class Bench:
    """What all methods share: the model, the index, the limits, and the form of the prompt."""

    reader: Reader
    index: Index
    args: argparse.Namespace

    def with_policy(self, policy: Policy, searching: bool = True) -> DynamicReader:
        """A reader of this policy."""
        limits = Limits(passages=self.args.passages, most=self.args.tokens, searches=self.args.searches)
        return DynamicReader(
            self.reader, self.index if searching else None, policy, limits,
            preamble=examples(), asked="", begun="Answer:", template=False, stop="\n",
        )  # fmt: skip

    def theta(self, mode: str) -> float:
        """Of one reading, from questions of another world, or of the documents' own first questions."""
        world = World.drawn(CALIBRATION)
        bench = Bench(self.reader, Index.build(world.chunks(), self.index.embedder), self.args)
        notes = bench.with_policy(self._atlas(mode, inf))
        asked = [question.text for question in world.questions(2)[:_CALIBRATED]]
        return calibrated(notes, asked, self.args.quantile)

    def method(self, name: str) -> tuple[DynamicReader, dict[str, float]]:
        """The reader of a method, and what was measured to build it."""
        if name == "none":
            return self.with_policy(Never(), searching=False), {}
        if name == "single":
            return self.with_policy(Never()), {}
        if name == "fixed":
            return self.with_policy(Interval(self.args.interval)), {"interval": self.args.interval}
        mode = name.partition("-")[2]
        theta = self.theta(mode) if self.args.theta is None else self.args.theta
        return self.with_policy(self._atlas(mode, theta)), {"theta": theta}

    def _atlas(self, mode: str, theta: float) -> Atlas:
        return Atlas(Trigger(mode=mode, theta=theta), draft=self.args.interval, words=self.args.words)


@dataclass(frozen=True)
class Said:
    """One answer of one method, with what it cost."""

    method: str
    number: int
    right: float
    text: str
    queries: list[str]
    passages: int
    prefill_tokens: int
    decode_tokens: int
    seconds: float
    figures: dict[str, float]

    @property
    def key(self) -> tuple[str, int]:
        """What tells answers apart."""
        return self.method, self.number


class Answers(Store):
    """The answers of one setting."""

    kind = Said

    def rows(self, methods: Sequence[str], n: int) -> list[dict[str, Any]]:
        """A row per method over the first n questions; those of cost are means over the questions."""
        found = [[x for x in self.done.values() if x.method == method and x.number < n] for method in methods]
        by = {x.number: x for x in self.done.values() if x.method == BASELINE and x.number < n}
        return [_row(part) | (_compared(part, by) if BASELINE in methods else {}) for part in found if part]


def _row(part: Sequence[Said]) -> dict[str, Any]:
    n, rights = len(part), sum(x.right for x in part)
    low, high = wilson(round(rights), n)
    row = {"method": part[0].method, "accuracy": rights / n, "low": low, "high": high, "n": n}
    row["retrievals"] = sum(len(x.queries) for x in part) / n
    for name in ("passages", "prefill_tokens", "decode_tokens", "seconds"):
        row[name] = sum(getattr(x, name) for x in part) / n
    return row | {"tokens": row["prefill_tokens"] + row["decode_tokens"]} | part[0].figures


def _compared(part: Sequence[Said], baseline: Mapping[int, Said]) -> dict[str, float]:
    """Accuracy and retrievals minus those of `fixed` on the questions that both answered, 95 %, paired; nothing for
    `fixed` itself and where no question was answered by both."""
    pairs = [(x, baseline[x.number]) for x in part if x.number in baseline and x.method != BASELINE]
    if not pairs:
        return {}
    ours, theirs = ({x.number: bool(x.right) for x in side} for side in zip(*pairs, strict=True))
    rights = difference(ours, theirs)[:3]
    searches = resampled(np.array([len(x.queries) - len(y.queries) for x, y in pairs], dtype=float))
    names = ("change", "change_low", "change_high")
    made = {f"accuracy_{name}": value for name, value in zip(names, rights, strict=True)}
    return made | {f"retrievals_{name}": value for name, value in zip(names, searches, strict=True)}


def measure(bench: Bench, asked: Sequence[Asked], methods: Sequence[str], answers: Answers) -> Iterator[Said]:
    """Every answer that is not there yet, all methods question by question, so that a run cut short compares like with
    like."""
    readers: dict[str, tuple[DynamicReader, dict[str, float]]] = {}
    for number, one in enumerate(asked):
        for name in methods:
            if (name, number) in answers.done:
                continue
            if name not in readers:
                readers[name] = bench.method(name)
            reader, figures = readers[name]
            begin = time.process_time()
            got = reader.ask(one.question)
            took = time.process_time() - begin
            said = Said(
                name, number, right(got.text, one.answer), got.text, list(got.queries), len(got.passages),
                got.prefill_tokens, got.tokens, took, figures,
            )  # fmt: skip
            answers.add(said)
            yield said


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per method."""
    made = Table("method", "accuracy", "95 %", "n", "retrievals", "tokens", "seconds")
    for row in rows:
        made.add_row(
            row["method"], f"{row['accuracy']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}", str(row["n"]),
            f"{row['retrievals']:.2f}", f"{row['tokens']:.0f}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.rag", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="smollm2", help=MODEL_HELP)
    add_choice(p, "methods", METHODS)
    p.add_argument("--documents", type=readable_folder, help="a folder of .txt and .md files, with --questions")
    p.add_argument("--questions", type=text_file, help="lines of JSON with a question and its answer")
    p.add_argument("--n", type=question_count, default=24, help="questions of the invented world")
    p.add_argument("--stories", type=question_count, default=16, help="chains of three facts in it")
    p.add_argument("--seed", type=seed, default=0, help="of the invented world")
    p.add_argument(
        "--embedder", type=some_text, default="bm25", help="bm25, minilm, a folder, a hub id, or module:Class"
    )
    p.add_argument("--cache", type=method, default="full", help="method of the cache, e.g. 'critic'")
    p.add_argument("--budget", type=fraction, help="share of the tokens that the cache keeps")
    p.add_argument("--passages", type=count, default=1, help="of one search")
    p.add_argument("--searches", type=count, default=5, help="in one answer, at most")
    p.add_argument("--interval", type=count, default=8, help="tokens between two searches of `fixed`, and of a draft")
    p.add_argument("--words", type=count, default=WORDS, help=f"of a query by ATLAS, at most (default {WORDS})")
    p.add_argument("--quantile", type=fraction, default=QUANTILE, help="of the scores of unsure words, for theta")
    p.add_argument("--theta", type=finite, help="of both readings, instead of the quantile")
    p.add_argument("--tokens", type=token_count, default=48, help="of an answer, at most")
    add_outputs(p, when=", after every answer", default="runs/rag.json", beside=(".jsonl",))
    return p


def work(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, write and print."""
    if (args.documents is None) != (args.questions is None):
        raise ValueError("--documents and --questions belong together: answers to them must be known")
    if args.documents:
        chunks, asked = read_folder(args.documents), own_questions(args.questions)
    else:
        world = World.drawn(args.seed, args.stories)
        chunks = world.chunks()
        asked = [Asked(question.text, question.answer) for question in world.questions(2)[: args.n]]
    given = {name: str(value) for name, value in vars(args).items() if name not in ("methods", "n", "json", "device")}
    if args.documents:  # the same names may hold other texts by now
        said = "\n".join(repr(one) for one in [*chunks, *asked])
        given["texts"] = hashlib.sha256(said.encode()).hexdigest()[:16]
    answers = Answers(args.json.with_suffix(".jsonl"), given)
    index = Index.build(chunks, args.embedder)
    model, tokenizer = models.load(args.model, device=args.device)
    bench = Bench(Reader(model, tokenizer, args.cache, args.budget), index, args)
    meta = run_meta("eval.rag", argv, args.seed)
    for said in measure(bench, asked, args.methods, answers):
        print(
            f"{said.method} {said.number}: {said.right:.0f} {said.text!r} {said.queries}", file=sys.stderr, flush=True
        )
        write_rows(args.json, meta, answers.rows(args.methods, len(asked)))
    rows = answers.rows(args.methods, len(asked))
    write_rows(args.json, meta, rows)
    Console().print(table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.rag", parser(), work, argv, kept="the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
