"""CAKE: the allocation by hand, the cascade against one cut, its peak, decoding, and the identities with SnapKV."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.textkv import tiny
from tests.textkv.test_eviction import case
from textkv import Budget, MethodCache, resolve_method
from textkv.budgets import apportion
from textkv.conformance import check_method
from textkv.eviction import PROTECTED
from textkv.evidence import Evidence
from textkv.methods.cake import Cake, CakeOfficial, LastQuery, past_attention, variance
from textkv.softmax import Softmax

LAYER = SimpleNamespace(index=0)


def read(model, method, budget, ids, chunks=None, **options):
    cache = MethodCache(model, method, budget)
    cache.begin(ids)
    with torch.no_grad():
        for chunk in ids.split(chunks or ids.shape[1], 1):
            model(chunk, past_key_values=cache, **options)
    return cache


def kept(cache):
    return [cache.kept_positions(i) for i in range(len(cache.layers))]


def lengths(cache):
    return [int(layer.lengths().max()) for layer in cache.layers]


# ---- the allocation ------------------------------------------------------------------------------------------------


def test_equal_preferences_share_equally():
    assert apportion([1.5] * 4, [50] * 4, 4 * 12) == [12] * 4
    assert apportion([-3.0] * 3, [50] * 3, 10) == [4, 3, 3]


def test_a_dominant_layer_takes_all_it_can_and_the_rest_is_proportional():
    logs = [math.log(x) for x in (1e9, 1.0, 3.0)]
    assert apportion(logs, [20] * 3, 36) == [20, 4, 12]
    assert apportion(logs, [20] * 3, 100) == [20] * 3


def test_no_preference_at_all_is_uniform():
    nothing = Cake().preference(0.0, 0.0)
    assert math.isfinite(nothing) and apportion([nothing] * 3, [50] * 3, 30) == [10] * 3
    assert apportion([nothing, nothing, Cake().preference(2.0, 0.1)], [20] * 3, 40) == [10, 10, 20]


def test_floors_come_first():
    assert apportion([10.0, 0.0, 0.0], [90] * 3, 30, floor=4) == [22, 4, 4]
    assert apportion([10.0, 0.0, 0.0], [90] * 3, 30, floor=10) == [10] * 3
    with pytest.raises(ValueError, match="floor=11 for 3 parts is more than the 30 slots"):
        apportion([1.0] * 3, [90] * 3, 30, floor=11)


ALLOCATIONS = st.lists(st.tuples(st.floats(-40, 40), st.integers(0, 60)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(ALLOCATIONS, st.integers(0, 200))
def test_apportion_is_greedy_and_a_new_part_never_helps_another(parts, total):
    logs, caps = [list(x) for x in zip(*parts, strict=True)]
    slots = [(math.log(s + 0.5) - w, i) for i, (w, cap) in enumerate(parts) for s in range(cap)]
    best = [i for _, i in sorted(slots)[:total]]
    shares = apportion(logs, caps, total)
    assert shares == [best.count(i) for i in range(len(parts))]
    before = apportion(logs[:-1], caps[:-1], total) if len(parts) > 1 else []
    assert all(now <= then for now, then in zip(shares, before, strict=False))


@settings(max_examples=25, deadline=None)
@given(ALLOCATIONS, st.integers(1, 40), st.integers(0, 2**31))
def test_the_cascade_keeps_what_one_cut_keeps(parts, spare, seed):
    """Lists of scores cut stage by stage against one cut by the last stage's shares."""
    logs, caps = [list(x) for x in zip(*parts, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(cap, generator=generator) for cap in caps]
    method, held = Cake(), []
    for m in range(len(parts)):
        held.append(scores[m])
        shares = method.shares(logs[: m + 1], caps[: m + 1], spare, len(parts))
        held = [x.sort(descending=True).values[:share] for x, share in zip(held, shares, strict=True)]
        assert sum(map(len, held)) == min(spare * len(parts), sum(caps[: m + 1]))
    final = method.shares(logs, caps, spare, len(parts))
    assert all(torch.equal(x, s.sort(descending=True).values[:n]) for x, s, n in zip(held, scores, final, strict=True))


def test_the_official_allocation_truncates_clips_and_spreads():
    """40 slots for preferences 6, 3, 1 give raw shares 24, 12, 4. Capped at 15, the first gives 9 away: 5 and 4 to
    the others; 17 is then clipped again, so 2 slots are lost."""
    logs = [math.log(x) for x in (6.0, 3.0, 1.0)]
    assert CakeOfficial().shares(logs, [50] * 3, 20, 2) == [24, 12, 4]
    assert CakeOfficial().shares(logs, [15] * 3, 20, 2) == [15, 15, 8]
    assert Cake().shares(logs, [15] * 3, 20, 2) == [15, 15, 10]
    assert CakeOfficial().shares([0.0] * 3, [50] * 3, 20, 2) == [14, 13, 13]


# ---- scores and preferences ----------------------------------------------------------------------------------------


def test_the_score_by_hand():
    """One head, two past tokens, four queries: A is hit once, B always gets half as much again on average."""
    weights = torch.tensor([[[0.2, 0.1], [0.0, 0.1], [0.0, 0.1], [0.0, 0.1]]])
    spread = (0.15**2 + 3 * 0.05**2) / 3
    assert torch.allclose(variance(weights), torch.tensor([[spread, 0.0]]), atol=1e-8)
    assert torch.allclose(Cake().indicator(weights), torch.tensor([[0.05 + 200 * spread, 0.1]]), atol=1e-6)
    assert Cake().indicator(weights).argmax() == 0 and Cake(gamma=0).indicator(weights).argmax() == 1


def test_scores_and_preferences_in_double_precision():
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 40, 8, generator=g).half()
    queries = (2 * torch.randn(1, 4, 6, 8, generator=g)).half()
    method = Cake(window=6, tau1=0.8, tau2=2.0)
    scores, (preference,) = method.look(queries, keys, Softmax(8**-0.5))
    repeated = keys.double().repeat_interleave(2, 1)
    logits = (queries.double() @ repeated.mT * 8**-0.5).masked_fill(torch.ones(6, 40).triu(35).bool(), -torch.inf)
    weights = logits.softmax(-1)[..., :34]
    moved = weights.var(2)
    raw = weights.mean(2) + 200 * moved
    pooled = torch.nn.functional.avg_pool1d(raw, 5, 1, 2).unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(scores.double(), pooled, rtol=1e-4, atol=1e-7)
    entropy = -(weights * (weights + 1e-10).log()).sum()
    assert preference == pytest.approx(math.log(entropy) / 0.8 + math.log(moved.sum()) / 2, rel=1e-4)


def test_groups_equal_explicit_repetition():
    g = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(1, 2, 30, 8, generator=g), torch.randn(1, 4, 5, 8, generator=g)
    scores, grouped = Cake(window=5).look(queries, keys, Softmax(0.3))
    repeated, alone = Cake(window=5).look(queries, keys.repeat_interleave(2, 1), Softmax(0.3))
    torch.testing.assert_close(scores, repeated.unflatten(1, (2, 2)).mean(2))
    assert grouped[0] == pytest.approx(alone[0], rel=1e-6)


def test_wide_and_restless_layers_are_preferred():
    g = torch.Generator().manual_seed(2)
    keys = torch.randn(1, 1, 60, 8, generator=g)
    narrow = (20 * keys[:, :, 7:8]).expand(1, 1, 8, 8)
    restless = 2 * torch.randn(1, 1, 8, 8, generator=g)
    method = Cake(window=8)
    assert method.look(restless, keys, Softmax(0.35))[1][0] > method.look(narrow, keys, Softmax(0.35))[1][0] + 5


def test_windows_that_do_not_fit():
    """Two tokens leave a window of one, without variance; one token leaves none."""
    keys, queries = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    for keep, window in ((2, 1), (1, 0)):
        scores = Cake().score(LAYER, *case(keys, queries), keep)
        assert bool((scores[0, 0, 2 - window :] == PROTECTED).all()) and bool(
            scores[0, 0, : 2 - window].isfinite().all()
        )
    weights = past_attention(queries[0], keys[0, 0], Softmax(0.5))
    assert weights.shape == (1, 2, 0)


# ---- on a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep():
    """Eight layers: enough for the cascade's peak to show."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(2 + 4 * i)
            layer.self_attn.k_proj.weight.mul_(6)
    return model


def test_the_peak_is_the_budget_and_one_layer(deep):
    ids, budget = tiny.text_ids(96), 16
    cascade = read(deep, "cake(window=8)", f"{budget}t", ids)
    at_once = read(deep, "cake(window=8,cascade=False)", f"{budget}t", ids)
    assert all(torch.equal(a, b) for a, b in zip(kept(cascade), kept(at_once), strict=True))
    assert len(set(lengths(cascade))) > 2 and sum(lengths(cascade)) == 8 * budget
    per_token = 2 * (2 * 8 * 4 + 8)  # heads x (K and V of 8 channels, a position and a score)
    assert cascade.peak_bytes <= (8 * budget + 96) * per_token
    assert at_once.peak_bytes >= 8 * 96 * 2 * 2 * 8 * 4 > 2 * cascade.peak_bytes
    assert cascade.kv_bytes() < cascade.peak_bytes
    assert not any(layer.notes or layer.statistics for layer in cascade.layers)
    chunked = read(deep, "cake(window=8)", f"{budget}t", ids, chunks=50)
    assert all(torch.equal(a, b) for a, b in zip(kept(cascade), kept(chunked), strict=True))
    assert chunked.peak_bytes > 2 * cascade.peak_bytes  # layers fill up with the first chunk: see the module


def test_the_window_stays_and_heads_differ(deep):
    layers = kept(read(deep, "cake(window=8)", 0.3, tiny.text_ids(80)))
    for positions in layers:
        assert bool((positions[..., -8:] == torch.arange(72, 80)).all())
        assert bool((positions.diff(dim=-1) > 0).all())
    assert any(not torch.equal(p[:, 0], p[:, 1]) for p in layers)


def test_equal_layers_without_variance_are_snapkv(model_of):
    model, ids = model_of("llama"), tiny.text_ids(64)
    ours = read(model, "cake(window=8,gamma=0,floor=1,decode='none')", 0.4, ids)
    snap = read(model, "snapkv(window=8)", 0.4, ids)
    assert all(torch.equal(a, b) for a, b in zip(kept(ours), kept(snap), strict=True))


def test_a_short_prompt_is_left_alone_and_grows_to_the_budget(model_of):
    model, ids = model_of("llama"), tiny.text_ids(30)
    cache = read(model, "cake(window=4)", "28t", ids[:, :26])
    assert all(layer.since_eviction == 26 and not layer.statistics for layer in cache.layers)
    with torch.no_grad():
        for i in range(26, 30):
            model(ids[:, i : i + 1], past_key_values=cache)
    assert lengths(cache) == [28] * 3


def test_decoding_drops_one_past_token_for_each_new_one(model_of):
    model, ids = model_of("llama"), tiny.text_ids(70)
    cache = read(model, "cake(window=8)", "30t", ids[:, :64])
    sizes = lengths(cache)
    assert sum(sizes) == 90
    for i in range(64, 70):
        before = kept(cache)
        with torch.no_grad():
            model(ids[:, i : i + 1], past_key_values=cache)
        assert lengths(cache) == sizes
        for old, new in zip(before, kept(cache), strict=True):
            assert bool((new[..., -8:] == torch.arange(i - 7, i + 1)).all())
            for head in range(2):
                assert len(set(old[0, head].tolist()) - set(new[0, head].tolist())) == 1
    kept_all = read(model, "cake(window=8,decode='none')", "30t", ids[:, :64])
    with torch.no_grad():
        model(ids[:, 64:65], past_key_values=kept_all)
    assert lengths(kept_all) == [n + 1 for n in sizes]
    kept_all.crop(-1)
    assert lengths(kept_all) == sizes


def test_the_last_query_scores_by_hand():
    """Row (1, 5, 1, 1, 1, 1) / 10 over six keys, window 2, pooled over 3: the borders count zeros."""
    keys = torch.zeros(1, 1, 6, 2)
    keys[0, 0, 1, 0] = 1.0
    query = torch.tensor([2**0.5 * math.log(5.0), 0.0]).view(1, 1, 1, 2)
    held, _ = case(keys, query)
    scores = LastQuery(window=2, kernel=3).score(LAYER, held, Evidence(query, 2**-0.5, torch.tensor([6])), 5)[0, 0]
    assert torch.allclose(scores[:4], torch.tensor([0.2, 7 / 30, 7 / 30, 2 / 30]), atol=1e-6)
    assert scores[4:].tolist() == [PROTECTED] * 2


def test_rows_alone_and_rows_shared(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60, batch=2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :17] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    both = read(model, "cake(window=8)", 0.5, ids, attention_mask=mask, position_ids=places)
    for row, start in enumerate((0, 17)):
        alone = read(model, "cake(window=8)", 0.5, ids[row : row + 1, start:])
        for ours, single in zip(kept(both), kept(alone), strict=True):
            assert [sorted(set(h.tolist()) - {-1}) for h in ours[row]] == [h.tolist() for h in single[0]]
    shared = read(model, "cake(window=8,rows='shared')", 0.5, ids)
    assert all(bool((p >= 0).all()) for p in kept(shared)) and sum(lengths(shared)) == 90


def test_a_second_turn_is_shared_out_anew(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100)
    cache = read(model, "cake(window=8)", "24t", ids[:, :50])
    with torch.no_grad():
        model(ids[:, 50:51], past_key_values=cache)
        model(ids[:, 51:100], past_key_values=cache)
    assert sum(lengths(cache)) == 72 and all(bool((p[..., -8:] == torch.arange(92, 100)).all()) for p in kept(cache))


@pytest.mark.parametrize("method", ["cake", "cake-official", "cake(decode='none')", "cake+adakv"])
def test_it_conforms(method):
    outcomes = {check.name: check.outcome for check in check_method(method)}
    evicts = resolve_method(method).capabilities.decode_eviction
    assert outcomes["equals_masked_full_attention"] == ("not applicable" if evicts else "passed")


def test_nan_names_the_layer(model_of):
    cache = MethodCache(model_of("llama"), "cake", 0.4)
    layer = cache.layers[1]
    layer.lazy_initialization(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    q = torch.full((1, 4, 30, 16), float("nan"))
    with pytest.raises(ValueError, match="layer 1: the window's attention is NaN"):
        layer.feed(q, torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=1), "window=1: the variance over queries needs at least 2"),
        (dict(tau1=0.0), "tau1=0.0, tau2=1.0: both must be above 0"),
        (dict(gamma=-1.0), "gamma may not be negative"),
        (dict(floor=1.5), "floor=1.5"),
        (dict(kernel=4), "kernel=4: pooling needs an odd width"),
        (dict(rows="mean"), "rows='mean': use 'own' or 'shared'"),
        (dict(decode="h2o"), "decode='h2o': use 'last_query' or 'none'"),
        (dict(budget=Budget(tokens=32)), "a window of 32 leaves no slot for the past; use 33t or more"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Cake(**settings)


def test_the_official_variant_has_no_floor():
    with pytest.raises(ValueError, match="floor=0.5: the released code has none"):
        CakeOfficial(floor=0.5)
