"""Outcomes on disk, one line for each batch of questions that a cell has answered: what a long run resumes from.

The first line says what is measured. Lines are appended and flushed; a run that was killed leaves whole lines and at
most one torn one, which is measured again. Rows of a table are made from the lines, never the other way round.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from textkv.disk import disk_errors, write_whole
from textkv.intervals import wilson
from textkv.records import build, checked, parse

ALL = "all"  # the task under which a row stands for all tasks together


@dataclass(frozen=True)
class Outcome:
    """What one method at one budget did with one batch of questions.

    Attributes:
        method, budget, task, asked: the cell; `asked` is "known" or "unknown" to the cache when it compressed.
        first: number of the first question of the batch.
        right: for each question, whether its answer was right in every digit.
        digits: for each question, the share of digits that were right.
        figures: bytes and seconds, per sequence.
        refused: why the method could not, or "".
    """

    method: str
    budget: str
    task: str
    asked: str
    first: int
    right: list[bool]
    digits: list[float]
    figures: dict[str, float]
    refused: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What tells outcomes apart."""
        return self.method, self.budget, self.task, self.asked, self.first


class Store:
    """Lines in a file, those of an earlier start included; a subclass says of which `kind`: a dataclass of plain values
    with a `key` that tells its lines apart.

    Args:
        path: the file; made, with its folder, when the first line is added.
        board: what is measured, as plain JSON values.

    Attributes:
        board: as given.
        done: the lines by their keys, in the order in which they came.

    Raises:
        ValueError: the file holds lines of another board, or is none of ours.
    """

    kind: ClassVar[type]

    def __init__(self, path: Path, board: dict[str, Any]) -> None:
        self._path, self.board = path, board
        self.done: dict[tuple, Any] = {}
        if path.exists():
            self._read()

    @classmethod
    def saved(cls, path: Path) -> Self:
        """What a file holds, whatever its board.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is none of ours.
        """
        try:
            with path.open(encoding="utf-8") as file:
                board = parse(file.readline())["board"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there are no saved outcomes; run without --rescore first") from None
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is no file of outcomes; give another --json") from None
        return cls(path, board)

    def _read(self) -> None:
        whole = self._path.read_bytes()
        # A line without its end was being written when the run stopped: it goes, or the next one would be glued to it.
        kept = whole[: whole.rfind(b"\n") + 1]
        if not kept:
            # Only the beginning of our own first line was torn by a stop; anything else is another's.
            if not self._head().startswith(whole):
                raise ValueError(f"{self._path} is no file of outcomes; give another --json")
            self._path.unlink()
            return
        head, *lines = kept.splitlines(keepends=True)
        try:
            before = checked(parse(head), {"board": dict})["board"]
        except ValueError:
            raise ValueError(f"{self._path} is no file of outcomes; give another --json") from None
        if before != self.board:
            raise ValueError(f"{self._path} holds another board ({before}); give another --json")
        good = [head, *(line for number, line in enumerate(lines, 2) if self._take(line, number))]
        if sum(map(len, good)) < len(whole):
            write_whole(self._path, b"".join(good))

    def _head(self) -> bytes:
        return json.dumps({"board": self.board}).encode() + b"\n"

    def _take(self, line: bytes, number: int) -> bool:
        """Whether a line is an outcome; a damaged one is told, and measured again."""
        try:
            found = build(self.kind, parse(line))
        except ValueError as error:
            print(f"{self._path}:{number}: {error}; it is measured again", file=sys.stderr)
            return False
        self.done[found.key] = found
        return True

    def add(self, line: Any) -> None:
        """Appends a line."""
        self.done[line.key] = line
        fresh = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            if fresh:
                file.write(self._head().decode())
            file.write(json.dumps(vars(line)) + "\n")


class Outcomes(Store):
    """The outcomes of a board of questions."""

    kind = Outcome

    def has(self, cell: tuple[str, str], task: str, asked: str, first: int, count: int) -> bool:
        """Whether a cell has answered the `count` questions from `first` on, or was refused them."""
        known = self.done.get((*cell, task, asked, first))
        return known is not None and (bool(known.refused) or len(known.right) >= count)

    def rows(
        self, cells: Iterable[tuple[str, str]], tasks: Sequence[str], asked: Iterable[str], n: int
    ) -> list[dict[str, Any]]:
        """One row per cell, kind of asking and task, and one with task "all", over the first `n` questions of each
        task; cells without outcomes are left out."""
        rows = []
        for method, budget in cells:
            for when in asked:
                mine = [
                    x
                    for x in self.done.values()
                    if (x.method, x.budget, x.asked) == (method, budget, when) and x.first < n
                ]
                about = {"method": method, "budget": budget, "asked": when}
                reasons = [x.refused for x in mine if x.refused]
                if reasons:
                    rows.append(about | {"task": "refused", "reason": reasons[0]})
                    continue
                parts = {task: [x for x in mine if x.task == task] for task in tasks}
                parts[ALL] = [x for x in mine if x.task in tasks]
                rows += [about | {"task": task} | _figures(part, n) for task, part in parts.items() if part]
        return rows


def _figures(part: list[Outcome], n: int) -> dict[str, Any]:
    right = [x for outcome in part for x in outcome.right[: n - outcome.first]]
    digits = [x for outcome in part for x in outcome.digits[: n - outcome.first]]
    low, high = wilson(sum(right), len(right))
    row = {"n": len(right), "recall": sum(right) / len(right), "low": low, "high": high}
    row["digits"] = sum(digits) / len(digits)
    for name in dict.fromkeys(name for outcome in part for name in outcome.figures):
        # A hook that never ran took no time.
        total = sum(outcome.figures.get(name, 0.0) * len(outcome.right[: n - outcome.first]) for outcome in part)
        row[name] = total / len(right)
    return row | {"kv_share": row["kv_bytes"] / row["kv_bytes_full"]}
