"""Multimodal-Mind2Web: steps on web pages (arXiv 2306.06070, 2401.01614), in the form of GUI-KV's evaluation.

Read: lists of {annotation_id, action_uid, task, bbox, previous_actions, operation, value}. The published set is parquet
with candidates as JSON in strings; it must be converted first. Two things are not told by what is known of that form:
`bbox` is taken as [left, top, right, bottom], or by names as {x, y, width, height}, in pixels; and the picture is
`screenshot`, the published column's name, or <action_uid>.png.

Scores, macro over tasks: `element_accuracy`, the point lies in the box; `operation_f1`, over the words of operation and
value; `accuracy`, the step: both whole. Agents here cannot say `select`: a selection said as click and text counts, a
click alone misses the operation. An answer that types without a point names no element, as in the released scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from agentkv.envs.actions import Single, Type

from .items import BENCHMARKS, Benchmark, Box, Item, Reader, Truth, corners, inside, number, pointed, words

OPERATIONS = ("CLICK", "TYPE", "SELECT")


@BENCHMARKS.register("mind2web")
class Mind2Web(Benchmark):
    """Multimodal-Mind2Web; its rows by task are means over a task's steps."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "element_accuracy", "operation_f1")

    def items_of(self, reader: Reader, where: str, entry: dict[str, Any]) -> Iterator[Item]:
        """See `Benchmark`."""
        task = words(entry.get("annotation_id"), "annotation_id")
        step = words(entry.get("action_uid"), "action_uid")
        kind = words(entry.get("operation"), "operation").upper()
        if kind not in OPERATIONS:
            raise ValueError(f"operation {kind!r} is none of {', '.join(OPERATIONS)}")
        value = entry.get("value") or ""
        if not isinstance(value, str):
            raise ValueError("value is no text")
        image = reader.picture(entry.get("screenshot") or f"{step}.png")
        before = entry.get("previous_actions") or []
        if not isinstance(before, list) or not all(isinstance(line, str) for line in before):
            raise ValueError("previous_actions is no list of texts")
        goal, group = words(entry.get("task"), "task"), where.rsplit(" entry", 1)[0]
        yield Item(f"{task}/{step}", task, group, image, goal, Truth(kind, _box(entry.get("bbox")), None, value),
                    before=tuple(before))  # fmt: skip

    def score(self, truth: Truth, actions: Sequence[Single], size: tuple[int, int]) -> dict[str, float]:
        """See `Benchmark`."""
        element = float(inside(pointed(actions), truth.box))
        found = f1(said(actions, truth.kind), f"{truth.kind} {truth.text}")
        return {"accuracy": float(element == found == 1), "element_accuracy": element, "operation_f1": found}


def said(actions: Sequence[Single], wanted: str) -> str:
    """An answer as operation and value: typed text makes it TYPE, or SELECT where that was asked for."""
    typed = [action.text for action in actions if isinstance(action, Type)]
    if typed:
        return f"{'SELECT' if wanted == 'SELECT' else 'TYPE'} {' '.join(typed)}"
    return "CLICK" if pointed(actions) is not None else ""


def f1(one: str, other: str) -> float:
    """Harmonic mean of precision and recall of words, 0 where none is shared."""
    left, right = Counter(one.lower().split()), Counter(other.lower().split())
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def _box(value: Any) -> Box:
    if not isinstance(value, dict):
        return corners(value)
    x, y, width, height = (number(value.get(name), f"{name} of bbox") for name in ("x", "y", "width", "height"))
    return corners([x, y, x + width, y + height])
