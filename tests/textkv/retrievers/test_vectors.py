"""Vector search: what faiss and our graph find, and how they grow, shrink and travel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from textkv.retrievers.projection import projected, without_repeats
from textkv.retrievers.vectors import Vectors

faiss = pytest.importorskip("faiss", reason="faiss is not installed")
CPU, N, DIM = torch.device("cpu"), 600, 16


def skewed(n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys [1, 1, n, d], training queries [1, 2, s, d] and asking ones [t, 2, d]: far from the keys, all alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, DIM, generator=generator)
    mean = 4 * torch.randn(DIM, generator=generator)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    keys = draw(1, 1, n, 4) @ shared + 0.5 * draw(1, 1, n, DIM)
    training, asking = (draw(*shape, 4) @ shared + 0.5 * draw(*shape, DIM) + mean for shape in ((1, 2, 200), (20, 2)))
    return keys, training, asking


def at(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)[None, None]


def index(kind: str, effort: int, keys: torch.Tensor, training: torch.Tensor) -> Vectors:
    made = Vectors(kind, effort, 8, 10, training, torch.arange(training.shape[2], dtype=torch.int32)[None])
    made.build(keys, at(keys.shape[2]), CPU)
    return made


def recall(made: Vectors, keys: torch.Tensor, asking: torch.Tensor, k: int = 20) -> tuple[float, float]:
    """Share of the best keys that are found, and share of the keys compared."""
    hits = compared = 0
    for q in asking:
        best = (q @ keys[0, 0].T).topk(k).indices
        found = made.query(q[None, :, None], torch.tensor([k]), keys, at(keys.shape[2]))[0]
        hits += sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, best, strict=True))
        compared += made.compared
    return hits / (len(asking) * 2 * k), compared / (len(asking) * 2 * keys.shape[2])


@pytest.mark.parametrize(("kind", "effort"), [("exact", 0), ("ivf", 1000), ("graph", N), ("hnsw", N)])
def test_all_of_an_index_finds_all(kind, effort):
    keys, training, asking = skewed()
    assert recall(index(kind, effort, keys, training), keys, asking)[0] == pytest.approx(1.0, abs=0.005)


def test_more_effort_finds_more_and_compares_more():
    keys, training, asking = skewed()
    made, found = index("graph", 20, keys, training), []
    for effort in (20, 60, 200):
        made.search_with(effort)
        found.append(recall(made, keys, asking))
    assert found == sorted(found) and found[-1][0] > 0.97


def test_edges_of_ours_find_more_than_the_librarys_graph():
    keys, training, asking = skewed(2000)
    (ours, compared), (theirs, _) = (recall(index(x, 20, keys, training), keys, asking) for x in ("graph", "hnsw"))
    assert ours > theirs and compared < 0.3


def test_projected_edges_are_bounded_and_lead_to_others():
    keys, training, _ = skewed(200)
    edges = projected(keys[0, 0], training.flatten(1, 2)[0], 30, 6)
    assert edges.shape == (200, 12) and bool((edges < 200).all())
    assert not bool((edges == torch.arange(200)[:, None]).any())
    out, back = edges[:, :6].long(), edges[:, 6:].long()
    for node in range(200):
        assert all(node in out[x].tolist() for x in back[node].tolist() if x >= 0)
    # Spread: far more keys have edges than are the nearest of a query.
    nearest = (training.flatten(1, 2)[0] @ keys[0, 0].T).argmax(1).unique()
    assert int((out >= 0).any(1).sum()) > 2 * len(nearest)


def test_neighbours_come_once_and_holes_last():
    edges = torch.tensor([[3, -1, 2, 3, 1, 2]])
    assert without_repeats(edges).tolist() == [[3, 2, 1, -1, -1, -1]]


@pytest.mark.parametrize("kind", ["graph", "hnsw", "ivf"])
def test_new_tokens_join_and_a_copy_does_not_hear_of_them(kind):
    keys, training, asking = skewed()
    made = index(kind, N, keys[:, :, :500].contiguous(), training)
    copied, sent = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    made.update(keys, at(N))
    assert made.length == N and recall(made, keys, asking)[0] > 0.97
    assert copied.length == sent.length == 500
    for other in (copied, sent):
        assert recall(other, keys[:, :, :500], asking)[0] > 0.97


def test_holes_are_never_found_and_what_is_left_is():
    keys, training, asking = skewed()
    made, stays = index("graph", N, keys, training), torch.arange(0, N, 3)
    left = keys[:, :, stays].contiguous()
    made.keep(stays[None, None], left, at(len(stays)), CPU)
    assert recall(made, left, asking)[0] > 0.97
    where = at(len(stays)).clone()
    where[..., ::2] = -1
    made = Vectors("hnsw", N, 8, 10)
    made.build(left, where, CPU)
    found = made.query(asking[:1, :, None], torch.tensor([50]), left, where)
    assert bool((found % 2 == 1).all())


def test_rows_share_an_index_until_one_grows():
    keys, training, asking = skewed()
    made = index("graph", N, keys, training)
    made.take_rows(torch.tensor([0, 0]))
    both = made.query(asking[:2, :, None], torch.tensor([20, 20]), keys.expand(2, -1, -1, -1), at(N).expand(2, -1, -1))
    assert both.shape == (2, 2, 20)
    assert made.library_bytes() > 0
