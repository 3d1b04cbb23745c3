"""TOVA against a token-by-token simulation in fp64, and its kinship with SnapKV."""

import pytest
import torch

from tests.textkv.methods.test_h2o import attention, blocks_of, feed, sizes_of, tokens
from tests.textkv.test_eviction import LAYER, case
from textkv.conformance import CHECKS, check_method
from textkv.eviction import PROTECTED
from textkv.methods.snapkv import SnapKV
from textkv.methods.tova import TOVA


def simulate(q, k, blocks, keeps, recent):
    """Kept positions after each block; q [heads, n, DIM], k [kv_heads, n, DIM]: one set for all heads."""
    held, group = [], len(q) // len(k)
    for (start, stop), keep in zip(blocks, keeps, strict=True):
        held = [*held, *range(start, stop)]
        rows = [
            attention(q[h * group : (h + 1) * group, stop - 1 : stop], {p: k[h, p] for p in held}, stop - 1)[0]
            for h in range(len(k))
        ]
        seen = dict(zip(held, torch.stack(rows).mean(0).tolist(), strict=True))
        last = held[len(held) - recent :] if recent else []
        best = sorted(set(held) - set(last), key=lambda p: -seen[p])[: keep - len(last)]
        held = sorted([*best, *last])
        yield held


@pytest.mark.parametrize(("recent", "group"), [(0, 2), (1, 2), (3, 1)])
def test_it_does_what_a_plain_simulation_does(recent, group):
    blocks = blocks_of(20, 1, 1, 1, 9, 1, 1, 1, 1)
    keeps = [8, 8, 8, 8, 12, 12, 12, 12, 12]
    q, k, v = tokens(36, group=group, batch=2)
    expected = [list(simulate(q[b], k[b], blocks, keeps, recent)) for b in range(2)]
    for step, layer in enumerate(feed(f"tova(recent={recent})", 0.4, q, k, v, blocks)):
        for b in range(2):
            assert layer.stored().positions[b].tolist() == [expected[b][step]] * 2, f"step {step}, row {b}"
        assert not layer.statistics


def test_the_newest_token_may_leave_unless_it_is_protected():
    """The last key is the one that its own query likes least: it goes at once, or the youngest of the equal others."""
    q, k, v = tokens(6, heads=1, group=1)
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[0, 0, 5], k[0, 0, 1] = -1.0, -0.5
    for recent, kept in ((0, [0, 2, 3, 4]), (1, [0, 2, 3, 5])):
        *_, layer = feed(f"tova(recent={recent})", "4t", q, k, v, blocks_of(4, 1, 1))
        assert layer.stored().positions[0, 0].tolist() == kept


def test_equal_scores_go_to_the_lower_index():
    q, k, v = tokens(8, heads=1, group=1)
    *_, layer = feed("tova", "4t", q, k * 0, v, blocks_of(6, 1, 1))
    assert layer.stored().positions[0, 0].tolist() == [0, 1, 2, 3]


def test_a_protected_newest_token_makes_it_snapkv_with_one_query_for_all_heads():
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 1, 20, 8, generator=g), torch.randn(1, 4, 3, 8, generator=g)
    held, evidence = case(keys, queries)
    ours = TOVA(recent=1).score(LAYER, held, evidence, keep=8)
    held, evidence = case(keys, queries[:, :, -1:])
    assert torch.allclose(ours, SnapKV(window=1, kernel=1).score(LAYER, held, evidence, keep=8))


def test_protection_never_freezes_the_cache():
    keys, queries = torch.randn(1, 2, 9, 8), torch.randn(1, 4, 1, 8)
    scores = TOVA(recent=5).score(LAYER, *case(keys, queries), keep=3)
    assert (scores == PROTECTED).nonzero()[:, 2].tolist() == [6, 7, 8] * 2


@pytest.mark.parametrize(
    ("budget", "lengths"), [("12t", [10, 11, 12, 12, 12]), (0.5, [5] * 5), (1.0, [10, 11, 12, 13, 14])]
)
def test_tokens_are_a_ceiling_and_a_share_is_taken_once(budget, lengths):
    q, k, v = tokens(14)
    assert list(map(sizes_of, feed("tova", budget, q, k, v, blocks_of(10, 1, 1, 1, 1)))) == lengths


def test_settings_are_checked():
    with pytest.raises(ValueError, match="recent=-1: may not be negative; 0 protects no token, 1 the newest"):
        TOVA(recent=-1)


@pytest.mark.parametrize("method", ["tova", "tova+adakv"])
def test_it_conforms(method):
    assert len(check_method(method)) == len(CHECKS)
