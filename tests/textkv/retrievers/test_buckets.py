"""Pages and sentences: exact small cases."""

from __future__ import annotations

import pytest
import torch

from textkv.retrievers.pages import Pages
from textkv.retrievers.sentences import Sentences
from textkv.sentences import ends_sentence

CPU = torch.device("cpu")


def keys(n: int, batch: int = 1, heads: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, n, 8, generator=torch.Generator().manual_seed(seed))


def at(n: int, batch: int = 1, heads: int = 2) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32).expand(batch, heads, n).clone()


def sentences(
    n: int, ends: set[int], longest: int = 100, heads: int = 2, query: torch.Tensor | None = None
) -> Sentences:
    """Tokens have their position as id, so that `ends` are positions."""
    made = Sentences(tuple(sorted(ends)), torch.tensor([longest]))
    q = torch.zeros(1, heads, 0, 8) if query is None else query
    made.read(q, torch.arange(n, dtype=torch.int32)[None], torch.arange(n)[None], heads)
    return made


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (".", True), ("?!", True), ("...", True), ('."', True), (".)\n", True), ("。", True), ("！」", True),
        ("\n\n", True), ("．", True), ("؟", True), ("۔", True), ("।", True), ("։", True), ("።", True), ("‼", True),
        ("、", False), ("،", False), ("\ufffd", False), (".*", False),
        ("end.", True), ("3.14", False), (".5", False), ("\n", False), (",", False), (" the", False), ("e.g", False),
        ("", False), ("'s", False),
    ],
)  # fmt: skip
def test_what_ends_a_sentence(text, ends):
    assert ends_sentence(text) == ends


def test_sentences_are_runs_of_tokens_under_the_mean_of_their_keys():
    k, made = keys(10), sentences(10, {2, 6})
    made.build(k, at(10), CPU)
    assert made.bucket[0].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]] * 2
    assert made.size[0].tolist() == [[3, 4, 3]] * 2
    assert torch.allclose(made.mean[0, :, 1], k[0, :, 3:7].mean(1), atol=1e-6)


def test_a_long_sentence_is_cut_and_padding_is_in_none():
    made = Sentences((99,), torch.tensor([4]))
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    made.read(torch.zeros(1, 1, 0, 8), positions, torch.tensor([[99, 99, 1, 1, 1, 1, 1, 1]]), 1)
    made.build(keys(6, heads=1), at(6, heads=1), CPU)
    assert made.bucket[0, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_head_without_a_token_of_a_sentence_has_no_bucket_of_it():
    made, where = sentences(9, {2, 5}), torch.tensor([[[0, 1, 6, 7], [3, 4, 5, -1]]], dtype=torch.int32)
    made.build(keys(4), where, CPU)
    assert made.bucket[0].tolist() == [[0, 0, 1, 1], [0, 0, 0, -1]]
    found = made.query(torch.randn(1, 2, 1, 8), torch.tensor([4]), keys(4), where)
    assert sorted(found[0, 0].tolist()) == [0, 1, 2, 3] and sorted(found[0, 1].tolist()) == [-1, 0, 1, 2]


def test_a_score_is_the_mean_logit_of_two_sentences():
    """kbar . qbar = mean of all products of the written sentence's queries with the stored one's keys."""
    k, made = keys(10), sentences(10, {4, 9})
    made.build(k, at(10), CPU)
    written = torch.randn(1, 4, 3, 8)
    made.observe(written[:, :, :2], torch.tensor([[10, 11]], dtype=torch.int32), torch.tensor([[1, 1]]))
    score = made.score(written[:, :, 2:])
    pairs = written.unflatten(1, (2, 2))[0] @ k[0, :, None, 5:].mT
    assert torch.allclose(score[0, :, 1], pairs.flatten(1).mean(1), atol=1e-5)


def test_a_full_stop_begins_a_new_query_and_crop_takes_it_back():
    k, made = keys(10), sentences(10, {4, 9, 55})
    made.build(k, at(10), CPU)
    first, second = torch.randn(2, 1, 4, 1, 8)
    before = made.score(second)
    made.observe(first, torch.tensor([[10]], dtype=torch.int32), torch.tensor([[55]]))
    assert torch.allclose(made.score(second), before)
    made.crop(1)
    made.observe(first, torch.tensor([[10]], dtype=torch.int32), torch.tensor([[1]]))
    assert not torch.allclose(made.score(second), before)


def test_padding_pushes_no_query_of_a_row_out_and_crop_takes_its_own():
    """A row beside one that reads on for long: it gets padding, and its sentence's queries stay."""
    made, apart = (Sentences((99,), torch.tensor([2, 2][:rows])) for rows in (2, 1))
    first, then = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 60, 8)
    at_first, at_then = (
        torch.arange(3, dtype=torch.int32).expand(2, 3),
        torch.arange(3, 63, dtype=torch.int32).repeat(2, 1),
    )
    at_then[1, :-1] = -1
    at_then[1, -1] = 3
    ids = torch.ones(2, 60, dtype=torch.int64)
    made.read(first, at_first, ids[:, :3], 1)
    made.observe(then, at_then, ids)
    apart.read(first[1:], at_first[1:], ids[1:, :3], 1)
    apart.observe(then[1:, :, -1:], at_then[1:, -1:], ids[1:, -1:])
    assert made.said_at[1][made.said_at[1] >= 0].tolist() == apart.said_at[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(made.said[1, :, -4:], apart.said[0])
    made.crop(5, torch.tensor([5, 1]))
    assert [row[row >= 0].tolist()[-3:] for row in made.said_at] == [[55, 56, 57], [0, 1, 2]]
    assert torch.equal(made.said[1, :, -3:], first[1])


def test_one_token_a_sentence_is_exact_top_k():
    k, made = keys(30), sentences(30, set(range(30)))
    made.build(k, at(30), CPU)
    q = torch.randn(1, 4, 1, 8)
    best = (k @ q.unflatten(1, (2, 2)).mean(2).mT)[0, :, :, 0].topk(6).indices
    found = made.query(q, torch.tensor([6]), k, at(30))
    assert found[0].sort().values.tolist() == best.sort().values.tolist()


def test_the_last_bucket_gives_its_first_tokens():
    k = torch.zeros(1, 1, 8, 8)
    k[0, 0, 4:, 0] = 1.0
    made = sentences(8, {3}, heads=1)
    made.build(k, at(8, heads=1), CPU)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    assert made.query(q, torch.tensor([6]), k, at(8, heads=1))[0, 0].tolist() == [4, 5, 6, 7, 0, 1]


def test_a_written_sentence_can_be_found():
    k, made = keys(9), sentences(6, {5, 8})
    made.build(k[:, :, :6], at(6), CPU)
    new = torch.tensor([[6, 7, 8, 9]], dtype=torch.int32)
    made.observe(torch.randn(1, 2, 4, 8), new, new.long())
    assert made.edge(torch.tensor([9])).tolist() == [9] and made.edge(torch.tensor([8])).tolist() == [6]
    made.update(k, at(9))
    assert made.bucket[0, 0].tolist() == [0] * 6 + [1] * 3
    assert torch.allclose(made.mean[0, :, 1], k[0, :, 6:].mean(1), atol=1e-6)
    assert made.log_at.tolist() == [[9]]


def test_no_key_of_a_page_scores_above_its_bound():
    k, made = keys(22), Pages(4)
    made.build(k, at(22), CPU)
    q = torch.randn(1, 4, 1, 8)
    bound, scores = made.score(q), (q.unflatten(1, (2, 2))[0, :, :, 0] @ k[0].mT).amax(1)
    for slot in range(22):
        assert bool((scores[:, slot] <= bound[0, :, slot // 4] + 1e-5).all())


def test_pages_of_one_token_are_exact_and_updates_are_as_building():
    k, made, grown = keys(21), Pages(1), Pages(4)
    made.build(k, at(21), CPU)
    q = torch.randn(1, 2, 1, 8)
    found = made.query(q, torch.tensor([5]), k, at(21))
    assert found[0].tolist() == (q @ k.mT)[0, :, 0].topk(5).indices.tolist()
    grown.build(k[:, :, :6], at(6), CPU)
    for n in (7, 13, 21):
        grown.update(k[:, :, :n], at(n))
    whole = Pages(4)
    whole.build(k, at(21), CPU)
    assert all(torch.equal(grown.tensors()[name], x) for name, x in whole.tensors().items())
