"""Tokens that come from another store: taken in without attention, then kept by the method as after a prompt."""

from __future__ import annotations

import pytest
import torch

from textkv import MethodCache
from textkv.kernels import decode_attention

KV_HEADS, HEADS, DIM = 2, 4, 16


def tokens(count: int, seed: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    return k, v, torch.randn(rows, HEADS, 6, DIM, generator=generator)


@pytest.mark.parametrize("method", ["full", "snapkv+adakv", "kivi(8)", "kivi('fp8')"])
def test_blocks_are_attended_as_one(model_of, method):
    cache = MethodCache(model_of("llama"), method)
    layer, parts = cache.layers[0], [tokens(70, 0), tokens(3, 1), tokens(9, 2)]
    for start, (k, v, observers) in zip((0, 70, 73), parts, strict=True):
        layer.absorb(k, v, start + torch.arange(k.shape[2], dtype=torch.int32)[None], observers, 0.25)
    q = parts[0][2]
    k, v = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
    got = [segment.attend(q, 0.25) for segment in layer.segments]
    lse = torch.stack([one[1] for one in got])
    out = sum(one[0] * (one[1] - lse.logsumexp(0)).exp()[..., None] for one in got)
    exact, exact_lse = decode_attention(q, k, v, scale=0.25)
    near = {"kivi(8)": 0.02, "kivi('fp8')": 0.06}.get(method, 1e-5)
    assert torch.allclose(out, exact, atol=near) and torch.allclose(lse.logsumexp(0), exact_lse, atol=near)
    assert layer.seen == 82 and layer.real_seen.tolist() == [82]
    assert cache.kept_positions(0)[0, 0].sort().values.tolist() == list(range(82))


@pytest.mark.parametrize("method", ["snapkv(window=6)", "snapkv(window=6)+adakv", "knorm", "snapkv(window=6)+kvcrush"])
def test_a_row_that_brings_nothing_keeps_what_it_has(model_of, method):
    for seed in range(4):
        cache = MethodCache(model_of("llama"), method, 0.5)
        first, second = tokens(20, seed, rows=2), tokens(8, 100 + seed, rows=2)
        layer = cache.layers[0]
        layer.absorb(*first[:2], torch.arange(20, dtype=torch.int32).repeat(2, 1), 4 * first[2], 0.25)
        before = cache.kept_positions(0)[1].clone()
        positions = (20 + torch.arange(8, dtype=torch.int32)).repeat(2, 1)
        layer.absorb(*second[:2], positions.masked_fill(torch.tensor([[False], [True]]), -1), 4 * second[2], 0.25)
        after = cache.kept_positions(0)[1]
        for head in range(KV_HEADS):
            held, now = (x[head][x[head] >= 0].sort().values.tolist() for x in (before, after))
            assert held == now
        assert layer.real_seen.tolist() == [28, 20]


def test_the_observers_decide_and_padding_is_nobody(model_of):
    """A key that all observers look at stays; rows may bring fewer tokens, padded in front."""
    cache = MethodCache(model_of("llama"), "snapkv(window=6,kernel=1)", 0.5)
    layer = cache.layers[0]
    k, v, observers = tokens(20, 0, rows=2)
    observers = observers + 3
    k[:, :, 7] = 3.0
    positions = torch.arange(20, dtype=torch.int32).repeat(2, 1)
    positions[1] = (positions[1] - 4).clamp(min=-1)
    layer.absorb(k, v, positions, observers, 0.25)
    assert layer.real_seen.tolist() == [20, 16] and layer.lengths().tolist() == [[10] * 2, [8] * 2]
    kept = cache.kept_positions(0)
    assert (kept[0] == 7).any(-1).all() and (kept[1] == 3).any(-1).all()


def test_as_many_observers_choose_as_are_told(model_of):
    """Three of eight in each row: as if there were three."""
    k, v, _ = tokens(40, 0, rows=2)
    observers = torch.randn(2, HEADS, 8, DIM, generator=torch.Generator().manual_seed(5))
    kept = []
    for given, observed in ((observers, torch.tensor([3, 3])), (observers[:, :, 5:], None)):
        cache = MethodCache(model_of("llama"), "snapkv(window=8)", "16t")
        positions = torch.arange(40, dtype=torch.int32).repeat(2, 1)
        cache.layers[0].absorb(k, v, positions, given, 0.25, observed=observed)
        kept.append(cache.kept_positions(0))
    assert torch.equal(*kept)
