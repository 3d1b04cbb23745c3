"""H2O against a token-by-token simulation in fp64, its place behind wrappers, and how long its layers are."""

from functools import cache as once

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.test_eviction import LAYER, case
from textkv import Budget, MethodCache
from textkv.conformance import CHECKS, check_method
from textkv.decode_eviction import part_of, protect
from textkv.eviction import NEVER, PROTECTED
from textkv.methods.h2o import H2O
from textkv.methods.snapkv import SnapKV
from textkv.scores import group_mean, past_mass

DIM = 8


@once
def one_layer_model():
    return LlamaForCausalLM(LlamaConfig(**tiny.TEXT | {"num_hidden_layers": 1})).eval()


def tokens(n, heads=2, group=2, batch=1, seed=0):
    """Random queries [batch, heads * group, n, DIM], keys and values [batch, heads, n, DIM]."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, DIM, generator=g) for h in (heads * group, heads, heads))


def feed(method, budget, q, k, v, blocks):
    """Runs one layer over blocks [start, stop) of tokens and yields it after each."""
    cache = MethodCache(one_layer_model(), method, budget)
    layer = cache.layers[0]
    layer.lazy_initialization(k[:, :, :0], v[:, :, :0])
    for start, stop in blocks:
        part = slice(start, stop)
        layer.feed(q[:, :, part], k[:, :, part], v[:, :, part], 1.0)
        yield layer


def blocks_of(*sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def attention(q, keys, start):
    """What queries q [group, m, DIM] of tokens start.. see of keys {position: vector}: fp64 [m, n], group mean."""
    at = torch.tensor(sorted(keys))
    scores = q.double() @ torch.stack([keys[p] for p in sorted(keys)]).double().T
    hidden = at[None] > start + torch.arange(q.shape[1])[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)


def simulate(q, k, blocks, keeps, recent):
    """Kept positions and their sums after each block, one KV head: q [group, n, DIM], k [n, DIM]."""
    held, mass = {}, {}
    for (start, stop), keep in zip(blocks, keeps, strict=True):
        held |= {p: k[p] for p in range(start, stop)}
        for p, got in zip(sorted(held), attention(q[:, start:stop], held, start).sum(0).tolist(), strict=True):
            mass[p] = mass.get(p, 0.0) + got
        if len(held) > keep:
            last = max(1, int(recent * keep + 1e-9))
            old = sorted(held)[:-last]
            best = sorted(old, key=lambda p: -mass[p])[: keep - last] + sorted(held)[-last:]
            held = {p: held[p] for p in best}
        yield sorted(held), [mass[p] for p in sorted(held)]


def sizes_of(layer):
    return layer.stored().keys.shape[2]


@pytest.mark.parametrize(("recent", "group"), [(0.5, 2), (0.25, 1), (1.0, 2)])
def test_it_does_what_a_plain_simulation_does(recent, group):
    """Two turns and decoding, two rows, two KV heads: kept sets at every step, and the sums that led to them."""
    blocks = blocks_of(20, 1, 1, 1, 9, 1, 1, 1, 1)
    q, k, v = tokens(36, group=group, batch=2)
    keeps = [8, 8, 8, 8, 12, 12, 12, 12, 12]  # 0.4 of 20, then 0.4 of the 32 seen after the second turn
    expected = {
        (b, h): list(simulate(q[b, h * group : (h + 1) * group], k[b, h], blocks, keeps, recent))
        for b in range(2)
        for h in range(2)
    }
    for step, layer in enumerate(feed(f"h2o(recent={recent})", 0.4, q, k, v, blocks)):
        for (b, h), states in expected.items():
            positions, mass = states[step]
            assert layer.stored().positions[b, h].tolist() == positions, f"step {step}, row {b}, head {h}"
            assert not mismatch(layer.statistic("h2o")[b, h].double(), torch.tensor(mass).double(), atol=1e-4, rtol=0)


def test_old_tokens_have_had_more_queries():
    """Zero keys: every token sees all before it evenly, so sums fall with age and the oldest are the heavy hitters."""
    q, k, v = tokens(8, heads=1, group=1)
    kept = [x.stored().positions[0, 0].tolist() for x in feed("h2o", "4t", q, k * 0, v, blocks_of(6, 1, 1))]
    assert kept == [[0, 1, 4, 5], [0, 1, 5, 6], [0, 1, 6, 7]]


def test_a_token_that_is_looked_at_stays():
    q, k, v = tokens(7, heads=1, group=1)
    k, q = torch.zeros_like(k), torch.ones_like(q)
    k[0, 0, 3] = 1.0
    kept = [x.stored().positions[0, 0].tolist() for x in feed("h2o", "4t", q, k, v, blocks_of(6, 1))]
    assert kept == [[0, 3, 4, 5], [0, 3, 5, 6]]


def test_the_last_queries_alone_make_it_snapkv():
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 3, 20, 8, generator=g), torch.randn(2, 6, 4, 8, generator=g)
    held, evidence = case(keys, queries)
    snap = SnapKV(window=4, kernel=1).score(LAYER, held, evidence, keep=8)
    past = torch.nn.functional.pad(group_mean(past_mass(queries, keys, evidence.softmax), 3), (0, 4))
    object.__setattr__(evidence, "columns", past)
    assert torch.equal(H2O(recent=0.5).score(LAYER, held, evidence, keep=8), snap)


def test_heads_are_chosen_for_themselves():
    q, k, v = tokens(24, heads=3, group=2)
    order = [2, 0, 1]
    blocks = blocks_of(20, 1, 1, 1, 1)
    swapped = q.unflatten(1, (3, 2))[:, order].flatten(1, 2), k[:, order], v[:, order]
    both = zip(feed("h2o", 0.3, q, k, v, blocks), feed("h2o", 0.3, *swapped, blocks), strict=True)
    for plain, moved in both:
        assert torch.equal(plain.stored().positions[:, order], moved.stored().positions)


@pytest.mark.parametrize(
    ("budget", "lengths"), [("12t", [10, 11, 12, 12, 12]), (0.5, [5] * 5), ("4t", [4] * 5), (1.0, [10, 11, 12, 13, 14])]
)
def test_tokens_are_a_ceiling_and_a_share_is_taken_once(budget, lengths):
    q, k, v = tokens(14)
    layers = list(map(sizes_of, feed("h2o", budget, q, k, v, blocks_of(10, 1, 1, 1, 1))))
    assert layers == lengths


def test_a_full_budget_keeps_nothing_beside_the_cache():
    q, k, v = tokens(12)
    assert [dict(layer.statistics) for layer in feed("h2o", 1.0, q, k, v, blocks_of(10, 1, 1))] == [{}] * 3


def test_rows_below_and_above_the_ceiling_in_one_batch(model_of):
    """A short row still grows while a long one already drops: each is what it is alone."""
    model, ids = model_of("llama"), tiny.text_ids(34)
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[1, :18] = 0
    both = torch.cat([ids, ids * mask[1:]])
    cache, places = MethodCache(model, "h2o", "18t"), (mask.cumsum(1) - 1).clamp(min=0)
    alone = [MethodCache(model, "h2o", "18t") for _ in range(2)]
    with torch.no_grad():
        for part in [slice(0, 30), *(slice(i, i + 1) for i in range(30, 34))]:
            model(
                both[:, part], past_key_values=cache, attention_mask=mask[:, : part.stop], position_ids=places[:, part]
            )
            model(ids[:, part], past_key_values=alone[0])
            model(ids[:, max(18, part.start) : part.stop], past_key_values=alone[1])
    for row, single in enumerate(alone):
        for layer in range(3):
            ours = [[p for p in head if p >= 0] for head in cache.kept_positions(layer)[row].tolist()]
            assert ours == single.kept_positions(layer)[0].tolist()
    assert [single.layers[0].lengths().max().item() for single in alone] == [18, 16]


def test_behind_a_wrapper_it_scores_and_decoded_tokens_stay(model_of):
    model, ids = model_of("llama"), tiny.text_ids(44)
    alone, floor, free = (MethodCache(model, m, 0.4) for m in ("h2o", "h2o+adakv(floor=1.0)", "h2o+adakv(floor=0.1)"))
    with torch.no_grad():
        for cache in (alone, floor, free):
            model(ids[:, :40], past_key_values=cache)
    for layer in range(3):
        assert torch.equal(alone.kept_positions(layer), floor.kept_positions(layer))
    lengths = [layer.lengths() for layer in free.layers]
    assert all(int(n.sum()) == 2 * 16 for n in lengths) and any(len(set(n[0].tolist())) > 1 for n in lengths)
    with torch.no_grad():
        for token in range(40, 44):
            model(ids[:, token : token + 1], past_key_values=free)
    assert all(torch.equal(x.lengths(), n + 4) for x, n in zip(free.layers, lengths, strict=True))
    assert not free.layers[0].statistics and free.is_croppable and not alone.is_croppable
    free.crop(-4)
    assert all(torch.equal(x.lengths(), n) for x, n in zip(free.layers, lengths, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_give_fp32_sums(dtype):
    q, k, v = (x.to(dtype) for x in tokens(14))
    exact = [x.float() for x in (q, k, v)]
    for half, full in zip(feed("h2o", 0.5, q, k, v, [(0, 12)]), feed("h2o", 0.5, *exact, [(0, 12)]), strict=True):
        assert half.statistic("h2o").dtype == torch.float32
        assert not mismatch(half.statistic("h2o"), full.statistic("h2o"), atol=1e-3, rtol=0)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 5))
def test_protection_counts_tokens_and_not_holes(real, first, last):
    positions = torch.tensor([i if here else -1 for i, here in enumerate(real)])
    scores = protect(torch.zeros(1, 1, len(real)), positions[None, None], first, torch.tensor([last]))[0, 0]
    there = positions[positions >= 0].tolist()
    guarded = set(there[:first]) | set(there[max(0, len(there) - last) :])
    assert scores.tolist() == [
        NEVER if p < 0 else PROTECTED if p in guarded else 0.0 for p in positions.tolist()
    ]  # fmt: skip


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_a_part_is_exact_and_never_empty(keep, percent):
    assert int(part_of(keep, percent / 100)) == max(1, keep * percent // 100)


def test_settings_are_checked():
    for wrong in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"recent={wrong}: give a share of the budget in \(0, 1\], 0.5"):
            H2O(recent=wrong)
    with pytest.raises(ValueError, match="h2o cannot follow snapkv"):
        H2O(inner=SnapKV(), budget=Budget(0.5))


def test_nan_sums_name_the_layer():
    q, k, v = tokens(12)
    q[0, 0, -1] = torch.nan
    with pytest.raises(ValueError, match="layer 0: the importance scores contain NaN"):
        list(feed("h2o", 0.5, q, k, v, [(0, 12)]))


@pytest.mark.parametrize("method", ["h2o", "h2o+adakv"])
def test_it_conforms(method):
    assert len(check_method(method)) == len(CHECKS)
