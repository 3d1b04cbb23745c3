"""Edges between keys that the same queries want: the attention-aware part of a graph (arXiv 2409.10516, RoarGraph).

Queries of a head lie far from its keys, so that keys which are close to each other need not be wanted together. Each
training query joins its nearest keys: one of them, the pivot, gets edges to the others. A few keys of large norm are
the nearest of most queries; published code lets queries of one pivot overwrite each other. Here the pivot is the first
key of a query's list that is not taken too often yet, and the candidates of all queries of a pivot are united.
"""

from __future__ import annotations

import torch

_PIVOTS = 256  # pivots that are pruned together


def projected(keys: torch.Tensor, queries: torch.Tensor, nearest: int, degree: int, most: int = 4) -> torch.Tensor:
    """Edges int32 [n, 2 * degree] among keys fp32 [n, head_dim], each row's own first and -1 behind them.

    Args:
        queries: fp32 [nq, head_dim], of all query heads that read these keys.
        nearest: keys of largest product that a query joins.
        degree: most edges that leave a pivot; as many that lead back are added.
        most: queries that may choose the same pivot while others of their list are free.
    """
    n = len(keys)
    nearest = min(nearest, n)
    none = torch.full((n, 2 * degree), -1, dtype=torch.int32)
    if not len(queries) or nearest < 2:
        return none
    lists = torch.cat([(part @ keys.T).topk(nearest).indices for part in queries.split(1024)])
    pivots = _spread(lists, n, most)
    pairs = torch.stack([pivots[:, None].expand_as(lists), lists], -1).flatten(0, 1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].unique(dim=0)
    out = torch.full((n, degree), -1, dtype=torch.int64)
    own, candidates = _by_pivot(pairs, keys, 3 * degree)
    for rows, some in zip(own.split(_PIVOTS), candidates.split(_PIVOTS), strict=True):
        out[rows] = _pruned(keys, rows, some, degree)
    return torch.cat([out, _reversed(out)], 1).int()


def without_repeats(edges: torch.Tensor) -> torch.Tensor:
    """Rows int [n, d] with each neighbour once, in the order of its first place, and -1 behind them: searches stop at
    the first -1."""
    order = edges.sort(dim=1, stable=True)
    again = torch.zeros_like(edges, dtype=torch.bool)
    again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    edges = edges.masked_fill(torch.zeros_like(again).scatter(1, order.indices, again), -1)
    return edges.gather(1, (edges < 0).int().sort(dim=1, stable=True).indices)


def _spread(lists: torch.Tensor, n: int, most: int) -> torch.Tensor:
    """The pivot of each list int64 [nq, nearest]: the first key that fewer than `most` lists have taken, else the first
    of all."""
    taken, pivots = [0] * n, []
    for wanted in lists.tolist():
        pivot = next((x for x in wanted if taken[x] < most), wanted[0])
        taken[pivot] += 1
        pivots.append(pivot)
    return torch.tensor(pivots)


def _by_pivot(pairs: torch.Tensor, keys: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pivots int64 [p] and the candidates of each, [p, most], by falling product with it, -1 behind them."""
    product = (keys[pairs[:, 0]] * keys[pairs[:, 1]]).sum(1)
    # Two stable sorts: by product, then by pivot.
    order = product.sort(descending=True, stable=True).indices
    order = order[pairs[order, 0].sort(stable=True).indices]
    pivot, candidate = pairs[order].unbind(1)
    own, row, count = pivot.unique(return_inverse=True, return_counts=True)
    rank = torch.arange(len(pivot)) - (count.cumsum(0) - count)[row]
    made = torch.full((len(own), most), -1, dtype=torch.int64)
    kept = rank < most
    made[row[kept], rank[kept]] = candidate[kept]
    return own, made


def _pruned(keys: torch.Tensor, pivots: torch.Tensor, candidates: torch.Tensor, degree: int) -> torch.Tensor:
    """At most `degree` of each pivot's candidates: one is left out while an accepted one is closer to it than the pivot
    is; free places are filled with the best of those."""
    there = candidates >= 0
    points = keys[candidates.clamp(min=0)]
    to_pivot = (points @ keys[pivots][..., None])[..., 0]
    between = points @ points.mT
    accepted = torch.zeros_like(there)
    for i in range(candidates.shape[1]):
        covered = (accepted & (between[:, i] > to_pivot[:, i : i + 1])).any(1)
        accepted[:, i] = there[:, i] & ~covered & (accepted.sum(1) < degree)
    # Accepted ones first, then the others, each in their order.
    place = torch.where(accepted, 0, torch.where(there, 1, 2)).sort(dim=1, stable=True).indices[:, :degree]
    chosen = candidates.gather(1, place)
    return torch.nn.functional.pad(chosen, (0, degree - chosen.shape[1]), value=-1)


def _reversed(edges: torch.Tensor) -> torch.Tensor:
    """Edges [n, d] the other way round, at most d for each."""
    source = torch.arange(len(edges))[:, None].expand_as(edges)[edges >= 0]
    target, order = edges[edges >= 0].sort(stable=True)
    count = torch.bincount(target, minlength=len(edges))
    rank = torch.arange(len(target)) - (count.cumsum(0) - count)[target]
    back = torch.full_like(edges, -1)
    kept = rank < edges.shape[1]
    back[target[kept], rank[kept]] = source[order][kept]
    return back
