"""OSWorld-G: places on screens of a desktop (arXiv 2505.13227), in the form of ScreenSpot-Pro.

Read: the converted set, whose fields are ScreenSpot-Pro's. The own form of OSWorld-G also knows polygons and
instructions that must be refused; what its fields are called is not known here, and such items are not read.
"""

from __future__ import annotations

from .items import BENCHMARKS
from .screenspot import Grounding


@BENCHMARKS.register("osworld-g")
class OSWorldG(Grounding):
    """OSWorld-G and its refined instructions."""
