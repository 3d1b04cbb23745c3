"""ScreenSpot-v2 and ScreenSpot-Pro: which place on a screen is meant (arXiv 2410.23218, 2504.07981).

Read: lists of {img_filename, bbox [left, top, right, bottom] in pixels, instruction, id, application, platform,
ui_type, group}, the form of ScreenSpot-Pro to which others are converted. ScreenSpot-v2's own files name [left, top,
width, height]: they must be converted first, which nothing in them tells. An answer is right if its point lies in the
box; the edges count (ours, not told).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from agentkv.envs.actions import Single

from .items import BENCHMARKS, Benchmark, Item, Reader, Truth, corners, inside, pointed, words


class Grounding(Benchmark):
    """Base of sets that ask for a place."""

    image: ClassVar[str] = "img_filename"
    instruction: ClassVar[str] = "instruction"
    groups: ClassVar[tuple[str, ...]] = ("group", "platform", "application")
    kind: ClassVar[str] = "ui_type"

    def items_of(self, reader: Reader, where: str, entry: dict[str, Any]) -> Iterator[Item]:
        """See `Benchmark`."""
        goal, box = words(entry.get(self.instruction), self.instruction), corners(entry.get("bbox"))
        image = reader.picture(entry.get(self.image))
        # Ids of one file may be those of another: the place is the item's own.
        group = next((str(entry[name]) for name in self.groups if entry.get(name)), where.rsplit(" entry", 1)[0])
        kind = entry.get(self.kind)
        group = f"{group} {kind}" if isinstance(kind, str) and kind else group
        yield Item(where, str(entry.get(self.image)), group, image, goal, Truth("point", box))

    def score(self, truth: Truth, actions: Sequence[Single], size: tuple[int, int]) -> dict[str, float]:
        """See `Benchmark`."""
        return {"accuracy": float(inside(pointed(actions), truth.box))}


@BENCHMARKS.register("screenspot")
class ScreenSpot(Grounding):
    """ScreenSpot-v2 and -Pro."""
