"""Edges between keys that the same queries want: the attention-aware part of a graph (arXiv 2409.10516, RoarGraph).

Queries of a head lie far from its keys, so that keys which are close to each other need not be wanted together. The
paper's build joins the keys of a training query to one of them, its pivot, and prunes by products of keys. But a few
keys are wanted by most queries: they fill the edges of all others, although any search meets them at its first step.
Here a key leads to those that are wanted with it more often than they are wanted anyway: the number of training queries
that want both, over the root of the number that want the other (`python -m eval.retrieval` measures it).
"""

from __future__ import annotations

import torch

_KEYS, _QUERIES = 512, 1024
"""Keys, and queries of one key, whose numbers are made together."""


def wanted_together(
    keys: torch.Tensor, queries: torch.Tensor, nearest: int, degree: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges int32 [n, degree] among keys fp32 [n, head_dim], best first and -1 behind them; and int64 [n], how many
    queries want each key.

    Args:
        queries: fp32 [nq, head_dim], of all query heads that read these keys.
        nearest: keys of largest product that a query wants.
        degree: most edges that leave a key.
    """
    n = len(keys)
    edges, none = torch.full((n, degree), -1, dtype=torch.int32), torch.zeros(n, dtype=torch.int64)
    nearest = min(nearest, n)
    if not len(queries) or nearest < 2:
        return edges, none
    lists = torch.cat([(part @ keys.T).topk(nearest).indices for part in queries.split(_QUERIES)])
    wanted = torch.bincount(lists.flatten(), minlength=n)
    # By key, the queries that want it.
    by_key = lists.flatten().argsort(stable=True) // nearest
    ends = wanted.cumsum(0)
    weight = wanted.clamp(min=1).float().rsqrt()
    for first in range(0, n, _KEYS):
        rows = torch.arange(first, min(first + _KEYS, n))
        both = _together(lists, by_key, wanted[rows], int(ends[rows[0]] - wanted[rows[0]]), n) * weight
        both[torch.arange(len(rows)), rows] = 0
        best = both.topk(min(degree, n), dim=1)
        edges[rows, : best.indices.shape[1]] = best.indices.masked_fill(best.values == 0, -1).int()
    return edges, wanted


def _together(lists: torch.Tensor, by_key: torch.Tensor, counts: torch.Tensor, start: int, n: int) -> torch.Tensor:
    """How many queries want each of these keys and each key: fp32 [len(counts), n].

    Args:
        by_key: queries in the order of the keys that want them, those of the first of these keys from `start` on.
        counts: of the queries of each.
    """
    both = torch.zeros(len(counts) * n)
    row = torch.arange(len(counts)).repeat_interleave(counts)
    queries = by_key[start : start + len(row)]
    for some, of in zip(row.split(_QUERIES), queries.split(_QUERIES), strict=True):
        both.scatter_add_(0, (some[:, None] * n + lists[of]).flatten(), torch.ones(lists[of].numel()))
    return both.view(len(counts), n)


def without_repeats(edges: torch.Tensor) -> torch.Tensor:
    """Rows int [n, d] with each neighbour once, in the order of its first place, and -1 behind them: searches stop at
    the first -1."""
    order = edges.sort(dim=1, stable=True)
    again = torch.zeros_like(edges, dtype=torch.bool)
    again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    edges = edges.masked_fill(torch.zeros_like(again).scatter(1, order.indices, again), -1)
    return edges.gather(1, (edges < 0).int().sort(dim=1, stable=True).indices)
