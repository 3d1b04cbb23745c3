"""`python -m eval.perplexity`: read a text far longer than the cache, one token at a time.

What StreamingLLM (arXiv 2309.17453) and LaCache (arXiv 2507.14204) are for: the cache stays at `--cache` tokens while
the text goes on. Prints the perplexity of every stretch of the text per method; a method that streams stays flat, one
that loses its sinks or leaves the trained positions blows up. `--plot` draws the running perplexity. A method's rows
are written when it is through the text, and the same command with `--json` goes on with the methods that are missing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from textkv import MethodCache, use
from textkv.arguments import methods
from textkv.command import count, run, some_text, text_file, token_count, write_rows
from textkv.provenance import run_meta

from .arguments import add_dtype, add_outputs, checked_budget
from .curve import save
from .finished import finished
from .textbench import MODEL_HELP, load_text_model, text_rows


@torch.inference_mode()
def stream(model: PreTrainedModel, method: str, budget: str, ids: torch.Tensor, first: int) -> tuple[torch.Tensor, int]:
    """Feed `ids` int64 [1, n]: `first` tokens at once, then one by one.

    Returns (negative log-likelihoods [n - 1] in nats, bytes held at the end).
    """
    use(model)
    ids, cache = ids.to(model.device), MethodCache(model, method, budget)
    # Likelihoods at once: the logits of a long stream would weigh gigabytes.
    said = [_nll(model(ids[:, :first], past_key_values=cache).logits, ids[:, 1 : first + 1])]
    for at in track(range(first, ids.shape[1] - 1), method, console=Console(stderr=True)):
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits
        said.append(_nll(logits, ids[:, at + 1 : at + 2]))
    return torch.cat(said), cache.kv_bytes()


def _nll(logits: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[0].float(), said[0], reduction="none")


def rows_of(method: str, cache: int, nll: torch.Tensor, held: int, stretches: int) -> list[dict[str, Any]]:
    """One row per stretch of the text; "to" is the stretch's last token."""
    rows, seen = [], 0
    for part in nll.chunk(stretches):
        seen += len(part)
        row = {"method": method, "budget": f"{cache}t", "task": "stream", "to": seen, "n": len(part)}
        rows.append(row | {"perplexity": math.exp(min(part.mean().item(), 700.0)), "kv_bytes": held})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Methods down, stretches of the text across."""
    ends = sorted({row["to"] for row in rows})
    made = Table("method", *(f"to {end:,}" for end in ends), "bytes held", title="perplexity by stretch of the text")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        made.add_row(method, *(f"{row['perplexity']:.3g}" for row in mine), f"{mine[-1]['kv_bytes']:,}")
    return made


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity (log) over the text, one line per method."""
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        panel.plot([row["to"] for row in mine], [row["perplexity"] for row in mine], marker="o", label=method)
    panel.set(
        xlabel="tokens read", ylabel="perplexity", yscale="log", title=f"cache of {rows[0]['budget'][:-1]} tokens"
    )
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    save(figure, path, "eval.perplexity")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.perplexity", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP)
    p.add_argument("--methods", type=methods(), default="window,streaming_llm,lacache", help="comma-separated methods")
    p.add_argument("--cache", type=count, default=256, help="tokens to keep per layer and head (default 256)")
    p.add_argument("--tokens", type=token_count, default=8192, help="length of the text (default 8192)")
    p.add_argument("--stretches", type=count, default=8, help="parts of the text to be told apart (default 8)")
    p.add_argument("--text", type=text_file, help="its last tenth is read; default: held-out plain sentences")
    add_dtype(p)
    add_outputs(p, "plot", when=", after every method; gone on with if it exists")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.perplexity", parser(), work, argv, kept="the same command with --json goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    if args.cache >= args.tokens - 1:
        raise ValueError(f"cache={args.cache}, tokens={args.tokens}: the text must be longer than the cache")
    budget = checked_budget(args.methods, f"{args.cache}t")
    model, tokenizer = load_text_model(args.model, args.device, args.dtype)
    ids = text_rows(tokenizer, args.text, 1, args.tokens)
    board = {name: getattr(args, name) for name in ("model", "cache", "tokens", "stretches", "dtype")}
    board["text"] = args.text.name if args.text else None
    meta, rows = run_meta("eval.perplexity", argv, 0, board=board), finished(args.json, board, lambda row: True)
    for method in args.methods:
        if all(row["method"] != method for row in rows):
            rows += rows_of(method, args.cache, *stream(model, method, budget, ids, args.cache), args.stretches)
            write_rows(args.json, meta, rows)
    Console().print(table(rows))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
