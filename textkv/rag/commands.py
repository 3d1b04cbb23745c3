"""`python -m textkv.rag`: index a folder of texts, ask it, or train a model to answer from passages.

python -m textkv.rag index DIR --out INDEX
python -m textkv.rag ask "question" --index INDEX --atlas outgoing --cache "critic(0.5)"
python -m textkv.rag train --model mini     # at the root of a checkout
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from textkv.arguments import budget, method
from textkv.command import (
    checked,
    count,
    finite,
    hand_over,
    output_folder,
    readable_folder,
    run,
    some_text,
    token_count,
)
from textkv.models.loading import load
from textkv.rag.answer import Answer, Reader
from textkv.rag.atlas import Atlas
from textkv.rag.documents import read_folder
from textkv.rag.dynamic import DynamicReader, Limits
from textkv.rag.index import Index, is_index, words_of
from textkv.rag.trigger import MODES, Trigger

TRAINING = "training.rag.train"
THETA = {"received": 0.16, "outgoing": 2.1}
"""Of `ask`: the median score of SmolLM2's unsure words in four two-hop answers; `python -m eval.rag` measures its
own."""


def question(text: str) -> str:
    """A question with a word in it. Raises ValueError for another."""
    if not words_of(text):
        raise ValueError(f"query {text!r} has no word; ask with at least one")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m textkv.rag", description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(required=True, dest="command", metavar="command")
    build = commands.add_parser("index", help="make an index of a folder of .txt and .md files")
    build.add_argument("folder", type=readable_folder, help="of documents")
    build.add_argument(
        "--out", type=output_folder(is_index, "python -m textkv.rag index"), required=True, help="folder of the index"
    )
    build.add_argument(
        "--embedder", type=some_text, default="bm25", help="bm25, minilm, a folder, a hub id, or module:Class"
    )
    build.add_argument("--words", type=token_count, default=120, help="of a chunk, at most")
    ask = commands.add_parser("ask", help="answer a question from an index")
    ask.add_argument("question", type=checked(question))
    ask.add_argument("--index", type=readable_folder, required=True, help="folder of the index")
    ask.add_argument("--embedder", type=some_text, help="refuse an index that another one built")
    ask.add_argument("--model", type=some_text, default="smollm2", help="smollm2, mini, a folder, or a hub id")
    ask.add_argument(
        "--cache", type=checked(cache), default=("full", None), help="method of the cache, e.g. critic(0.5)"
    )
    ask.add_argument("--budget", type=budget, help="share of the tokens that the cache keeps, e.g. 0.5")
    ask.add_argument("--passages", type=count, default=3, help="of one search")
    ask.add_argument("--tokens", type=token_count, default=48, help="of the answer, at most")
    ask.add_argument("--atlas", choices=("off", *MODES), default="off", help="search again where the model is unsure")
    ask.add_argument("--theta", type=finite, help="least score of a word that triggers a search (default by --atlas)")
    ask.add_argument("--searches", type=count, default=5, help="of one answer, at most, with --atlas")
    commands.add_parser("train", add_help=False, help=f"answers from passages, by rewards: python -m {TRAINING}")
    return p


def cache(text: str) -> tuple[str, float | None]:
    """A method and the share in brackets behind it, which is its budget: critic(0.5)."""
    found = re.fullmatch(r"([\w-]+)\((0?\.\d+|1\.0*)\)", text)
    return (method(found[1]), float(found[2])) if found else (method(text), None)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """One of the commands."""
    if args.command == "index":
        index = Index.build(read_folder(args.folder, args.words, args.words // 6), args.embedder)
        index.save(args.out)
        print(f"{args.out}: {len(index.chunks)} chunks, embedder {index.embedder}")
        return
    index = Index.load(args.index, args.embedder)
    name, share = args.cache
    reader = Reader(*load(args.model), cache=name, budget=share if args.budget is None else args.budget)
    answer = answered(reader, index, args)
    print(answer.text)
    for number, query in enumerate(answer.queries, 1):
        print(f"search {number}: {query}")
    for number, passage in enumerate(answer.passages, 1):
        mark = "cited" if number in answer.cited else "read"
        print(f"[{number}] {mark} {passage.chunk.source} at {passage.chunk.start} ({passage.score:.3f})")
    print(f"prefill {answer.prefill_tokens} tokens, answer {answer.tokens} tokens, cache {name}")


def answered(reader: Reader, index: Index, args: argparse.Namespace) -> Answer:
    """One search, or as many as ATLAS wants."""
    if args.atlas == "off":
        return reader.ask(args.question, index, args.passages, args.tokens)
    trigger = Trigger(mode=args.atlas, theta=THETA[args.atlas] if args.theta is None else args.theta)
    limits = Limits(passages=args.passages, most=args.tokens, searches=args.searches)
    return DynamicReader(reader, index, Atlas(trigger), limits).ask(args.question)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 and one line for a request that cannot be carried out."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:  # its options are the trainer's own
        return run("textkv.rag", argparse.ArgumentParser(), lambda *_: hand_over(TRAINING, argv[1:]), [])
    return run("textkv.rag", parser(), work, argv)
