"""The rows of docs/reliability.json, and the page that is drawn from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
KINDS = {
    1: "Files of the user",
    2: "What a report embeds",
    3: "Everything ends",
    4: "Damage is local",
    5: "Disk full",
    6: "Checkpoints are whole or refused",
    7: "Wrong requests",
    8: "The page boundary",
    9: "Fuzz and soak",
}


@dataclass(frozen=True, order=True)
class Row:
    """`n` cases in which `command` met `fault` and gave `outcome`, as the test file or command `by` saw them."""

    kind: int
    fault: str
    command: str
    outcome: str
    by: str
    n: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is not one of {', '.join(map(str, KINDS))}")


def summed(rows: Iterable[Row]) -> list[Row]:
    """Equal rows as one, in order."""
    counts: Counter[tuple] = Counter()
    for row in rows:
        counts[row.kind, row.fault, row.command, row.outcome, row.by] += row.n
    return sorted(Row(*key, n) for key, n in counts.items())


def read(path: Path = DOCS / "reliability.json") -> list[Row]:
    """The rows of a file, none if there is none yet."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.is_file() else []


def merge(rows: Iterable[Row], docs: Path = DOCS) -> None:
    """Put `rows` in the place of all earlier ones by the same tests, and draw the page anew."""
    new = list(rows)
    mine = {row.by for row in new}
    kept = summed([*(row for row in read(docs / "reliability.json") if row.by not in mine), *new])
    meta = {"command": "python -m tests.reliability"}
    lines = ",\n".join(json.dumps(asdict(row)) for row in kept)
    text = f'{{"meta": {json.dumps(meta)}, "rows": [\n{lines}\n]}}\n'
    (docs / "reliability.json").write_text(text, encoding="utf-8")
    (docs / "reliability.md").write_text(page(kept), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """Two tables for each kind: fault x outcome, with the commands that met it, and who saw it."""
    lines = [
        "# Reliability",
        "",
        "What goes wrong, and what comes of it: each row counts cases of a test or a command that CI or anyone may run "
        "again. `python -m tests.reliability` runs the tests and writes this page; nothing here is written by hand.",
        "",
        "| kind | faults | commands | cases |",
        "|---|---|---|---|",
    ]
    for kind in sorted({row.kind for row in rows}):
        own = [row for row in rows if row.kind == kind]
        counts = len({row.fault for row in own}), len({row.command for row in own}), sum(row.n for row in own)
        lines.append(f"| {KINDS[kind]} | {' | '.join(f'{n:,}' for n in counts)} |")
    for kind in sorted({row.kind for row in rows}):
        lines += ["", f"## {KINDS[kind]}", "", *_table([row for row in rows if row.kind == kind])]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    lines = ["| fault | outcome | cases | commands | shown by |", "|---|---|---|---|---|"]
    for fault, outcome, by in dict.fromkeys((row.fault, row.outcome, row.by) for row in rows):
        own = [row for row in rows if (row.fault, row.outcome, row.by) == (fault, outcome, by)]
        commands = sorted({row.command for row in own})
        cells = fault, outcome, f"{sum(row.n for row in own):,}", _few(commands), f"`{by}`"
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |")
    return lines


def _few(commands: list[str], most: int = 6) -> str:
    """The names, or how many they are; docs/reliability.json has them all."""
    return ", ".join(f"`{name}`" for name in commands) if len(commands) <= most else f"{len(commands)} commands"
