"""CRITIC: the closed-form gradient, normalised entropies, the rate rule on tokens seen, and the identity with H2O."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.methods.test_cake import kept, lengths, read
from textkv import Budget, MethodCache
from textkv.conformance import check_method
from textkv.methods.critic import (
    ENTROPY,
    OUTPUT,
    Critic,
    Terms,
    capped_slope,
    look_once,
    output_gradient,
    row_entropy,
    unit,
)
from textkv.softmax import Softmax

LAYER = SimpleNamespace(index=0)


def decode(model, cache, ids):
    with torch.no_grad():
        for token in ids.split(1, 1):
            model(token, past_key_values=cache)


# ---- the terms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_gradient_is_autograds(softcap):
    """Keys and values repeated per query head, as the sum over a group's heads means."""
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 9, 4, generator=g, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 4, 4, generator=g, dtype=torch.float64)
    previous = torch.randn(1, 2, 2, 4, generator=g, dtype=torch.float64)
    k, v = (x.repeat_interleave(2, 1).requires_grad_() for x in (keys, values))
    scores = query[:, :, None] @ k.mT * 0.4
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    out = (scores.softmax(-1) @ v)[:, :, 0]
    torch.nn.functional.mse_loss(out.unflatten(1, (2, 2)), previous).backward()
    expected = (k.grad.abs().sum(-1) + v.grad.abs().sum(-1)).unflatten(1, (2, 2)).sum(2)
    row, output = look_once(query, keys, values, Softmax(0.4, softcap))
    slope = capped_slope(query, keys, Softmax(0.4, softcap))
    found = output_gradient(row, output, previous.float(), query, values, 0.4, slope)
    assert not mismatch(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_output_that_did_not_change_has_no_gradient():
    keys, values, query = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 4, 4)
    row, output = look_once(query, keys, values, Softmax(0.5))
    assert not output_gradient(row, output, output, query, values, 0.5).any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_even_rows_have_entropy_one_wherever_they_stand(monkeypatch, softcap):
    """Zero keys: every query looks evenly. Without the division by log(visible) later tokens would win."""
    monkeypatch.setattr("textkv.methods.critic._TILE", 60)  # several tiles, the last one shorter
    found = row_entropy(torch.randn(1, 2, 10, 4), torch.zeros(1, 1, 10, 4), Softmax(0.5, softcap))
    assert torch.allclose(found, torch.tensor([0.0] + [1.0] * 9).view(1, 1, -1), atol=1e-6)
    later = row_entropy(torch.randn(1, 2, 3, 4), torch.zeros(1, 1, 10, 4), Softmax(0.5, softcap))
    assert torch.allclose(later, torch.ones(1, 1, 3), atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5, 1e4])
def test_entropies_are_those_of_the_weights(softcap):
    """Of several heads and rows, queries at the end of a longer row; a cap that is never reached changes nothing."""
    queries, keys = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 13, 8)
    scores = queries.unflatten(1, (2, 2)) @ keys[:, :, None].mT
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    seen = torch.ones(5, 13, dtype=torch.bool).tril(8)
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = torch.special.entr(p).sum(-1).mean(2) / torch.arange(9, 14).log()
    assert torch.allclose(row_entropy(queries, keys, Softmax(1.0, softcap)), expected, atol=1e-5)


def test_a_row_of_known_entropy():
    """The second query sees two keys with weights 3/4 and 1/4."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    queries = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]).view(1, 1, 2, 2)
    expected = (2 * math.log(2) - 0.75 * math.log(3)) / math.log(2)
    assert row_entropy(queries, keys, Softmax(1.0))[0, 0].tolist() == pytest.approx([0.0, expected])


def test_terms_are_scaled_weighted_and_guarded():
    real = torch.ones(1, 2, 8, dtype=torch.bool)
    assert unit(torch.full((1, 2, 8), 3.0), real).unique().tolist() == [0.0]
    assert unit(torch.tensor([[1.0, 5.0, 3.0, 99.0]]), torch.tensor([[True] * 3 + [False]]))[0, :3].tolist() == [
        0,
        1,
        0.5,
    ]
    ramp = torch.arange(8.0).expand(1, 2, 8).clone()
    spike = torch.zeros(1, 2, 8)
    spike[0, 0, 3] = 4.0
    positions = torch.arange(8, dtype=torch.int32).expand(1, 2, 8)
    terms = Terms(ramp, spike, spike, None)
    own = Critic(weights=(0.5, 0.25, 0.25), heads="own")._importance(terms, positions, torch.tensor([4]))
    infinite = float("inf")
    assert own[0, 1].tolist() == pytest.approx([infinite, *[i / 7 for i in range(1, 6)], infinite, infinite])
    assert own[0, 0, 3] > own[0, 0, 5]  # 3/14 + 1/2 against 5/14
    shared = Critic(weights=(0.5, 0.25, 0.25))._importance(terms, positions, torch.tensor([4]))
    assert torch.equal(shared[0, 0], shared[0, 1])


# ---- the rate rule -------------------------------------------------------------------------------------------------


def test_the_rate_rule():
    method = Critic(budget=Budget(fraction=0.7))
    assert [method.kept(n) for n in (1, 10, 100, 4097)] == [1, 7, 70, 2867]
    assert method.kept(100, load=0.5) == 60 and method.kept(100, load=1.0) == method.kept(100, load=9.0) == 50
    assert Critic(budget=Budget(fraction=0.7), least=128).kept(100) == 100
    assert Critic(budget=Budget(fraction=0.7), least=128).kept(150) == 128
    assert Critic(budget=Budget(fraction=0.3)).kept(100, load=1.0) == 30  # a base rate above r_max stays
    assert Critic(budget=Budget(tokens=60)).kept(100) == 60 and Critic(budget=Budget(tokens=60)).kept(40) == 40
    assert Critic(budget=Budget(tokens=60)).kept(100, load=0.25) == 55
    assert [Critic().kept(n) for n in (1, 77)] == [1, 77]


def test_decoding_keeps_a_share_of_the_tokens_seen_and_does_not_collapse(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100)
    cache = read(model, "critic(recent=4)", 0.7, ids[:, :40])
    assert lengths(cache) == [28] * 3
    for seen in range(41, 71):
        decode(model, cache, ids[:, seen - 1 : seen])
        assert lengths(cache) == [math.floor(0.7 * seen + 1e-9)] * 3
    for positions in kept(cache):
        assert positions[0, 0, :4].tolist() == [0, 1, 2, 3] and positions[0, 0, -4:].tolist() == [66, 67, 68, 69]
        assert torch.equal(positions[:, 0], positions[:, 1])


def test_a_budget_in_tokens_is_a_ceiling_and_short_prompts_stay(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache = read(model, "critic", "40t", ids[:, :30])
    assert all(layer.since_eviction == 30 for layer in cache.layers)
    decode(model, cache, ids[:, 30:50])
    assert lengths(cache) == [40] * 3
    least = read(model, "critic(least=30)", 0.5, ids[:, :50])
    assert lengths(least) == [30] * 3


def test_memory_pressure_raises_the_rate_for_good(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    relaxed = read(model, "critic(capacity=1000000000)", 0.7, ids[:, :60])
    pressed = read(model, "critic(capacity=1,pressure=1.0)", 0.7, ids[:, :60])
    assert lengths(relaxed) == [41] * 3  # the load is not quite nothing
    assert lengths(pressed) == [30] * 3
    object.__setattr__(pressed.method, "capacity", 1_000_000_000)  # the memory is free again
    decode(model, pressed, ids[:, 60:70])
    assert lengths(pressed) == [35] * 3


# ---- on a model ----------------------------------------------------------------------------------------------------


def test_received_attention_alone_is_h2o(model_of):
    """Both with half the budget recent: the same sums, over the prompt and while decoding, over two turns."""
    model, ids = model_of("llama"), tiny.text_ids(100)
    both = [
        read(model, name, "30t", ids[:, :60])
        for name in ("critic(weights=(1,0,0),heads='own',sinks=0,recent=1000)", "h2o")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*map(kept, both), strict=True))
    for cache in both:
        decode(model, cache, ids[:, 60:66])
    assert all(torch.equal(a, b) for a, b in zip(*map(kept, both), strict=True))
    for cache in both:
        with torch.no_grad():
            model(ids[:, 66:90], past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(*map(kept, both), strict=True))


def test_entropies_stay_with_their_tokens(model_of):
    model, ids = model_of("llama"), tiny.text_ids(50)
    whole = read(model, "critic", 0.99, ids[:, :41])
    cut = read(model, "critic", 0.5, ids[:, :41])
    decode(model, cut, ids[:, 41:44])
    positions, entropy = kept(cut)[0][0, 0], cut.layers[0].statistic(ENTROPY)[0]
    everything = dict(zip(kept(whole)[0][0, 0].tolist(), whole.layers[0].statistic(ENTROPY)[0].T, strict=True))
    old = [(i, p) for i, p in enumerate(positions.tolist()) if p in everything]
    assert len(old) > 10
    for i, p in old:
        assert not mismatch(entropy[:, i], everything[p])
    assert bool(((entropy[:, -3:] > 0) & (entropy[:, -3:] <= 1.0001)).all())


def test_the_last_output_is_remembered_per_row(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40, batch=2)
    cache = read(model, "critic", 0.5, ids)
    output = cache.layers[2].statistics[OUTPUT].clone()
    assert output.shape == (2, 2, 2 * 16)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[2].statistics[OUTPUT], output.flip(0))
    light = read(model, "critic(weights=(0.5,0.5,0))", 0.5, ids)
    assert OUTPUT not in light.layers[2].statistics


def test_a_first_prompt_of_one_token(model_of):
    model, ids = model_of("llama"), tiny.text_ids(12)
    cache = read(model, "critic", "6t", ids[:, :1])
    decode(model, cache, ids[:, 1:12])
    assert lengths(cache) == [6] * 3 and all(bool((p[..., -1] == 11).all()) for p in kept(cache))


def test_padded_rows_keep_what_they_keep_alone(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60, batch=2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :17] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    both = read(model, "critic(recent=4)", 0.5, ids, attention_mask=mask, position_ids=places)
    for row, start in enumerate((0, 17)):
        alone = read(model, "critic(recent=4)", 0.5, ids[row : row + 1, start:])
        for ours, single in zip(kept(both), kept(alone), strict=True):
            assert [sorted(set(h.tolist()) - {-1}) for h in ours[row]] == [h.tolist() for h in single[0]]


def test_without_a_rate_nothing_is_touched(model_of):
    cache = read(model_of("llama"), "critic", 1.0, tiny.text_ids(30))
    assert all(layer.since_eviction == 30 and not layer.statistics for layer in cache.layers)


@pytest.mark.parametrize("method", ["critic", "critic(weights=(0.4,0,0.6),heads='own')", "critic+adakv"])
def test_it_conforms(method):
    outcomes = {check.name: check.outcome for check in check_method(method)}
    assert outcomes["crop_or_refusal"] == ("passed" if "+" in method else "not applicable")


def test_nan_names_the_layer(model_of):
    cache = MethodCache(model_of("llama"), "critic", 0.4)
    layer = cache.layers[1]
    layer.lazy_initialization(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    q = torch.full((1, 4, 30, 16), float("nan"))
    with pytest.raises(ValueError, match="layer 1: the importance scores contain NaN"):
        layer.feed(q, torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weights=(0.5, 0.2, 0.2)), "add up to 0.9; scale them to 1"),
        (dict(weights=(0.5, 0.5)), "give three shares"),
        (dict(weights=(1.5, -0.5, 0.0)), "give three shares"),
        (dict(sinks=-1), "sinks=-1, recent=32, least=0: none may be negative"),
        (dict(heads="all"), "heads='all': use 'shared' or 'own'"),
        (dict(capacity=0), "capacity=0: give the bytes"),
        (dict(most=1.0), "most lies in"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Critic(**settings)
