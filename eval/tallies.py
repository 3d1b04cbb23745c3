"""What each arm of `eval.decoding` has done so far: counted, written as rows, and read back by a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.config import DecodingConfig
from dlm.models import DecodingSpec
from textkv.intervals import wilson
from textkv.records import checked, read_results

from .paired import difference

TOTALS = ("forwards", "query_tokens", "guider_forwards", "row_forwards", "seconds")
RATIOS = ("forwards", "query_tokens", "seconds")


@dataclass(frozen=True)
class Arm:
    """One row of the table: its name in the grid, and how it writes."""

    name: str
    config: DecodingConfig


@dataclass
class Tally:
    """What an arm has done so far; `right` and `same` have one of "0" and "1" for each problem: whether the answer is
    right, and whether it is, token for token, that of the first arm."""

    right: str = ""
    same: str = ""
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*TOTALS, "committed", "tokens"), 0))
    cache_bytes: int = 0
    cache_bytes_peak: int = 0

    @classmethod
    def of(cls, row: dict[str, Any]) -> Tally:
        """Back from a row. Raises ValueError for one that lacks a figure."""
        names = (*TOTALS, "committed", "tokens")
        texts, counts = dict.fromkeys(("right", "same"), str), dict.fromkeys(("cache_bytes", "cache_bytes_peak"), int)
        checked(row, dict.fromkeys(names, float) | texts | counts)
        totals = {name: row[name] for name in names}
        if len(row["same"]) != len(row["right"]):
            raise ValueError(f"{len(row['same'])} marks in same for {len(row['right'])} problems")
        return cls(row["right"], row["same"], totals, row["cache_bytes"], row["cache_bytes_peak"])

    def add(self, later: Tally) -> None:
        """Goes on with what was done with the problems after these."""
        self.right += later.right
        self.same += later.same
        for name, value in later.totals.items():
            self.totals[name] += value
        self.cache_bytes = max(self.cache_bytes, later.cache_bytes)
        self.cache_bytes_peak = max(self.cache_bytes_peak, later.cache_bytes_peak)


def row_of(arm: Arm, tally: Tally, base: Tally, about: dict[str, Any], spec: DecodingSpec) -> dict[str, Any]:
    """One row: the arm, its figures, and each against `base`; `tokens` are those before an end of text, `equal` is the
    share of answers that are those of `base`."""
    n, right = len(tally.right), tally.right.count("1")
    low, high = wilson(right, n)
    forwards = tally.totals["row_forwards"]
    row = {"arm": arm.name} | about | arm.config.columns(spec)
    row["guide"] = about["guide"] if arm.config.guided else "none"
    row |= {"n": n, "accuracy": right / n if n else 0.0, "low": low, "high": high}
    row["equal"] = tally.same.count("1") / n if n else 1.0
    row |= tally.totals | {"tokens_per_forward": tally.totals["committed"] / forwards if forwards else 0.0}
    row |= {"cache_bytes": tally.cache_bytes, "cache_bytes_peak": tally.cache_bytes_peak}
    for name in RATIOS:
        row[f"{name}_ratio"] = base.totals[name] / tally.totals[name] if tally.totals[name] else 1.0
    return row | {"right": tally.right, "same": tally.same}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `accuracy_change`: accuracy minus the first row's, with its paired 95 % interval."""
    marks = [{i: mark == "1" for i, mark in enumerate(row["right"])} for row in rows]
    names = ("accuracy_change", "change_low", "change_high")
    return [
        row | dict(zip(names, difference(mine, marks[0])[:3], strict=True))
        for row, mine in zip(rows, marks, strict=True)
    ]


def read_tallies(arms: Sequence[Arm], meta: dict[str, Any], path: Path | None) -> list[Tally]:
    """What each arm has done according to `path`. Raises ValueError if that is another measurement."""
    if path is None or not path.exists():
        return [Tally() for _ in arms]
    before, rows = read_results(path)
    if before.get("bench") != meta["bench"]:
        raise ValueError(f"{path} holds another measurement ({before.get('bench')}); give another --json")
    try:
        if len(rows) != len(arms):
            raise ValueError(f"{len(rows)} rows for {len(arms)} arms")
        tallies = [Tally.of(row) for row in rows]
        if len({len(tally.right) for tally in tallies}) > 1:
            raise ValueError("its arms have not answered equally many problems")
        return tallies
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; give another --json") from None
