"""`python -m eval.retrieval`: what an index finds of the keys that matter, and how many it compares for that.

Real keys and queries: a model reads a text, and the queries of its end search the keys before it, as decoding would;
the index was built without them. Beside these, keys and queries that are drawn from different distributions, as the
RetrievalAttention paper (arXiv 2409.10516) finds in long prompts. `recall` is of the 100 keys of largest product;
`scanned` counts keys compared, of all that are indexed; `mass` is the softmax mass on the tokens seen, `error` the
distance of the attention output from that over all tokens, relative to it; for the text both include the first 128 and
last 512 tokens, which no method retrieves. `seconds_build` is for one KV head.

Every length is written as soon as it is measured; the same command goes on behind it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from textkv import MethodCache, Needs, models, use
from textkv.command import count, natural, naturals, run, some_text, text_file, write_rows
from textkv.devices import check_room
from textkv.provenance import run_meta
from textkv.reading import NAME, Recorder
from textkv.retrievers.vectors import Vectors

from .arguments import add_outputs
from .finished import finished
from .textbench import MODEL_HELP, load_text_model, text_rows

SOUGHT = 100
FIRST, RECENT = 128, 512
SEED = 0
FIGURES = ("recall", "scanned", "mass", "error", "seconds_build")
SETTINGS = {
    "exact": (0,), "hnsw": (25, 50, 100, 200, 400), "ivf": (1, 2, 4, 8, 16, 32), "graph": (25, 50, 75, 100, 150, 200),
}  # fmt: skip
"""Indexes and how much of each is searched: nodes followed, or lists read."""


@dataclass(frozen=True)
class Head:
    """One KV head: `keys`, `values` fp32 [n, head_dim] of all tokens, of which `indexed` are searched; `training` fp32
    [nt, head_dim] the queries before them, `asking` fp32 [nq, group, head_dim] those that come after."""

    data: str
    keys: torch.Tensor
    values: torch.Tensor
    indexed: slice
    training: torch.Tensor
    asking: torch.Tensor
    scale: float


@torch.inference_mode()
def of_text(
    name: str, text: Path | None, tokens: int, layers: Sequence[int], asked: int, device: str
) -> Iterator[Head]:
    """Heads of a model that has read `tokens` tokens; `asked` of the last 256 positions ask.

    Raises:
        ValueError: too few tokens, or a layer that the model has not.
    """
    if tokens < FIRST + RECENT + 512:
        raise ValueError(f"tokens={tokens}: {FIRST} first, {RECENT} recent and 256 asking ones leave too few; use 2048")
    model, tokenizer = load_text_model(name, device)
    ids = text_rows(tokenizer, text, 1, tokens).to(model.device)
    use(model)
    cache = MethodCache(model, Recorder(asked=Needs(query_sample=1)))
    wrong = [x for x in layers if not 0 <= x < len(cache.context.layers)]
    if wrong:
        raise ValueError(f"layers: there is no layer {wrong[0]}; the model has {len(cache.context.layers)}")
    model(ids, past_key_values=cache, logits_to_keep=1)
    known = tokens - 256
    places = torch.linspace(known, tokens - 1, asked).long()
    for number in layers:
        layer = cache.context.layers[number]
        held, queries = layer.stored(), layer.notes[NAME].sampled[0].float().cpu()
        group = len(queries) // layer.kv_heads
        for head in range(layer.kv_heads):
            own = queries[head * group : (head + 1) * group]
            yield Head(
                f"{name} {tokens}", *(x[0, head, :known].float().cpu() for x in (held.keys, held.values)),
                slice(FIRST, known - RECENT), own[:, :known:4].flatten(0, 1), own[:, places].transpose(0, 1),
                layer.softmax.scale,
            )  # fmt: skip


def of_draw(n: int, asked: int, dim: int = 64, rank: int = 16) -> Iterator[Head]:
    """One head whose keys and queries share a few directions and have different means: fp32, seeded."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def cloud(count: int, latent: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return (draw(count, rank) @ latent + 0.5 * draw(count, dim)) * sizes + mean

    shared = draw(rank, dim) / rank**0.5
    own = draw(rank, dim) / rank**0.5
    # Norms with a long tail: a few keys are the nearest of many queries.
    keys = cloud(n, shared, 2 * draw(dim) / dim**0.5, (0.3 * draw(n, 1)).exp())
    mean = 6 * draw(dim) / dim**0.5
    training, asking = (cloud(count, 0.7 * shared + 0.3 * own, mean, torch.ones(1)) for count in (n // 4, asked))
    yield Head(f"drawn {n}", keys, draw(n, dim), slice(0, n), training, asking[:, None], dim**-0.5)


def built(head: Head, kind: str, degree: int) -> Vectors:
    """An index over one head."""
    keys = head.keys[head.indexed][None, None].contiguous()
    at = torch.arange(keys.shape[2], dtype=torch.int32)[None, None]
    # All query heads of the group train one index: which of them a query is of does not matter.
    queries, queries_at = head.training[None, None], torch.arange(len(head.training), dtype=torch.int32)[None]
    index = Vectors(kind, 0, degree, 1, queries, queries_at)
    index.build(keys, at, torch.device("cpu"))
    return index


def measure(head: Head, index: Vectors) -> dict[str, Any]:
    """What an index finds for the queries of one head, means over them."""
    keys = head.keys[head.indexed][None, None].contiguous()
    n, group = keys.shape[2], head.asking.shape[1]
    at = torch.arange(n, dtype=torch.int32)[None, None]
    room, sums = torch.tensor([SOUGHT]), dict.fromkeys(("recall", "scanned", "mass", "error"), 0.0)
    truth = (head.asking.flatten(0, 1) @ keys[0, 0].T).topk(SOUGHT).indices.view(-1, group, SOUGHT)
    static = torch.ones(len(head.keys), dtype=torch.bool)
    static[head.indexed] = False
    for asking, best in zip(head.asking, truth, strict=True):
        found = index.query(asking[None, :, None], room, keys, at)[0]
        sums["scanned"] += index.compared / (group * n)
        for q, slots, wanted in zip(asking, found, best, strict=True):
            slots = slots[slots >= 0]
            sums["recall"] += torch.isin(wanted, slots).float().mean().item() / group
            seen = static.clone()
            seen[slots + head.indexed.start] = True
            weights = (head.keys @ q * head.scale).softmax(0)
            mass = weights[seen].sum()
            ours, whole = weights[seen] @ head.values[seen] / mass, weights @ head.values
            sums["mass"] += mass.item() / group
            sums["error"] += ((ours - whole).norm() / whole.norm()).item() / group
    row = {"data": head.data, "index": index.kind, "effort": index.effort, "degree": index.degree}
    row |= {"n": len(head.asking), "keys": n}
    return row | {name: x / len(head.asking) for name, x in sums.items()} | {"seconds_build": index.seconds}


def rows_of(heads: Sequence[Head], degree: int) -> list[dict[str, Any]]:
    """One row for each setting: means over the heads."""
    rows = []
    for kind, efforts in SETTINGS.items():
        indexes = [built(head, kind, degree) for head in heads]
        for effort in efforts:
            for index in indexes:
                index.search_with(effort)
            mine = [measure(head, index) for head, index in zip(heads, indexes, strict=True)]
            means = {x: sum(row[x] for row in mine) / len(mine) for x in FIGURES}
            rows.append(mine[0] | means | {"heads": len(mine), "recall_least": min(row["recall"] for row in mine)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each row."""
    made = Table("data", "index", "effort", "recall@100", "worst head", "scanned", "mass", "error", "build, s")
    for row in rows:
        made.add_row(
            row["data"], row["index"], str(row["effort"]), f"{row['recall']:.3f}", f"{row['recall_least']:.3f}",
            f"{row['scanned']:.1%}", f"{row['mass']:.3f}", f"{row['error']:.3f}", f"{row['seconds_build']:.2f}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.retrieval", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=MODEL_HELP)
    p.add_argument("--tokens", type=naturals, default="2048", help="lengths of the text; 0 = only drawn keys")
    p.add_argument("--layers", type=naturals, default="0", help="layers whose heads are measured (default 0)")
    p.add_argument("--drawn", type=natural, default=20_000, help="keys of the drawn head (default 20,000; 0 = none)")
    p.add_argument("--asked", type=count, default=32, help="positions that ask (default 32)")
    p.add_argument("--degree", type=count, default=16, help="edges of a node (default 16)")
    p.add_argument(
        "--text", type=text_file, help="the text (its last tenth is read); default: held-out plain sentences"
    )
    add_outputs(p, when=", after every length; gone on with if it exists")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.retrieval", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    models.resolve(args.model)
    if 0 < args.drawn < SOUGHT or not (args.drawn or any(args.tokens)):
        raise ValueError(f"--drawn {args.drawn}: {SOUGHT} keys are sought; draw as many or more, or 0 with --tokens")
    check_room("cpu", 8 * 64 * (args.drawn + args.asked), f"--drawn {args.drawn} --asked {args.asked}")
    board = {name: getattr(args, name) for name in ("model", "layers", "asked", "degree")}
    board["text"] = str(args.text) if args.text else None
    rows = finished(args.json, board, lambda row: True)
    sources = {f"drawn {args.drawn}": of_draw(args.drawn, args.asked)} if args.drawn else {}
    sources |= {
        f"{args.model} {n}": of_text(args.model, args.text, n, args.layers, args.asked, args.device)
        for n in args.tokens
        if n
    }
    for data, source in sources.items():
        if all(row["data"] != data for row in rows):
            rows += rows_of(list(source), args.degree)
            write_rows(args.json, run_meta("eval.retrieval", argv, SEED, board=board), rows)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
