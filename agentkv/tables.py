"""The tables that the command prints: one row per method, and success per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MIN_WIDTH = 132  # a pipe has no width of its own


def stdout_console() -> Console:
    """A console for results: wide enough for the table even where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(MIN_WIDTH, console.width))


COLUMNS = ("success (95 %)", "n", "steps", "tokens in", "out", "KV at rest", "of full", "KV peak")
PHASES = ("prefill", "decode", "browser")


def method_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows with task "all": success with its interval, then means per step (steps: per episode), peak KV bytes."""
    table = Table(title="methods on the same episodes", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for name in (*COLUMNS, *(f"{phase} s" for phase in PHASES)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["task"] == "all":
            table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["method"],
        f"{row['success']:.0%} ({row['low']:.0%}-{row['high']:.0%})",
        str(row["n"]),
        f"{row['steps']:.1f}",
        f"{row['prefill_tokens']:.0f}",
        f"{row['decode_tokens']:.1f}",
        format_bytes(row["kv_bytes"]),
        f"{row['kv_share']:.1%}",
        format_bytes(row["kv_bytes_peak"]),
        *(f"{row[f'seconds_{phase}']:.3f}" for phase in PHASES),
    ]


def task_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Success per task (down) and method (across)."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    table = Table("task", title="success per task", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for method in methods:
        table.add_column(method, justify="right")
    share = {(r["task"], r["method"]): f"{r['success']:.0%}" for r in rows}
    for task in dict.fromkeys(r["task"] for r in rows):
        if task != "all":
            table.add_row(task, *(share.get((task, method), "-") for method in methods))
    return table


def format_bytes(value: float) -> str:
    """1234567 -> "1.23 MB" (powers of 1000)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e3:.1f} KB"
