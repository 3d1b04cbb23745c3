"""Search among the keys of one head by largest product: faiss, with its own graphs and lists, or with our edges.

A product is no distance: a graph that is built by products cannot be walked well. So graphs are built by Euclidean
distance and searched by product, over one copy of the keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from textkv.retrievers.projection import without_repeats


def library() -> Any:
    """faiss.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "faiss is not installed: pip install 'agentkv[retrieval]', or use retrieval_attention(index='exact')"
        ) from None
    return faiss


@contextmanager
def _alone(faiss: Any) -> Iterator[None]:
    """One thread: an index is then the same every time it is built."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class Engine(ABC):
    """An index over keys fp32 [n, head_dim], numbered as they were added; `effort` says how much a search looks at."""

    effort: int

    @abstractmethod
    def add(self, keys: torch.Tensor) -> None:
        """More keys, fp32 [m, head_dim]."""

    @abstractmethod
    def search(self, q: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
        """Numbers int64 [queries, k] of the best keys for fp32 [queries, head_dim], -1 where fewer were found, and how
        many keys were compared."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the library holds for it."""


class Graph(Engine):
    """A graph by Euclidean distance (HNSW), alone or with edges of ours beside its own.

    Args:
        keys: fp32 [n, head_dim].
        degree: edges of a node on the upper levels; twice as many on the lowest.
        effort: nodes that a search follows; more find more and compare more. 0 = twice as many as are asked for, with
            edges of ours as many.
        edges: int32 [n, d], -1 = none: then the lowest level alone is searched, with these edges too, from the node to
            which most of them lead.
    """

    def __init__(self, keys: torch.Tensor, degree: int, effort: int, edges: torch.Tensor | None = None) -> None:
        faiss = library()
        self._degree, self.effort, self._edges = degree, effort, edges
        # One storage that measures by either: the index asks it for what it says at the moment.
        self._keys = faiss.IndexFlat(keys.shape[1], faiss.METRIC_L2)
        self._base = faiss.IndexHNSW(self._keys, degree)
        self._joined: Any = None
        self.add(keys)

    def add(self, keys: torch.Tensor) -> None:
        """Nodes find their neighbours by distance; edges of ours only the first keys have."""
        self._measure(library().METRIC_L2)
        with _alone(library()):
            self._base.add(keys.numpy())
        self._measure(library().METRIC_INNER_PRODUCT)
        self._joined = None if self._edges is None else self._join()

    def search(self, q: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
        """Best first; the greedy walk of HNSW."""
        index, stats = self._joined or self._base, library().cvar.hnsw_stats
        how = library().SearchParametersHNSW(efSearch=self.effort or (k if self._joined else 2 * k))
        stats.reset()
        with _alone(library()):
            _, found = index.search(q.numpy(), k, params=how)
        return torch.from_numpy(found), int(stats.ndis)

    def nbytes(self) -> int:
        """Keys and neighbours."""
        own = self._keys.ntotal * self._keys.d * 4 + 4 * self._base.hnsw.neighbors.size()
        return own + (4 * self._joined.hnsw.neighbors.size() if self._joined else 0)

    def _measure(self, metric: int) -> None:
        self._keys.metric_type = self._base.metric_type = metric
        # Newer versions note what the index was made with, and would go on to walk by it.
        if hasattr(self._base.hnsw, "is_similarity"):
            self._base.hnsw.is_similarity = metric == library().METRIC_INNER_PRODUCT

    def _join(self) -> Any:
        """An index of one level over the same keys, whose neighbours are the base's and ours."""
        faiss, hnsw, n = library(), self._base.hnsw, self._keys.ntotal
        starts = torch.from_numpy(faiss.vector_to_array(hnsw.offsets).astype("int64"))[:n]
        lowest = starts[:, None] + torch.arange(2 * self._degree)
        near = torch.from_numpy(faiss.vector_to_array(hnsw.neighbors))[lowest]
        ours = torch.full((n, self._edges.shape[1]), -1, dtype=torch.int32)
        ours[: len(self._edges)] = self._edges
        edges = without_repeats(torch.cat([ours, near], 1))
        width = edges.shape[1]
        joined = faiss.IndexHNSW(self._keys, max(2, width // 2))
        joined.metric_type, joined.ntotal, joined.is_trained = faiss.METRIC_INNER_PRODUCT, n, True
        graph = joined.hnsw
        for place, numbers in (
            (graph.levels, torch.ones(n, dtype=torch.int32)),
            (graph.offsets, torch.arange(n + 1) * width),
            (graph.neighbors, edges.flatten()),
            (graph.cum_nneighbor_per_level, torch.tensor([0, width, width], dtype=torch.int32)),
        ):
            array = numbers.numpy()
            faiss.copy_array_to_vector(array.astype("uint64") if array.dtype == "int64" else array, place)
        led = ours[ours >= 0]
        graph.entry_point = int(led.bincount().argmax()) if len(led) else hnsw.entry_point
        graph.max_level = 0
        return joined


class Lists(Engine):
    """Clusters of keys (IVF): a query reads the keys of the clusters whose centre it likes best.

    Args:
        keys: fp32 [n, head_dim].
        effort: clusters that a search reads; 0 = an eighth.
    """

    def __init__(self, keys: torch.Tensor, effort: int) -> None:
        faiss = library()
        n, dim = keys.shape
        # As many clusters as keys in each; their centres are compared too.
        self._clusters = max(1, round(n**0.5))
        self.effort = effort
        self._centres = faiss.IndexFlatIP(dim)
        self._index = faiss.IndexIVFFlat(self._centres, dim, self._clusters, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.min_points_per_centroid = 1
        with _alone(faiss):
            self._index.train(keys.numpy())
        self.add(keys)

    def add(self, keys: torch.Tensor) -> None:
        """Each key goes to its cluster; centres stay."""
        with _alone(library()):
            self._index.add(keys.numpy())

    def search(self, q: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
        """Best first among the clusters read."""
        stats = library().cvar.indexIVF_stats
        stats.reset()
        lists = min(self.effort or -(-self._clusters // 8), self._clusters)
        with _alone(library()):
            _, found = self._index.search(q.numpy(), k, params=library().SearchParametersIVF(nprobe=lists))
        return torch.from_numpy(found), int(stats.ndis) + len(q) * self._clusters

    def nbytes(self) -> int:
        """Keys, their numbers, and the centres."""
        return self._index.ntotal * (4 * self._index.d + 8) + 4 * self._clusters * self._index.d
