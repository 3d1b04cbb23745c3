"""`python -m eval.multiagent --model smollm2`: agents that read the same things, and what sharing their KV costs.

A team answers questions about a few documents, each asked about several times in random order. Every request goes
through all engines: `dense` (every prompt read anew), `prefix` (shared text first, plain prefix reuse: exact, but
another prompt), `recompute` (bases put together, 15 % of the tokens read again), `kvcomm` (anchors and offsets, only
the last token read) and `kvcomm-fresh` (the last tokens read: the question and the answers of others).

`reuse` is the share of calls on the short way, `unchanged` the share of calls that answer as the dense team did, and
`ttft_ratio` the dense team's time to first tokens over the engine's, reading texts by themselves included. The same
command goes on behind the teams and lengths that its file has wholly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.command import (
    count,
    fraction,
    lengths,
    natural,
    numbers,
    positive,
    question_count,
    run,
    some_text,
    token_count,
    write_rows,
)
from textkv.intervals import wilson
from textkv.mini.filler import sentences
from textkv.mini.words import KEYS
from textkv.provenance import run_meta
from textkv.reuse.kvcomm import Call, Criteria, Dense, KVComm, Prefix, Recompute, Team

from .arguments import add_choice, add_dtype, add_outputs
from .finished import finished
from .ruler import DIGITS, SEED
from .textbench import MODEL_HELP, check_model, load_text_model

FACTS = 6  # of a document
FACT_TOKENS = 16  # of one, at most, by a tokenizer that knows its words
SPOKEN = DIGITS + 4
BEGUN = "The secret number is"
ROLES = {
    "reader": "You are the reader of a team. You look a number up in the document and say it.",
    "checker": "You are the checker of a team. You trust nobody, look into the document yourself and say the number.",
    "archivist": "You are the archivist of a team. You know where things stand in a document and name them exactly.",
    "editor": "You are the editor of a team. You compare what others said with the document, and say what is right.",
    "judge": "You are the judge of a team. Yours is the last word: you say the number that the document gives.",
}
TOPOLOGIES: dict[str, Callable[..., Team]] = {"chain": Team.chain, "star": Team.star, "full": Team.full}
DENSE, PREFIX, RECOMPUTE, KVCOMM, FRESH = "dense", "prefix", "recompute", "kvcomm", "kvcomm-fresh"
METHODS = (DENSE, PREFIX, RECOMPUTE, KVCOMM, FRESH)
ESTIMATING = (KVCOMM, FRESH)


@dataclass(frozen=True)
class Request:
    """A question about a document, and the number that answers it."""

    document: str
    question: str
    answer: str


@dataclass(frozen=True)
class Workload:
    """What a team is asked: `requests` questions about `documents` texts of about `shared` tokens, each about another
    fact of its document; short documents hold fewer facts."""

    shared: int
    documents: int
    requests: int

    def __post_init__(self) -> None:
        most = self.documents * self.facts
        if min(self.documents, self.requests) < 1 or self.requests > most:
            raise ValueError(
                f"{self.requests} requests about {self.documents} documents of {self.shared} tokens: give at least 1 "
                f"of each; a document holds a fact for each {FACT_TOKENS} tokens, {FACTS} at most, so that these "
                f"allow {most} requests"
            )

    @property
    def facts(self) -> int:
        """Of one document."""
        return min(FACTS, self.shared // FACT_TOKENS)

    def make(self, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """The requests, in a random order that is always the same."""
        rng = np.random.default_rng([SEED, self.shared, self.documents])
        made = [request for _ in range(self.documents) for request in self._about_one(rng, tokenizer)]
        return [made[number] for number in rng.permutation(len(made))[: self.requests]]

    def _about_one(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        keys = rng.choice(KEYS, self.facts, replace=False).tolist()
        facts = {key: str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)) for key in keys}
        lines = [f"The secret number of the {key} is {number}." for key, number in facts.items()]
        used = sum(len(tokenizer(line, add_special_tokens=False)["input_ids"]) + 1 for line in lines)
        for words in sentences(self.shared // 4, int(rng.integers(1 << 30))):
            line = " ".join(words[:-1]).capitalize() + "."
            used += len(tokenizer(line, add_special_tokens=False)["input_ids"]) + 1
            if used > self.shared:
                break
            lines.insert(int(rng.integers(len(lines) + 1)), line)
        text = "\n".join(lines)
        return [Request(text, f"What is the secret number of the {key}?", number) for key, number in facts.items()]


class Side:
    """One engine with its team, and what it has answered so far.

    Args:
        gamma: entropy up to which a text is estimated; None = a method that estimates none.
    """

    def __init__(
        self,
        method: str,
        gamma: float | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: argparse.Namespace,
    ) -> None:
        self.method, self.gamma, self.calls = method, gamma, []
        self.engine = _engine(method, gamma, model, tokenizer, args)
        self._args = args

    def gather(self, agents: int) -> None:
        """Makes the team: the first `agents` - 1 roles and the judge."""
        names = [*list(ROLES)[: agents - 1], "judge"]
        layout = "shared" if self.method == PREFIX else "role"
        make = TOPOLOGIES[self._args.topology]
        self._team = make(self.engine, {name: ROLES[name] for name in names}, layout=layout, begun=BEGUN)

    def answer(self, asked: Request) -> None:
        """Lets the team answer a request."""
        self.calls.append(self._team.run({"document": asked.document, "question": asked.question}))

    @property
    def flat(self) -> list[Call]:
        """The calls of all requests."""
        return [call for request in self.calls for call in request]

    @property
    def seconds(self) -> float:
        """To the first tokens of all calls, reading texts by themselves included."""
        return sum(call.seconds for call in self.flat)


def sides_of(args: argparse.Namespace, methods: Sequence[str]) -> list[tuple[str, float | None]]:
    """(method, gamma) of the sides, the dense one first: methods that estimate stand there once for each gamma."""
    made = [(m, gamma) for m in (DENSE, *methods) for gamma in (args.gamma if m in ESTIMATING else (None,))]
    return list(dict.fromkeys(made))


def _engine(
    method: str,
    gamma: float | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> Dense:
    if method == RECOMPUTE:
        return Recompute(model, tokenizer, SPOKEN, share=args.share)
    if gamma is not None:
        criteria, fresh = Criteria(gamma, args.distance, args.temperature), args.fresh if method == FRESH else 1
        return KVComm(model, tokenizer, SPOKEN, criteria=criteria, most_bytes=args.pool_bytes, fresh=fresh)
    return {DENSE: Dense, PREFIX: Prefix}[method](model, tokenizer, SPOKEN)


def row(made: Side, dense: Side, requests: Sequence[Request]) -> dict[str, Any]:
    """The figures of a method beside those of the dense team."""
    pairs = list(zip(made.flat, dense.flat, strict=True))
    same = sum(a.answer.ids == b.answer.ids for a, b in pairs)
    low, high = wilson(same, len(pairs))
    right = sum(asked.answer in calls[-1].text for asked, calls in zip(requests, made.calls, strict=False))
    short = [(a, b) for a, b in pairs if a.reused]
    return {
        "method": made.method, "gamma": made.gamma, "n": len(made.calls), "calls": len(pairs),
        "reuse": len(short) / len(pairs),
        "unchanged": same / len(pairs), "low": low, "high": high,
        "unchanged_reused": sum(a.answer.ids == b.answer.ids for a, b in short) / len(short) if short else None,
        "accuracy": right / len(made.calls), "ttft_ratio": dense.seconds / made.seconds,
        "ttft_ratio_reused": sum(b.seconds for _, b in short) / sum(a.seconds for a, _ in short) if short else None,
        "seconds": made.seconds, "prompt_tokens": sum(a.tokens for a, _ in pairs),
        "computed_tokens": sum(a.computed for a, _ in pairs), "kv_bytes": getattr(made.engine, "nbytes", 0),
    }  # fmt: skip


def measure(
    args: argparse.Namespace, methods: Sequence[str], rows: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after every request: one for each method, number of agents and length; `rows` are there already.

    Every request goes through all engines before the next: what else the machine does slows all of them alike.
    """
    model, tokenizer = load_text_model(args.model, args.device, args.dtype)
    for length, agents in product(args.shared, args.agents):
        if any((row["shared"], row["agents"]) == (length, agents) for row in rows):
            continue
        requests = Workload(length, args.documents, args.requests).make(tokenizer)
        sides = [Side(*cell, model, tokenizer, args) for cell in sides_of(args, methods)]
        for side in sides:
            side.gather(agents)
        about = {"agents": agents, "topology": args.topology, "shared": length}
        now: list[dict[str, Any]] = []
        for asked in track(requests, f"{agents} agents, {length} tokens", console=Console(stderr=True)):
            for side in sides:
                side.answer(asked)
            now = [row(side, sides[0], requests) | about for side in sides]
            yield rows + now
        rows = rows + now


def crossover(rows: Sequence[dict[str, Any]], method: str, gamma: float | None = None) -> float | None:
    """The shared length at which a method's calls on the short way begin to be faster than dense ones, between the
    lengths measured; None if no two of them lie on both sides."""
    mine = [r for r in rows if (r["method"], r["gamma"]) == (method, gamma) and r["reuse"]]
    points = sorted((r["shared"], r["ttft_ratio_reused"]) for r in mine)
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if low < 1 <= high:
            return a + (b - a) * (1 - low) / (high - low)
    return None


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    heads = (
        "method",
        "gamma",
        "agents",
        "shared",
        "reuse",
        "unchanged",
        "95 %",
        "right",
        "ttft ratio",
        "of reused calls",
        "GB",
    )
    made = Table(*heads)
    for x in rows:
        reused = "-" if x["ttft_ratio_reused"] is None else f"{x['ttft_ratio_reused']:.2f}"
        made.add_row(
            x["method"], "" if x["gamma"] is None else f"{x['gamma']:g}", str(x["agents"]), str(x["shared"]),
            f"{x['reuse']:.2f}", f"{x['unchanged']:.2f}",
            f"{x['low']:.2f}-{x['high']:.2f}", f"{x['accuracy']:.2f}", f"{x['ttft_ratio']:.2f}", reused,
            f"{x['kv_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.multiagent", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="smollm2", help=MODEL_HELP)
    add_choice(p, "methods", METHODS)
    p.add_argument("--agents", type=lengths, default="4", help="comma-separated sizes of the team, 2 to 5 (default 4)")
    p.add_argument("--topology", choices=TOPOLOGIES, default="chain", help="who reads whose answer (default chain)")
    p.add_argument("--shared", type=lengths, default="1024", help="comma-separated tokens of a document (default 1024)")
    p.add_argument("--documents", type=count, default=4, help="documents (default 4)")
    p.add_argument(
        "--requests", type=question_count, default=24, help=f"questions, at most {FACTS} per document (default 24)"
    )
    p.add_argument(
        "--gamma", type=numbers, default="0.3", help="kvcomm: comma-separated entropies up to which a text is estimated"
    )
    p.add_argument("--distance", choices=("rms", "paper"), default="rms", help="kvcomm: how texts are compared")
    p.add_argument("--temperature", type=positive, help="kvcomm: of the weights; default: the distance's own")
    p.add_argument("--pool-bytes", type=natural, default=3_000_000_000, help="kvcomm: bytes of each pool (default 3e9)")
    p.add_argument("--share", type=fraction, default=0.15, help="recompute: tokens read again (default 0.15)")
    p.add_argument("--fresh", type=token_count, default=96, help="kvcomm-fresh: last tokens that are read (default 96)")
    add_dtype(p)
    add_outputs(p, when=" after every request; a team and length that are whole there are not asked again")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for a value that cannot be."""
    if wrong := [n for n in args.agents if not 2 <= n <= len(ROLES)]:
        raise ValueError(f"agents={wrong[0]}: a team has 2 to {len(ROLES)}")
    for length in args.shared:
        Workload(length, args.documents, args.requests)
    for gamma in args.gamma:
        Criteria(gamma, args.distance, args.temperature)
    check_model(args.model)


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.multiagent", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    check(args)
    board = {name: value for name, value in vars(args).items() if name not in ("json", "agents", "shared", "device")}
    meta = run_meta("eval.multiagent", argv, SEED, board=board)
    rows = finished(args.json, board, lambda row: row["n"] == args.requests)
    for now in measure(args, args.methods, rows):
        rows = now
        write_rows(args.json, meta, rows)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    for method, gamma in sides_of(args, args.methods):
        at = crossover(rows, method, gamma) if len(args.shared) > 1 else None
        if at is not None:
            name = method if gamma is None else f"{method}, gamma {gamma:g}"
            print(f"{name}: its reused calls are faster than dense ones from about {at:.0f} shared tokens on")


if __name__ == "__main__":
    sys.exit(main())
