"""The trajectories of a folder in AgentNetBench's layout: `DIR/<task>.json` with pictures in `DIR/images`.

What cannot be read is left out with one line that says where and why; the rest is used. Files are data from elsewhere:
numbers must be finite, and a picture is named by a plain file name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from textkv.records import parse

from .atoms import POINTED, Atom, Box, Point, key_word, sign

MAX_BYTES = 64_000_000  # of a file; published trajectories have 16 to 40 KB


@dataclass(frozen=True)
class Step:
    """One step: the picture that it saw, what the annotator thought, and the options that are right.

    Attributes:
        number: its number in the recording; numbers have gaps.
        image: its picture; None where there is none to be read.
        options: the ground truth, then its alternatives; never empty, nor is any of them.
        code: the recorded action; it may differ from the ground truth, so it is never scored.
    """

    number: int
    image: Path | None
    options: tuple[tuple[Atom, ...], ...]
    observation: str = ""
    thought: str = ""
    instruction: str = ""
    code: str = ""


@dataclass(frozen=True)
class Trajectory:
    """One recorded task; `mac`: recorded on macOS, whose command key counts as ctrl."""

    task: str
    goal: str
    steps: tuple[Step, ...]
    mac: bool = False


@dataclass
class _Reader:
    """Reads one folder; `problems` has a line for everything left out."""

    images: Path
    look: bool
    problems: list[str] = field(default_factory=list)

    def trajectory(self, value: Any, name: str) -> Trajectory:
        """A file's content. Raises ValueError for one that is no trajectory, or has no readable step."""
        if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
            raise ValueError("it is not a trajectory (no list of steps)")
        goal = value.get("high_level_task_description") or value.get("user_task_description")
        if not isinstance(goal, str) or not goal.strip():
            raise ValueError("it has no high_level_task_description")
        task = str(value.get("task_id") or Path(name).stem)
        about = value.get("meta_info") if isinstance(value.get("meta_info"), dict) else {}
        mac = about.get("system") == "Darwin"
        steps = tuple(self._steps(value["steps"], task, mac))
        if not steps:
            raise ValueError("none of its steps can be read")
        return Trajectory(task, goal, steps, mac)

    def _steps(self, values: list[Any], task: str, mac: bool) -> Iterator[Step]:
        seen: set[int] = set()
        for place, value in enumerate(values):
            named = value.get("step_num", place) if isinstance(value, dict) else place
            number = named if isinstance(named, int) else place
            try:
                if number in seen:
                    raise ValueError("another step has this number")
                seen.add(number)
                yield self._step(value, number, f"{task} step {number}", mac)
            except (ValueError, OverflowError) as error:
                self.problems.append(f"{task} step {number}: {error}; left out")

    def _step(self, value: Any, number: int, where: str, mac: bool) -> Step:
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        truth = option_of(value.get("ground_truth_actions"), mac)
        options = [truth]
        for place, other in enumerate(_list(value.get("alternative_options")), 1):
            try:
                options.append(option_of(other, mac))
            except (ValueError, OverflowError) as error:
                self.problems.append(f"{where}, alternative {place}: {error}; left out")
        told = value.get("inner_monologue") if isinstance(value.get("inner_monologue"), dict) else {}
        words = (_text(told.get(name)) for name in ("observation", "thought", "low_level_instruction"))
        return Step(number, self._image(value.get("image"), where), tuple(options), *words, _text(value.get("action")))

    def _image(self, name: Any, where: str) -> Path | None:
        """The picture of a step, looked through if pictures are needed; None with a line where there is none."""
        if not isinstance(name, str) or not name or Path(name).name != name:
            return self._missing(f"{where}: image {name!r} is not a file name")
        path = self.images / name
        if not self.look:
            return path
        try:
            with Image.open(path) as picture:
                picture.verify()
        except FileNotFoundError:
            return self._missing(f"{where}: there is no image {path}")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return self._missing(f"{where}: image {path} cannot be read ({str(error).splitlines()[0]})")
        return path

    def _missing(self, line: str) -> None:
        if self.look:
            self.problems.append(f"{line}; this step is not asked")


def read(folder: Path, images: Path | None = None, look: bool = True) -> tuple[list[Trajectory], list[str]]:
    """All trajectories of a folder by file name, and a line for everything that was left out.

    `images`: where the pictures are (None: `folder`/images). `look`: whether pictures are needed; without, nothing is
    said of missing ones. A `mapping*.json` is no trajectory and passed over.

    Raises:
        FileNotFoundError: no such folder, or no file in it.
        ValueError: not one trajectory could be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data {folder}: there is no such folder; give the one that holds <task>.json files")
    images = images or folder / "images"
    if look and not images.is_dir():
        raise FileNotFoundError(f"images {images}: there is no such folder; say with --images where the pictures are")
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith("mapping")]
    if not paths:
        raise FileNotFoundError(f"data {folder}: no <task>.json in it")
    reader, found = _Reader(images, look), {}
    for path in paths:
        try:
            one = reader.trajectory(_json(path), path.name)
            if one.task in found:
                raise ValueError(f"task {one.task} was in another file already")
        except (ValueError, OSError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            reader.problems.append(f"{path.name}: {said}; left out")
        else:
            found[one.task] = one
    if not found:
        raise ValueError(f"data {folder}: no trajectory could be read: {reader.problems[0]}")
    return list(found.values()), reader.problems


def _json(path: Path) -> Any:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_BYTES}")
    return parse(path.read_bytes(), finite=False)  # a number is refused with its step


def option_of(value: Any, mac: bool) -> tuple[Atom, ...]:
    """One list of actions in the published schema. Raises ValueError for anything else, the empty list included."""
    if not isinstance(value, list) or not value:
        raise ValueError("it has no list of actions")
    return tuple(_atom(one, mac) for one in value)


def _atom(value: Any, mac: bool) -> Atom:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise ValueError("an action has no type")
    params = value.get("params") if isinstance(value.get("params"), dict) else {}
    kind = kind.lower().replace("_", "")
    return Atom(kind, **_FIELDS.get(kind, _nothing)(params, value, mac))


def _nothing(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    return {}


def _pointed(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    about = value.get("metadata") if isinstance(value.get("metadata"), dict) else {}
    boxes = (one.get("rel_bbox") for one in _list(about.get("bboxes")) if isinstance(one, dict))
    return {"point": _point(params.get("position")), "boxes": tuple(_box(box) for box in boxes if box is not None)}


def _written(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    text = params.get("content") or params.get("text") or ""
    if not isinstance(text, str):
        raise ValueError("the text of a write is not text")
    return {"text": text}


def _pressed(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    keys = params.get("keys", [])
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the keys of a press are not names")
    return {"keys": tuple(key_word(key, mac) for key in keys)}


def _scrolled(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    amount = params.get("amount", params.get("pixels"))
    if amount is None:
        words = {"up": 1, "positive": 1, "down": -1, "negative": -1}
        return {"direction": words.get(str(params.get("direction", "")).strip().lower(), 0)}
    amount = _number(amount, "the amount of a scroll")
    return {"amount": amount, "direction": sign(amount)}


def _ended(params: dict, value: dict, mac: bool) -> dict[str, Any]:
    return {"status": _text(params.get("status"))}


_FIELDS: dict[str, Callable[[dict, dict, bool], dict[str, Any]]] = dict.fromkeys(POINTED, _pointed)
_FIELDS |= {"write": _written, "press": _pressed, "hotkey": _pressed, "scroll": _scrolled, "terminate": _ended}


def _point(value: Any) -> Point:
    if not isinstance(value, dict):
        raise ValueError("a pointed action has no position")
    return _number(value.get("x"), "x of a position"), _number(value.get("y"), "y of a position")


def _box(value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError("a rel_bbox is not [x, y, width, height]")
    x, y, width, height = (_number(one, "a side of a rel_bbox") for one in value)
    return x, y, width, height


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{name} is not a finite number")
    return float(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
