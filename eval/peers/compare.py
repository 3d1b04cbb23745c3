"""Both sides on the same prompts, and the table: `python -m eval.peers compare`.

Seconds are ratios to the full cache of the same side, measured in turn in one process; bytes are those that tensors
hold; overlap is the share of kept (layer, head, token) that both sides keep.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from textkv import models
from textkv.command import ran
from textkv.intervals import wilson
from textkv.records import parse

from ..board import SPOKEN
from ..ruler import Maker, score
from ..textbench import load_text_model
from .our_side import DYNAMIC, lines
from .pairs import FULL, PAIRS, Pair
from .place import python

OURS, PEER, OWN = "ours", "kvpress", "transformers"
SIDE = Path(__file__).with_name("kvpress_side.py")


def job_of(
    model: str,
    methods: Sequence[str],
    budgets: Sequence[float],
    maker: Maker,
    tasks: Sequence[str],
    n: int,
    overlap: int,
) -> tuple[dict[str, Any], list[str]]:
    """(what both sides are told, the answers): prompts with their question at the end."""
    prompts = [maker.make(task, number) for number in range(n) for task in tasks]
    pairs = {FULL: Pair(FULL, "")} | {name: PAIRS[name] for name in methods}
    job = {
        "model": str(models.resolve(model)),
        "prompts": [[*p.text.tolist(), *p.question.tolist()] for p in prompts],
        "pairs": [pair.told() | {"name": name} for name, pair in pairs.items()],
        "budgets": list(budgets),
        "spoken": SPOKEN,
        "overlap": overlap,
    }
    return job, [p.answer for p in prompts]


def peer_lines(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What the other side says.

    Raises:
        ChildProcessError: it did not come to its end; with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "job.json", Path(folder) / "out.jsonl"
        asked.write_text(json.dumps(job), encoding="utf-8")
        code, said = ran([str(python()), str(SIDE), str(asked), str(out)], hear=True)
        if code:
            raise ChildProcessError(f"kvpress ended with {code}: {(said.strip().splitlines() or [''])[-1]}")
        return [parse(line) for line in out.read_bytes().splitlines()]


def our_lines(job: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], PreTrainedTokenizerBase]:
    """What our side says, and the tokenizer to read both with."""
    model, tokenizer = load_text_model(name)
    cells = sum(len(job["budgets"]) if pair["press"] else 2 for pair in job["pairs"])
    told = track(lines(model, job), "ours", len(job["prompts"]) * cells, console=Console(stderr=True))
    return list(told), tokenizer


def overlap(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]]) -> float | None:
    """Mean share over layers, None where nothing was compared."""
    shares = []
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.get("kept", ()), other.get("kept", ()), strict=False):
            first, second = ({(h, p) for h, some in enumerate(heads) for p in some} for heads in (a, b))
            shares.append(len(first & second) / max(len(first), len(second), 1))
    return sum(shares) / len(shares) if shares else None


def rows_of(
    side: str, told: list[dict[str, Any]], answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """One row for each method and budget of a side; seconds are ratios to the full cache in the same process."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in told:
        cells.setdefault((line["method"], line["budget"]), []).append(line)
    full = cells[FULL, 1.0]
    rows = []
    for (method, budget), mine in cells.items():
        row = {"library": OWN if method == DYNAMIC else side, "method": method, "budget": budget, "n": len(mine)}
        if refused := next((line["refused"] for line in mine if "refused" in line), ""):
            rows.append(row | {"refused": refused})
            continue
        texts = tokenizer.batch_decode([line["said"] for line in mine], skip_special_tokens=True)
        scores = [score(text, answer) for text, answer in zip(texts, answers, strict=True)]
        low, high = wilson(sum(whole for whole, _ in scores), len(scores))
        ratios = {
            f"{what}_ratio": median(a[what] / b[what] for a, b in zip(mine, full, strict=True))
            for what in ("read", "step")
        }
        rows.append(
            row
            | {"recall": sum(whole for whole, _ in scores) / len(scores), "low": low, "high": high}
            | {"digits": sum(share for _, share in scores) / len(scores)}
            | {"kv_bytes": sum(line["kv_bytes"] for line in mine) / len(mine)}
            | {"kv_share": sum(a["kv_bytes"] / b["kv_bytes"] for a, b in zip(mine, full, strict=True)) / len(mine)}
            | ratios
        )
    return rows


def compared(
    model: str,
    methods: Sequence[str],
    budgets: Sequence[float],
    length: int,
    tasks: Sequence[str],
    n: int,
    shown: int,
    text: Path | None,
) -> list[dict[str, Any]]:
    """All rows; those of a method that both have carry "overlap" (of the first `shown` prompts)."""
    python()
    tokenizer = load_text_model(model)[1]
    job, answers = job_of(model, methods, budgets, Maker(tokenizer, length, text), tasks, n, shown)
    theirs = peer_lines(job)
    mine, tokenizer = our_lines(job, model)
    rows = rows_of(OURS, mine, answers, tokenizer) + rows_of(PEER, theirs, answers, tokenizer)
    for row in rows:
        if row["library"] == OURS and row["method"] != FULL:
            cell = [
                [x for x in side if (x["method"], x["budget"]) == (row["method"], row["budget"])]
                for side in (mine, theirs)
            ]
            row["overlap"] = overlap(*cell)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A method's rows beside each other."""
    made = Table("method", "budget", "library", "right", "95 %", "digits", "bytes of full", "prompt", "step", "overlap")
    order = list(dict.fromkeys((row["method"], row["budget"]) for row in rows))
    for row in sorted(rows, key=lambda row: order.index((row["method"], row["budget"]))):
        start = [f"{row['method']}", f"{row['budget']:g}", row["library"]]
        if "refused" in row:
            made.add_row(*start, row["refused"][:60])
            continue
        shared = row.get("overlap")
        made.add_row(
            *start,
            f"{row['recall']:.2f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
            f"{row['digits']:.2f}",
            f"{row['kv_share']:.3f}",
            f"{row['read_ratio']:.2f}",
            f"{row['step_ratio']:.2f}",
            "" if shared is None else f"{shared:.3f}",
        )
    return made
