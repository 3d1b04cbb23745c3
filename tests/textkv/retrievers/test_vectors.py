"""Vector search: what faiss and our graph find, and how they grow, shrink and travel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from textkv.retrievers.projection import wanted_together, without_repeats
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


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "graph"])
def test_a_head_is_indexed_by_its_own_tokens_and_misses_none_that_it_has_room_for(kind):
    """Beside a row of 600 tokens one of 60 is searched as it is alone: exactly, for it has few."""
    keys, training, asking = skewed()
    where = at(N).repeat(2, 1, 1)
    where[1, :, 60:] = -1
    made = Vectors(kind, 5, 8, 100, training.repeat(2, 1, 1, 1), torch.arange(200, dtype=torch.int32).repeat(2, 1))
    made.build(keys.repeat(2, 1, 1, 1), where, CPU)
    assert list(made._engines) == [(0, 0)]
    q = asking[:1, :, None].repeat(2, 1, 1, 1)
    found = made.query(q, torch.tensor([20, 20]), keys.repeat(2, 1, 1, 1), where)
    best = (asking[0] @ keys[0, 0, :60].T).topk(20).indices
    assert found[1].sort().values.tolist() == best.sort().values.tolist()
    found = made.query(q, torch.tensor([N, 60]), keys.repeat(2, 1, 1, 1), where)
    for row, n in ((0, N), (1, 60)):
        assert [x[x >= 0].sort().values.tolist() for x in found[row]] == [list(range(n))] * 2
    # A neighbour's tokens leave: the index of a head that loses none is not built anew.
    engine = made._engines[0, 0]
    where[1, :, :5] = -1
    index_of = torch.stack([torch.arange(N), torch.cat([torch.arange(5, 60), torch.full((N - 55,), -1)])])[:, None]
    made.keep(index_of, keys.repeat(2, 1, 1, 1), where, CPU)
    assert made._engines == {(0, 0): engine}


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


def test_edges_lead_to_what_is_wanted_together_more_than_by_chance():
    keys, training, _ = skewed(700)  # more than are made together
    queries = training.flatten(1, 2)[0]
    edges, wanted = wanted_together(keys[0, 0], queries, 30, 12)
    assert edges.shape == (700, 12) and bool((edges < 700).all())
    assert not bool((edges == torch.arange(700)[:, None]).any())
    # The same by its definition, key by key.
    lists = (queries @ keys[0, 0].T).topk(30).indices
    wants = torch.zeros(len(queries), 700).scatter_(1, lists, 1)
    assert torch.equal(wanted, wants.sum(0).long())
    both = (wants.T @ wants) / wants.sum(0).clamp(min=1).sqrt()
    both.fill_diagonal_(0)
    for node in range(700):
        mine = edges[node][edges[node] >= 0].long()
        assert len(mine) == min(12, int((both[node] > 0).sum()))
        torch.testing.assert_close(both[node, mine], both[node].topk(12).values[: len(mine)])
    # Spread: the key that most queries want is not in every list, as it would be by plain numbers.
    plain = (wants.T @ wants).fill_diagonal_(0).topk(12).indices
    assert (edges == wanted.argmax()).sum() < 0.7 * (plain == wanted.argmax()).sum()


def test_keys_that_no_query_wants_are_found_all_the_same():
    keys, training, asking = skewed()
    made = index("graph", N, keys, training[:, :, :2])
    assert int((made.edges[0, 0] >= 0).any(1).sum()) < N
    assert recall(made, keys, -asking)[0] == pytest.approx(1.0, abs=0.005)
    without = index("graph", N, keys, training[:, :, :0])
    assert recall(without, keys, asking)[0] == pytest.approx(1.0, abs=0.005)


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
