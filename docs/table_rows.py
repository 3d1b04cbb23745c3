"""Rows of the JSON files in docs/, and tables of Markdown: what the tables of every page are made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    """The rows of a file in docs/."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))["rows"]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, with its last newline."""
    parts = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(part)} |\n".replace("|  |", "| |") for part in parts)
