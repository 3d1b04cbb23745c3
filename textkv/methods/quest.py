"""Quest: pages of tokens, chosen at every step by what their keys could at most score (arXiv 2406.10774).

The pages wait in host memory; the bounds of their keys, two vectors a page, stay on the device. The authors choose per
query head and leave the first two layers alone; we choose per KV head, by the largest bound over its query heads,
because the group's heads read the same rows. A budget of 1/8 with pages of 16 is about where the paper measures.
"""

from dataclasses import dataclass

from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import register
from textkv.retrieval import Retrieval
from textkv.retrievers.base import Retriever
from textkv.retrievers.pages import Pages
from textkv.segments.tiered import Plan


@register("quest")
@dataclass(frozen=True)
class Quest(Retrieval):
    """Ranks pages by bounds.

    Attributes:
        page: tokens of a page; the authors' is 16.
        dense: first layers that keep everything on the device; the authors' is 2.
    """

    page: int = 16
    dense: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page={self.page}: a page needs at least 1 token")

    def retriever(self, layer: Layer, plan: Plan, evidence: Evidence) -> Retriever:
        """Pages in the order of the text."""
        return Pages(self.page)
