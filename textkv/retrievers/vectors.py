"""Vector search: for every query head the keys of largest product, exactly or through an index (arXiv 2409.10516).

One index serves the query heads of a KV head. Few tokens are compared one by one, whatever the index: it would cost
more than it saves. An index of a library is not saved, not sent with a pickle, and no two copies of a cache share one
that grows: what is put down is in which batches its keys came. Built again from these it is the same index.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Literal

import torch

from textkv.retrievers.base import Retriever, register_retriever
from textkv.retrievers.engines import Engine, Graph, Lists
from textkv.retrievers.projection import wanted_together

Kind = Literal["exact", "hnsw", "ivf", "graph"]
NEAREST = 200
"""Keys that a training query wants: more than a search asks for, so that the edge of a list is no edge of the graph."""


@register_retriever("vectors")
class Vectors(Retriever):
    """An index for each KV head.

    Args:
        kind: "exact" compares all; "hnsw" and "ivf" are the library's; "graph" is hnsw's lowest level with edges
            between keys that the prompt's queries wanted together.
        effort: of a search: nodes that it follows in a graph, clusters that it reads of an ivf.
        degree: edges of a node; in a "graph", of the library's on its lowest level, beside twice as many of ours.
        few: up to so many tokens of a head are compared one by one.
        queries: [batch, heads, s, head_dim] of the prompt, for "graph"; let go of when the index is built.
        queries_at: int32 [batch, s], -1 = none.

    Attributes:
        edges: int32 [batch, kv_heads, n, d] on the host, the graph's own: slots that each slot leads to, -1 = none. Of
            the tokens of the first build: later ones have none.
        seconds: that building has taken.
    """

    def __init__(
        self,
        kind: Kind,
        effort: int,
        degree: int,
        few: int,
        queries: torch.Tensor | None = None,
        queries_at: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.effort, self.degree, self.few = kind, effort, degree, few
        self._queries = None if queries is None else (queries.cpu(), queries_at.cpu())
        self.edges: torch.Tensor | None = None
        self.seconds = 0.0
        self._engines: dict[tuple[int, int], Engine] = {}
        # How many keys each index took in at a time: also of those that are to be built again.
        self._batches: dict[tuple[int, int], list[int]] = {}
        self._shared = False

    def build(self, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Indexes of all heads, where there are enough tokens for one."""
        begin = perf_counter()
        self._engines, self._batches, self._shared = {}, {}, False
        batch, heads, self.length = positions.shape
        if self.kind == "graph" and self._queries is not None and self.length > self.few:
            self.edges = torch.stack(
                [torch.stack([self._edges_of(keys, positions, b, g) for g in range(heads)]) for b in range(batch)]
            )
        self._queries = None
        self._wake(keys, positions)
        self.seconds += perf_counter() - begin

    def update(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """New tokens join every index together."""
        begin, first = perf_counter(), self.length
        if self._shared:
            self._engines, self._shared = {}, False
        for at, batches in self._batches.items():
            if at not in self._engines:
                self._engines[at] = self._built(keys, positions[:, :, :first], at)
            new = _slots(positions[at][first:]) + first
            if len(new):
                self._engines[at].add(keys[at][new].float())
                batches.append(len(new))
        self.length = positions.shape[2]
        self._wake(keys, positions)
        self.seconds += perf_counter() - begin

    def keep(self, index: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Indexes of heads that lost a token are built when they are next asked; edges among what stays are kept."""
        stay = (index >= 0).sum(-1)
        self._batches = {at: batches for at, batches in self._batches.items() if sum(batches) == int(stay[at])}
        self._engines = {at: engine for at, engine in self._engines.items() if at in self._batches}
        if self.edges is not None:
            known = self.edges.shape[2]
            # New numbers of old slots; one column more for those that are none.
            now = torch.full((*index.shape[:2], max(self.length, known) + 1), -1, dtype=torch.int32)
            column = torch.arange(index.shape[-1], dtype=torch.int32).expand(index.shape)
            now.scatter_(-1, index.masked_fill(index < 0, now.shape[-1] - 1), column)
            now[..., -1] = -1
            rows = index[..., : int((index < known).sum(-1).max())].clamp(min=0, max=known - 1)
            edges = self.edges.gather(2, rows[..., None].expand(*rows.shape, self.edges.shape[3])).long()
            moved = now.gather(-1, edges.clamp(min=0).flatten(2)).view(edges.shape)
            late = (index[..., : rows.shape[-1]] < 0) | (index[..., : rows.shape[-1]] >= known)
            self.edges = moved.masked_fill((edges < 0) | late[..., None], -1)
        self.length = index.shape[-1]

    def query(self, q: torch.Tensor, room: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The best keys of every query head: int64 [batch, heads, c]."""
        self._wake(keys, positions)
        heads = keys.shape[1]
        queries = q[:, :, 0].float().cpu().unflatten(1, (heads, -1))
        c = min(int(room.max()), self.length)
        found = torch.full((*queries.shape[:3], c), -1, dtype=torch.int64)
        self.compared = 0
        for b, g in ((b, g) for b in range(len(q)) for g in range(heads)):
            most = min(int(room[b]), self.length)
            if most:
                best = self._best(queries[b, g], most, keys[b, g], positions[b, g], (b, g))
                found[b, g, :, : best.shape[1]] = best
        return found.flatten(1, 2)

    def search_with(self, effort: int) -> None:
        """From now on searches look at so much: nothing is built anew."""
        self.effort = effort
        for engine in self._engines.values():
            engine.effort = effort

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rows that come twice share an index until one of them grows."""
        super().take_rows(rows)
        self._shared = True
        heads = [((new, g), (b, g)) for new, old in enumerate(rows.tolist()) for b, g in self._batches if b == old]
        self._engines = {new: self._engines[old] for new, old in heads if old in self._engines}
        self._batches = {new: list(self._batches[old]) for new, old in heads}

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """The edges of ours."""
        return {} if self.edges is None else {"edges": self.edges}

    def library_bytes(self) -> int:
        """Bytes that indexes hold beside all tensors."""
        return sum(engine.nbytes() for engine in self._engines.values())

    def state(self) -> dict[str, Any]:
        """Without the indexes, but with how they came about: rows [row, head, batch, batch, ..]."""
        own = {name: x for name, x in self.__dict__.items() if not name.startswith("_")}
        return own | {"batches": [[*at, *batches] for at, batches in self._batches.items()]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Retriever:
        """Indexes are built when they are asked."""
        retriever = cls(state["kind"], state["effort"], state["degree"], state["few"])
        retriever._batches = {(b, g): batches for b, g, *batches in state.pop("batches", [])}
        retriever.__dict__.update(state)
        for name, x in retriever.host_tensors().items():
            setattr(retriever, name, x.cpu())
        return retriever

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engines": {}}

    def __deepcopy__(self, memo: dict) -> Vectors:
        other = Vectors.__new__(Vectors)
        other.__dict__.update(self.__dict__)
        for name, x in self.host_tensors().items():
            setattr(other, name, x.clone())
        # Both read the same indexes; who grows first makes its own.
        self._shared = other._shared = True
        other._engines = dict(self._engines)
        other._batches = {at: list(batches) for at, batches in self._batches.items()}
        return other

    def _best(self, q, most: int, keys, positions, at: tuple[int, int]) -> torch.Tensor:
        """Slots int64 [group, c] for the queries fp32 [group, head_dim] of one KV head."""
        engine, slots = self._engines.get(at), _slots(positions)
        if most >= len(slots):  # no index may miss what there is room for
            self.compared += len(q) * len(slots)
            return slots.expand(len(q), -1)
        if engine is None:
            scores = (q @ keys.float().T).masked_fill(positions < 0, -torch.inf)
            best = scores.topk(most, dim=-1)
            self.compared += len(q) * int((positions >= 0).sum())
            return best.indices.masked_fill(best.values == -torch.inf, -1)
        ids, compared = engine.search(q, most)
        self.compared += compared
        return slots[ids.clamp(min=0, max=len(slots) - 1)].masked_fill(ids < 0, -1)

    def _edges_of(self, keys: torch.Tensor, positions: torch.Tensor, b: int, g: int) -> torch.Tensor:
        """Edges of one KV head, in slots: int32 [n, d]; none where it has few tokens."""
        queries, at = self._queries
        group = queries.shape[1] // keys.shape[1]
        own = queries[b, g * group : (g + 1) * group][:, at[b] >= 0].flatten(0, 1).float()
        slots = _slots(positions[b, g])
        own = own if len(slots) > self.few else own[:0]
        found, _ = wanted_together(keys[b, g, slots].float(), own, NEAREST, 2 * self.degree)
        edges = torch.full((self.length, found.shape[1]), -1, dtype=torch.int32)
        edges[slots] = slots[found.clamp(min=0).long()].int().masked_fill(found < 0, -1)
        return edges

    def _wake(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Makes the indexes that there should be and are not; they number a head's tokens without its holes."""
        if self.kind == "exact" or self.length <= self.few:
            return
        for at in ((b, g) for b in range(keys.shape[0]) for g in range(keys.shape[1]) if (b, g) not in self._engines):
            # A head's own tokens count, not its slots: its neighbours' length is nothing to it.
            if (held := int((positions[at] >= 0).sum())) > self.few:
                self._batches.setdefault(at, [held])
                self._engines[at] = self._built(keys, positions, at)

    def _built(self, keys: torch.Tensor, positions: torch.Tensor, at: tuple[int, int]) -> Engine:
        """The index of a head's keys, which come to it batch by batch as they once did."""
        slots = _slots(positions[at])
        first, *later = keys[at][slots].float().split(self._batches[at])
        engine = Lists(first, self.effort) if self.kind == "ivf" else self._graph(first, slots, *at)
        for batch in later:
            engine.add(batch)
        return engine

    def _graph(self, own: torch.Tensor, slots: torch.Tensor, b: int, g: int) -> Graph:
        if self.edges is None or not bool((self.edges[b, g] >= 0).any()):
            return Graph(own, self.degree, self.effort)
        number = torch.full((self.length,), -1, dtype=torch.int32)
        number[slots] = torch.arange(len(slots), dtype=torch.int32)
        edges = self.edges[b, g, slots[slots < self.edges.shape[2]]].long()
        edges = number[edges.clamp(min=0)].masked_fill(edges < 0, -1)
        return Graph(own, max(1, self.degree // 2), self.effort, edges)


def _slots(positions: torch.Tensor) -> torch.Tensor:
    """The slots int64 of one head that hold a token."""
    return (positions >= 0).nonzero()[:, 0]
