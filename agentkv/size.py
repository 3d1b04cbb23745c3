"""`python -m agentkv.size`: what a conversation with screenshots weighs, and how many of them a device carries.

By formula, from the model's config.json and image processor; no weights are read (`textkv.capacity`). With `--crowd`
that many conversations are played through under each memory: where turns find what was read before
(`textkv.crowd`).
"""

from __future__ import annotations

import argparse
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from agentkv.models import AGENTS, EMBEDDED, OWN_AGENT
from textkv import resolve_method
from textkv.arguments import budgets, method
from textkv.capacity import ModelShape
from textkv.checkpoints import check_layers, readable_files
from textkv.command import (
    finite,
    lengths,
    names,
    natural,
    results_file,
    run,
    size,
    some_text,
    token_count,
    write_rows,
)
from textkv.crowd import Rates, Turns, order_of, play
from textkv.models.loading import resolve
from textkv.provenance import run_meta

TYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MOST = 100_000_000  # tokens that are looked at: more than any model reads


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m agentkv.size", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--model",
        type=some_text,
        default="mini",
        help="mini, mini-text, smollm2, a folder with a config.json, or a hub id",
    )
    p.add_argument("--screenshots", type=natural, default=3, help="in the conversation (3)")
    p.add_argument("--screen", type=pixels, default="1280x720", help="of a screenshot, in pixels (1280x720)")
    p.add_argument("--text", type=natural, default=150, help="tokens of words with each screenshot (150)")
    p.add_argument("--system", type=natural, default=300, help="tokens of words before the first (300)")
    p.add_argument("--method", type=method, default="gui-kv", help="of the caches (gui-kv)")
    p.add_argument("--budget", type=budgets, default="0.1,0.2,0.4,1", help="shares, or numbers as 512t (0.1,0.2,0.4,1)")
    p.add_argument("--memory", type=sizes_of, default="24GB,80GB", help="of devices, weights included (24GB,80GB)")
    p.add_argument("--dtype", choices=TYPES, help="of weights and caches (default: the model's own)")
    p.add_argument("--crowd", type=lengths, help="play so many conversations through, as 10,100,1000,10000")
    p.add_argument("--disk", type=size, default=0, help="with --crowd: room for those that do not fit (none)")
    p.add_argument("--rates", type=rates, metavar="READ,WRITE,LOAD", help="tokens/s, tokens/s, size/s: 4000,50,1GB")
    p.add_argument("--answer", type=token_count, default=50, help="with --rates: tokens of an answer (50)")
    p.add_argument("--json", type=results_file("agentkv.size"), help="write the rows here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for a request that cannot be carried out."""
    return run("agentkv.size", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Counts, prints, writes."""
    if args.rates and not args.crowd:
        raise ValueError("--rates says how long --crowd would take; give both")
    methods = [(args.method, budget) for budget in args.budget if resolve_method(args.method, budget)]
    model = Model.read(args.model, args.screen if args.screenshots else None, args.dtype)
    step = model.image_tokens + args.text
    last, limit = args.system + step * args.screenshots, min(model.shape.limit or MOST, MOST)
    if last > limit:
        raise ValueError(f"{args.screenshots} screenshots are {last} tokens, {args.model} reads {limit}")
    seen = [args.system + step * number for number in range(args.screenshots + 1)]
    rows = list(sizes(model, methods, seen, args.memory, args.screenshots))
    told = f"{args.method} on {args.model}: {_bytes(model.shape.weights)} of weights, {model.image_tokens} tokens a "
    _show_sizes(rows, args.memory, f"{told}screenshot, {seen[-1]:,} in all")
    crowd = list(crowds(args, model, methods, seen)) if args.crowd else []
    if crowd:
        _show_crowd(crowd, f"{max(1, args.screenshots)} steps each, in random order")
    write_rows(args.json, run_meta("agentkv.size", argv, seed=0), rows, crowd=crowd)


@dataclass(frozen=True)
class Model:
    """A model's shape, and how many tokens a screenshot is to it."""

    shape: ModelShape
    image_tokens: int

    @classmethod
    def read(cls, name: str, screen: tuple[int, int] | None, dtype: str | None = None) -> Model:
        """By its name, for screenshots of (width, height) pixels, if any.

        Raises:
            OSError, ValueError: no config.json or image processor can be had, or no such model can be kept.
        """
        source = str(EMBEDDED.get(name) or resolve("mini" if name == "mini-text" else name))
        with readable_files(source):
            check_layers(source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        agent = AGENTS.find(OWN_AGENT[config.model_type]) if config.model_type in OWN_AGENT else None
        if screen and agent is None:
            raise ValueError(f"{name} is a {config.model_type} model, which reads no screenshots; use --screenshots 0")
        tokens = 0
        if screen:
            processor = agent.image_processor.from_pretrained(source)
            tokens = processor.get_number_of_image_patches(screen[1], screen[0]) // processor.merge_size**2
        build = AutoModelForCausalLM.from_config if agent is None else agent.architecture._from_config
        with readable_files(source):
            return cls(ModelShape.of(lambda: build(config), config, TYPES.get(dtype)), tokens)


def sizes(
    model: Model, methods: Sequence[tuple[str, str]], seen: Sequence[int], memories: Sequence[int], screenshots: int
) -> Iterator[dict[str, Any]]:
    """A row per budget and memory: bytes of a conversation, and how many the memory carries beside the weights."""
    for name, budget in methods:
        held = model.shape.kv_bytes(name, budget, seen[-1])
        for memory in memories:
            yield {
                "method": name, "budget": budget, "screenshots": screenshots, "tokens_seen": seen[-1],
                "kv_bytes": held, "kv_bytes_full": model.shape.full_bytes(seen[-1]), "memory": memory,
                "conversations": max(0, memory - model.shape.weights) // held,
            }  # fmt: skip


def crowds(
    args: argparse.Namespace, model: Model, methods: Sequence[tuple[str, str]], seen: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row per budget, memory and number of conversations that are played through."""
    steps = list(seen[1:]) or list(seen)
    for name, budget in methods:
        turns = Turns(steps, [model.shape.kv_bytes(name, budget, n) for n in steps])
        for memory in args.memory:
            for number in args.crowd:
                room = max(0, memory - model.shape.weights)
                played = play(turns, order_of(number, len(steps)), room, args.disk)
                row = {"method": name, "budget": budget, "memory": memory} | played.row()
                if args.rates:
                    per, full = (played.seconds(args.rates, args.answer, x) / played.steps for x in (False, True))
                    row |= {"seconds_step": per, "seconds_step_full": full}
                yield row


def pixels(text: str) -> tuple[int, int]:
    """Width and height, as 1280x720."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no size of a screen; write 1280x720")
    return int(found[1]), int(found[2])


def sizes_of(text: str) -> list[int]:
    """Sizes, as 24GB,80GB."""
    return [size(part) for part in names(text)]


def rates(text: str) -> Rates:
    """Three rates, as 4000,50,1GB."""
    told = text.split(",")
    if len(told) != 3:
        raise ArgumentTypeError(f"{text!r} are not three rates; write 4000,50,1GB: tokens read, written, bytes loaded")
    try:
        return Rates(finite(told[0]), finite(told[1]), size(told[2]))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _show_sizes(rows: Sequence[dict[str, Any]], memories: Sequence[int], title: str) -> None:
    """A line per budget, a column per memory."""
    heads = ["budget", "a conversation", "of full", *(f"in {_bytes(memory)}" for memory in memories)]
    lines = []
    for first in range(0, len(rows), len(memories)):
        row = rows[first]
        held, full = row["kv_bytes"], row["kv_bytes_full"]
        carried = [f"{x['conversations']:,}" for x in rows[first : first + len(memories)]]
        lines.append([row["budget"], _bytes(held), f"{held / full:.1%}", *carried])
    _show(title, heads, lines)


def _show_crowd(rows: Sequence[dict[str, Any]], title: str) -> None:
    heads = ["budget", "memory", "crowd", "found", "on disk", "again", "read", "of full"]
    lines = [
        [
            x["budget"], _bytes(x["memory"]), f"{x['conversations']:,}", f"{x['found_memory']:.1%}",
            f"{x['found_disk']:.1%}", f"{x['read_again']:.1%}", f"{x['prefill_tokens']:,}",
            f"{x['prefill_tokens'] / x['prefill_tokens_full']:.1%}",
        ]
        + ([f"{x['seconds_step']:.3g}", f"{x['seconds_step_full']:.3g}"] if "seconds_step" in x else [])
        for x in rows
    ]  # fmt: skip
    _show(title, heads + ["s a step", "if full"][: len(lines[0]) - len(heads)], lines)


def _show(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=max(110, Console().width)).print(table)


def _bytes(value: int) -> str:
    return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"


if __name__ == "__main__":
    sys.exit(main())
