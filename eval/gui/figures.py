"""Rows and a table from answers: each metric per cell and group, and what an answer cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentkv.tables import format_bytes
from textkv import Budget

from ..bootstrap import clustered
from ..outcomes import ALL
from .bench import REFUSED, Answer
from .items import Benchmark, Item

UNITS = {
    "accuracy": "mean over n questions, 0..1; replies that cannot be read count 0",
    "low, high": "95 % of accuracy by bootstrap over tasks: episodes, or screenshots where questions have none",
    "task": "a group of the benchmark, or all",
    "prefill_tokens, decode_tokens, visual_tokens": "mean per question",
    "kv_bytes": "held right after the prompt was compressed, mean per question; kv_share: of kv_bytes_full",
    "seconds_prefill, seconds_decode": "mean per question; seconds: their sum",
    "unreadable, refused": "replies that could not be read; prompts that the method could not take",
}


def rows_of(benchmark: Benchmark, items: Sequence[Item], answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Per cell, in the order of the answers: a row for all questions, then one for each group. Answers to questions
    that are not there are passed over.
    """
    known = {item.name: item for item in items}
    cells: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.item in known:
            cells[answer.method, answer.budget].append(answer)
    rows = []
    for (method, budget), mine in cells.items():
        told = Budget.parse(budget)
        about = {"benchmark": benchmark.name, "method": method, "budget": told.fraction or str(told)}
        groups: dict[str, list[Answer]] = {ALL: mine}
        for answer in mine:
            groups.setdefault(known[answer.item].group, []).append(answer)
        # A single group says what all of them say.
        shown = groups if len(groups) > 2 else {ALL: mine}
        rows += [about | {"task": name} | _row(benchmark, known, part) for name, part in shown.items()]
    return rows


def _row(benchmark: Benchmark, known: dict[str, Item], answers: Sequence[Answer]) -> dict[str, Any]:
    tasks: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        tasks[known[answer.item].task].append(answer)
    first, *others = benchmark.metrics
    mean, low, high = clustered([[x.scores[first] for x in part] for part in tasks.values()])
    row: dict[str, Any] = {first: mean, "n": len(answers), "low": low, "high": high}
    for name in others:
        row[name] = fmean(x.scores[name] for x in answers)
    # As some sets are scored: every task counts the same, however many steps it has.
    row |= {f"{name}_macro": fmean(fmean(x.scores[name] for x in part) for part in tasks.values())
            for name in benchmark.metrics}  # fmt: skip
    figures = [x.figures for x in answers if x.figures]
    if figures:
        row |= {name: fmean(x[name] for x in figures) for name in figures[0]}
        row["kv_bytes_peak"] = max(x["kv_bytes_peak"] for x in figures)
        row["kv_share"] = row["kv_bytes"] / row["kv_bytes_full"]
        row["seconds"] = row["seconds_prefill"] + row["seconds_decode"]
    refused = sum(x.error.startswith(REFUSED) for x in answers)
    return row | {"unreadable": sum(bool(x.error) for x in answers) - refused, "refused": refused}


def table(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> Table:
    """One line per cell and group: accuracy with its interval, other metrics, then what an answer cost."""
    made = Table("task", "method", title=benchmark.name, box=SIMPLE_HEAD, title_justify="left")
    for name in ("budget", "accuracy (95 %)", *benchmark.metrics[1:], "n", "tokens in", "KV at rest", "of full", "s"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cost = ["-"] * 4
        if "kv_bytes" in row:
            held, share = format_bytes(row["kv_bytes"]), f"{row['kv_share']:.1%}"
            cost = [f"{row['prefill_tokens']:.0f}", held, share, f"{row['seconds']:.3f}"]
        interval = f"{row['accuracy']:.3f} ({row['low']:.2f}-{row['high']:.2f})"
        more = [f"{row[name]:.3f}" for name in benchmark.metrics[1:]]
        made.add_row(row["task"], row["method"], str(row["budget"]), interval, *more, str(row["n"]), *cost)
    return made
