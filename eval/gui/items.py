"""One question of a benchmark: a screenshot, words, and what is right; and the registry of benchmarks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from agentkv.envs.actions import Single
from textkv.records import listed, parse
from textkv.registry import Registry

MAX_BYTES = 512_000_000  # of one annotation file; the largest published one has 34 MB

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""(left, top, right, bottom)"""


@dataclass(frozen=True)
class Truth:
    """What is right at an item, in pixels of its screenshot.

    Attributes:
        kind: the action, in the benchmark's own word; "point" where only a place is asked for.
        box: where a pointed action must lie; None = nothing is known or asked.
        point: the recorded point, or None.
        text: what is typed, an app's name, a direction, a status.
    """

    kind: str
    box: Box | None = None
    point: Point | None = None
    text: str = ""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        name: its own within the benchmark.
        task: the episode, or whatever is drawn as a whole when intervals are made.
        group: the part of the benchmark under which it has a row of its own.
        image: the screenshot.
        goal: the words.
        truth: what is right.
        size: (width, height) in which `truth` counts; None = pixels of the screenshot.
        before: earlier steps in words, oldest first.
    """

    name: str
    task: str
    group: str
    image: Path
    goal: str
    truth: Truth
    size: tuple[float, float] | None = None
    before: tuple[str, ...] = ()

    def sized(self, picture: tuple[int, int]) -> Truth:
        """The truth in pixels of a picture (width, height)."""
        if self.size is None:
            return self.truth
        x, y = picture[0] / self.size[0], picture[1] / self.size[1]
        box, point = self.truth.box, self.truth.point
        return Truth(
            self.truth.kind,
            None if box is None else (box[0] * x, box[1] * y, box[2] * x, box[3] * y),
            None if point is None else (point[0] * x, point[1] * y),
            self.truth.text,
        )


class Benchmark(ABC):
    """How one set is read and scored. A subclass is made without arguments.

    Attributes:
        metrics: names of the scores of an item, 0 to 1; the first is what the benchmark is known by.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def items(self, reader: Reader) -> Iterator[Item]:
        """The questions of a folder, in the order of its files. Problems are told to the reader."""
        for where, entry in reader.entries():
            try:
                yield from self.items_of(reader, where, entry)
            except ValueError as error:
                reader.left_out(where, error)

    @abstractmethod
    def items_of(self, reader: Reader, where: str, entry: dict[str, Any]) -> Iterator[Item]:
        """The questions of one entry at the place `where`. Raises ValueError for what cannot be asked or scored."""

    @abstractmethod
    def score(self, truth: Truth, actions: Sequence[Single], size: tuple[int, int]) -> dict[str, float]:
        """What the gestures of one answer are worth, by `metrics`: points and truth in pixels of a picture of `size`
        (width, height). No gestures, no score.
        """


BENCHMARKS = Registry("benchmark", "agentkv.benchmarks", "eval.gui.items.Benchmark")
"""Benchmarks by name."""


@dataclass
class Reader:
    """Reads a folder of annotations; what cannot be read is left out with a line in `problems`.

    Attributes:
        folder: of the annotations.
        images: of the pictures.
    """

    folder: Path
    images: Path
    problems: list[str] = field(default_factory=list)

    def entries(self, pattern: str = "*.json") -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of all lists in files of that name, each with its place in words. A file may be a list, or JSON
        lines."""
        for path in sorted(self.folder.glob(pattern)):
            try:
                if path.stat().st_size > MAX_BYTES:
                    raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
                data = path.read_bytes()
                values = (
                    list(self._lines(path, data))
                    if path.suffix == ".jsonl"
                    else listed(parse(data, finite=False), Any, "it")
                )
            except (OSError, ValueError) as error:
                self.left_out(str(path), error)
                continue
            for number, value in enumerate(values):
                where = f"{path.name} entry {number}"
                if isinstance(value, dict):
                    yield where, value
                else:
                    self.problems.append(f"{where}: it is no object; left out")

    def _lines(self, path: Path, data: bytes) -> Iterator[Any]:
        """The values of the lines; one that is damaged is left out alone."""
        for number, line in enumerate(data.splitlines(), 1):
            try:
                if line.strip():
                    yield parse(line, finite=False)  # an entry may be refused for it, the file must not
            except ValueError as error:
                self.left_out(f"{path}:{number}", error)

    def left_out(self, where: str, why: object) -> None:
        """Takes down what was left out."""
        self.problems.append(f"{where}: {str(why).splitlines()[0]}; left out")

    def picture(self, name: Any) -> Path:
        """The path of a picture that a file names, looked through.

        Raises:
            ValueError: no name, one that leads out of the folder, no such picture, or one that cannot be read.
        """
        path = (self.images / name).resolve() if isinstance(name, str) and name else None
        # A name of the data may lie in a folder below, and nowhere else.
        if path is None or not path.is_relative_to(self.images.resolve()):
            raise ValueError(f"image {name!r} is not the name of a file in {self.images}")
        try:
            with Image.open(path) as picture:
                picture.verify()
        except FileNotFoundError:
            raise ValueError(f"there is no image {path}") from None
        except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {path} cannot be read ({str(error).splitlines()[0]})") from None
        return path


def read(benchmark: Benchmark, folder: Path, images: Path | None = None) -> tuple[list[Item], list[str]]:
    """The questions of a folder, and a line for everything that was left out.

    Args:
        images: folder of the pictures; None = "images" in `folder`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not one question could be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data {folder}: there is no such folder; give the one that holds the annotations")
    reader = Reader(folder, images or folder / "images")
    items = list(benchmark.items(reader))
    if not items:
        raise ValueError(f"data {folder}: nothing of {benchmark.name} can be read ({'; '.join(reader.problems[:3])})")
    return items, reader.problems


# ---- values of a file ----------------------------------------------------------------------------------------------


def number(value: Any, what: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{what} is not a finite number")
    return float(value)


def words(value: Any, what: str) -> str:
    """A text that says something. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it has no {what}")
    return value.strip()


def corners(value: Any, what: str = "bbox") -> Box:
    """[left, top, right, bottom]. Raises ValueError for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{what} is not [left, top, right, bottom]")
    left, top, right, bottom = (number(x, f"a side of {what}") for x in value)
    if left > right or top > bottom:
        raise ValueError(f"{what} {value} has no inside")
    return left, top, right, bottom


def inside(point: Point | None, box: Box | None) -> bool:
    """Whether a point lies in a box, its edges included."""
    return point is not None and box is not None and box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def pointed(actions: Sequence[Single]) -> Point | None:
    """The first point that an answer names."""
    for action in actions:
        x, y = getattr(action, "x", None), getattr(action, "y", None)
        if x is not None and y is not None:
            return x, y
    return None


def same_words(one: str, other: str) -> bool:
    """Whether two texts are the same but for case and spaces."""
    return one.lower().split() == other.lower().split()
