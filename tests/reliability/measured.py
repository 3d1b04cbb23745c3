"""Rows of the two measurements that take long, from what they wrote: docs/fuzz.json and docs/soak.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from textkv.records import listed, read_fields

from .rows import DOCS, Row

FUZZ, SOAK = "python -m tests.fuzz", "python -m tests.soak"
OUTCOMES = {"accepted": "accepted", "refused": "refused as promised", "other": "another exception"}


def measured(docs: Path = DOCS) -> list[Row]:
    """Both, as far as they have been made."""
    return [*_fuzzed(docs / "fuzz.json"), *_soaked(docs / "soak.json")]


def _fuzzed(path: Path) -> Iterator[Row]:
    """A row for each reader and outcome."""
    if path.is_file():
        for row in listed(read_fields(path, {"rows": list})["rows"], dict, "rows"):
            for name, outcome in OUTCOMES.items():
                if row[name]:
                    yield Row(9, "random input", row["reader"], outcome, FUZZ, row[name])


def _soaked(path: Path) -> Iterator[Row]:
    """A row for each part, with the medians of its first and its last third."""
    if path.is_file():
        for found in listed(read_fields(path, {"verdicts": list})["verdicts"], dict, "verdicts"):
            yield Row(9, f"{found['done']:,} {found['part']} in one process", found["part"], _told(found), SOAK)


def _told(found: Mapping[str, Any]) -> str:
    names = {"mb": "MB", "mb_below": "MB of the browser", "files": "open files", "rate": "a second of its own time"}
    told = ", ".join(f"{found[name][0]:g} to {found[name][1]:g} {words}" for name, words in names.items()
                     if any(found[name]))  # fmt: skip
    return f"{'flat' if found['flat'] else 'not flat'}: {told}"
