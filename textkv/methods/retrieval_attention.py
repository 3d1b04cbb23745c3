"""RetrievalAttention: vector search over the keys in host memory (arXiv 2409.10516).

First and recent tokens stay on the device; of all others each query head finds the keys of largest product, and the
attention over both is merged exactly. Queries lie far from the keys, so that an index built from keys alone compares
many of them; the graph also joins keys that the prompt's queries wanted together (`textkv.retrievers.projection`).

No code was released (the repository of that name holds RetroInfer). Here one graph serves the query heads of a KV head,
the paper builds one for each; its connectivity phase, a search for every key, is replaced by the lowest level of faiss'
HNSW; its pivots, by how much more often than by chance two keys are wanted together, which finds more at less. What is
retrieved is attended on the model's device, not on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.retrieval import Retrieval
from textkv.retrievers.base import Retriever
from textkv.retrievers.engines import library
from textkv.retrievers.vectors import Kind, Vectors
from textkv.segments.tiered import Plan


@register("retrieval_attention")
@dataclass(frozen=True)
class RetrievalAttention(Retrieval):
    """The budget is first + recent + retrieved tokens: 740t with the defaults retrieves 100, as in the paper.

    Attributes:
        index: "graph" (the paper's), "hnsw", "ivf" (faiss' own), or "exact", which compares every key and needs no
            faiss.
        effort: nodes that a search of a graph follows, or lists of an ivf that it reads; 0 = as many as the retrieved
            tokens (hnsw: twice as many), or an eighth of the lists.
        degree: edges of a node by distance; the graph adds twice as many of its own.
        few: a head with at most so many tokens on the host is searched exactly.
        sample: every how many-th query of the prompt trains the graph; 4 = a quarter.
    """

    first: int = 128
    recent: int = 512
    index: Kind = "graph"
    effort: int = 0
    degree: int = 16
    few: int = 2048
    sample: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index not in get_args(Kind):
            raise ValueError(f"index={self.index!r}: use {', '.join(get_args(Kind))}")
        for name, least in (("effort", 0), ("degree", 2), ("few", 1), ("sample", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: use {least} or more")

    def needs(self) -> Needs:
        """A sample of the prompt's queries, for the graph."""
        return Needs(query_sample=self.sample if self.index == "graph" else 0)

    def on_build(self, context: Context) -> None:
        """See that the library is there.

        Raises:
            ValueError: it is not.
        """
        super().on_build(context)
        if self.index != "exact":
            library()

    def retriever(self, layer: Layer, plan: Plan, evidence: Evidence) -> Retriever:
        """One index for each KV head."""
        return Vectors(
            self.index, self.effort, self.degree, self.few, evidence.sampled, evidence.sampled_positions
        )  # fmt: skip
