"""AndroidControl: steps on a phone (arXiv 2406.03679), in the form of GUI-KV's evaluation.

Read: lists of {screenshot, goal, step_instruction, previous_actions, action {action_type, x, y, text, direction,
app_name, goal_status}, accessibility_tree [{bbox_pixels {x_min, y_min, x_max, y_max}}]}. The published set is TFRecords
with trees as protocol buffers; it must be converted first.

A click or long press is right inside the smallest node that holds the recorded point; a step without such a node cannot
be scored and is left out. Directions, statuses and keys must be equal. Not told, hence ours: texts and app names are
equal but for case and spaces, a long press is no click, and a drag counts as a scroll the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from agentkv.envs.actions import (
    Click,
    Finished,
    LongPress,
    OpenApp,
    PressBack,
    PressHome,
    Single,
    Type,
    Wait,
)

from .items import BENCHMARKS, Benchmark, Box, Item, Reader, Truth, corners, inside, number, pointed, same_words, words
from .swipes import direction_of

POINTED = {"click": Click, "long_press": LongPress}
KEYS = {"navigate_back": PressBack, "navigate_home": PressHome, "wait": Wait}
STATUSES = {"successful": "success", "success": "success", "complete": "success", "infeasible": "failure"}


@BENCHMARKS.register("android-control")
class AndroidControl(Benchmark):
    """High level: the words are the episode's goal."""

    words: ClassVar[str] = "goal"

    def items_of(self, reader: Reader, where: str, entry: dict[str, Any]) -> Iterator[Item]:
        """See `Benchmark`."""
        action = entry.get("action")
        if not isinstance(action, dict):
            raise ValueError("it has no action")
        truth, image = _truth(action, entry.get("accessibility_tree")), reader.picture(entry.get("screenshot"))
        before = [str(line) for line in entry.get("previous_actions") or []]
        goal = words(entry.get(self.words), self.words)
        # Nothing in this form says which steps are of one episode but their goal.
        yield Item(where, str(entry.get("goal")), truth.kind, image, goal, truth, before=tuple(before))

    def score(self, truth: Truth, actions: Sequence[Single], size: tuple[int, int]) -> dict[str, float]:
        """See `Benchmark`."""
        return {"accuracy": float(any(_right(truth, action) for action in actions))}


@BENCHMARKS.register("android-control-low")
class AndroidControlLow(AndroidControl):
    """Low level: the words are the step's own instruction."""

    words: ClassVar[str] = "step_instruction"


def _right(truth: Truth, action: Single) -> bool:
    if truth.kind in POINTED:
        return isinstance(action, POINTED[truth.kind]) and inside(pointed([action]), truth.box)
    if truth.kind in KEYS:
        return isinstance(action, KEYS[truth.kind])
    if truth.kind == "input_text":
        return isinstance(action, Type) and same_words(action.text, truth.text)
    if truth.kind == "open_app":
        return isinstance(action, OpenApp) and same_words(action.name, truth.text)
    if truth.kind == "status":
        return isinstance(action, Finished) and action.status == truth.text
    return direction_of(action) == truth.text


def _truth(action: dict[str, Any], tree: Any) -> Truth:
    kind = words(action.get("action_type"), "action_type").lower()
    if kind in POINTED:
        point = number(action.get("x"), "x of the action"), number(action.get("y"), "y of the action")
        return Truth(kind, smallest(point, tree), point)
    if kind in KEYS:
        return Truth(kind)
    if kind == "status":
        status = words(action.get("goal_status"), "goal_status").lower()
        if status not in STATUSES:
            raise ValueError(f"goal_status {status!r} is none of {', '.join(STATUSES)}")
        return Truth(kind, text=STATUSES[status])
    field = {"input_text": "text", "open_app": "app_name", "scroll": "direction"}.get(kind)
    if field is None:
        raise ValueError(f"action_type {kind!r} is not known")
    text = words(action.get(field), field)
    return Truth(kind, text=text.lower() if kind == "scroll" else text)


def smallest(point: tuple[float, float], tree: Any) -> Box:
    """The box of the smallest node that holds a point. Raises ValueError where none does."""
    found = []
    for node in tree if isinstance(tree, list) else []:
        sides = node.get("bbox_pixels") if isinstance(node, dict) else None
        if isinstance(sides, dict):
            box = [sides.get(name) for name in ("x_min", "y_min", "x_max", "y_max")]
            try:
                found.append(corners(box, "bbox_pixels"))
            except ValueError:
                continue  # nodes that are scrolled away are recorded with sides that have changed places
    holding = [box for box in found if inside(point, box)]
    if not holding:
        raise ValueError(f"no node of accessibility_tree holds the point {point}")
    return min(holding, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
