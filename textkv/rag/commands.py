"""`python -m textkv.rag index DIR --out INDEX` and `python -m textkv.rag ask "question" --index INDEX`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from textkv.command import budget, checked, count, method, output_folder, readable_folder, run, some_text
from textkv.models.loading import load
from textkv.rag.answer import Reader
from textkv.rag.documents import read_folder
from textkv.rag.index import Index, is_index, words_of


def question(text: str) -> str:
    """A question with a word in it. Raises ValueError for another."""
    if not words_of(text):
        raise ValueError(f"query {text!r} has no word; ask with at least one")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m textkv.rag", description=__doc__)
    commands = p.add_subparsers(required=True, dest="command", metavar="command")
    build = commands.add_parser("index", help="make an index of a folder of .txt and .md files")
    build.add_argument("folder", type=readable_folder, help="of documents")
    build.add_argument(
        "--out", type=output_folder(is_index, "python -m textkv.rag index"), required=True, help="folder of the index"
    )
    build.add_argument(
        "--embedder", type=some_text, default="bm25", help="bm25, minilm, a folder, a hub id, or module:Class"
    )
    build.add_argument("--words", type=count, default=120, help="of a chunk, at most")
    ask = commands.add_parser("ask", help="answer a question from an index")
    ask.add_argument("question", type=checked(question))
    ask.add_argument("--index", type=readable_folder, required=True, help="folder of the index")
    ask.add_argument("--embedder", type=some_text, help="refuse an index that another one built")
    ask.add_argument("--model", type=some_text, default="smollm2", help="smollm2, mini, a folder, or a hub id")
    ask.add_argument("--cache", type=method, default="full", help="method of the cache, e.g. critic")
    ask.add_argument("--budget", type=budget, help="share of the tokens that the cache keeps, e.g. 0.5")
    ask.add_argument("--passages", type=count, default=3)
    ask.add_argument("--tokens", type=count, default=48, help="of the answer, at most")
    return p


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """One of the commands."""
    if args.command == "index":
        index = Index.build(read_folder(args.folder, args.words, args.words // 6), args.embedder)
        index.save(args.out)
        print(f"{args.out}: {len(index.chunks)} chunks, embedder {index.embedder}")
        return
    index = Index.load(args.index, args.embedder)
    reader = Reader(*load(args.model), cache=args.cache, budget=args.budget)
    answer = reader.ask(args.question, index, args.passages, args.tokens)
    print(answer.text)
    for number, passage in enumerate(answer.passages, 1):
        mark = "cited" if number in answer.cited else "read"
        print(f"[{number}] {mark} {passage.chunk.source} at {passage.chunk.start} ({passage.score:.3f})")
    print(f"prefill {answer.prefill_tokens} tokens, answer {answer.tokens} tokens, cache {args.cache}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 and one line for a request that cannot be carried out."""
    return run("textkv.rag", parser(), work, argv)
