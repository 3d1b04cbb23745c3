"""GUI-Odyssey: steps of tasks across apps of a phone (arXiv 2406.08451).

Read: all_anno.json, a list of {episode_id, task_info {category, instruction}, steps [{step, screenshot, action, info,
sam2_bbox, low_level_instruction}]}, places in 0..1000 of the screen.

A click or long press is right in `sam2_bbox`, or within 14 % of the screen's size of the recorded point; a text if it
is alike by more than half (normalised edit distance); a scroll in its direction. These limits are the paper's as they
are remembered, the code was not read. Keys must be equal; no agent here knows the key for recent apps
(KEY_APPSELECT), so that such a step is always wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import hypot
from typing import Any

from agentkv.envs.actions import CallUser, Click, Finished, LongPress, PressBack, PressHome, Single, Type

from .items import BENCHMARKS, Benchmark, Item, Point, Reader, Truth, corners, inside, number, pointed, words
from .swipes import direction_of, swiped

EXTENT = (1000.0, 1000.0)
NEAR = 0.14
ALIKE = 0.5
POINTED = {"CLICK": Click, "LONG_PRESS": LongPress}
KEYS = {"KEY_HOME": PressHome, "KEY_BACK": PressBack, "KEY_APPSELECT": None}


@BENCHMARKS.register("gui-odyssey")
class GuiOdyssey(Benchmark):
    """GUI-Odyssey; groups are the categories of tasks."""

    def items_of(self, reader: Reader, where: str, episode: dict[str, Any]) -> Iterator[Item]:
        """See `Benchmark`: one for each step."""
        task = words(episode.get("episode_id"), "episode_id")
        about = episode.get("task_info")
        if not isinstance(about, dict) or not isinstance(episode.get("steps"), list):
            raise ValueError("it has no task_info or no steps")
        goal, before = words(about.get("instruction"), "instruction of its task_info"), []
        for place, step in enumerate(episode["steps"]):
            try:
                if not isinstance(step, dict):
                    raise ValueError("it is no object")
                truth, image = _truth(step), reader.picture(step.get("screenshot"))
                group = str(about.get("category") or "other")
                yield Item(f"{task}/{place}", task, group, image, goal, truth, EXTENT, tuple(before))
            except ValueError as error:
                reader.left_out(f"{where} step {place}", error)
            told = step.get("low_level_instruction") if isinstance(step, dict) else None
            before.append(told if isinstance(told, str) else "")

    def score(self, truth: Truth, actions: Sequence[Single], size: tuple[int, int]) -> dict[str, float]:
        """See `Benchmark`."""
        return {"accuracy": float(any(_right(truth, action, size) for action in actions))}


def _truth(step: dict[str, Any]) -> Truth:
    kind, info = words(step.get("action"), "action").upper(), step.get("info")
    if isinstance(info, str) and info in KEYS:
        return Truth(info)
    if kind in POINTED:
        box = step.get("sam2_bbox")
        return Truth(kind, corners(box, "sam2_bbox") if box else None, _points(info, 1)[0])
    if kind == "SCROLL":
        way = swiped(*(x for point in _points(info, 2) for x in point))
        if not way:
            raise ValueError("its scroll goes nowhere")
        return Truth(kind, text=way)
    if kind == "TYPE":
        return Truth(kind, text=words(info, "text in info"))
    if kind in ("COMPLETE", "INCOMPLETE"):
        return Truth(kind)
    raise ValueError(f"action {kind!r} is not known")


def _points(info: Any, count: int) -> list[Point]:
    if not isinstance(info, list) or len(info) < count or not all(isinstance(x, list) and len(x) == 2 for x in info):
        raise ValueError(f"info is no list of {count} points")
    return [(number(x, "x in info"), number(y, "y in info")) for x, y in info[:count]]


def _right(truth: Truth, action: Single, size: tuple[int, int]) -> bool:
    if truth.kind in KEYS:
        wanted = KEYS[truth.kind]
        return wanted is not None and isinstance(action, wanted)
    if truth.kind in POINTED:
        at = pointed([action])
        if at is None or not isinstance(action, POINTED[truth.kind]):
            return False
        away = hypot((at[0] - truth.point[0]) / size[0], (at[1] - truth.point[1]) / size[1])
        return inside(at, truth.box) or away <= NEAR
    if truth.kind == "TYPE":
        return isinstance(action, Type) and likeness(action.text, truth.text) > ALIKE
    if truth.kind == "SCROLL":
        return direction_of(action) == truth.text
    done = isinstance(action, Finished) and action.status == "success"
    given_up = isinstance(action, CallUser) or (isinstance(action, Finished) and not done)
    return done if truth.kind == "COMPLETE" else given_up


def likeness(one: str, other: str) -> float:
    """1 - edit distance over the longer length, of texts in lower case."""
    left, right = one.lower().strip(), other.lower().strip()
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return 1 - row[-1] / max(len(left), len(right), 1)
