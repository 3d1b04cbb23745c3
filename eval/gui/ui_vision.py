"""UI-Vision: elements of desktop applications, by name, function or place (arXiv 2503.15661).

Read: lists of {image_path, prompt_to_evaluate, bbox [left, top, right, bottom] in pixels, element_type, category}. The
paths lie below the folder of images.
"""

from __future__ import annotations

from typing import ClassVar

from .items import BENCHMARKS
from .screenspot import Grounding


@BENCHMARKS.register("ui-vision")
class UIVision(Grounding):
    """UI-Vision's basic, functional and spatial files; each is a group of its own where no category is named."""

    image: ClassVar[str] = "image_path"
    instruction: ClassVar[str] = "prompt_to_evaluate"
    groups: ClassVar[tuple[str, ...]] = ("category",)
    kind: ClassVar[str] = "element_type"
