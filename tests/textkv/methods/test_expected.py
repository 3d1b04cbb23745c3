"""Expected Attention: moments against the model's own pre-RoPE queries, the score by hand and in plain loops."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import Method, MethodCache, Needs, resolve_method
from textkv.conformance import check_method
from textkv.eviction import PROTECTED
from textkv.evidence import Evidence, QueryMoments
from textkv.kernels import rotate
from textkv.kinds import text_model
from textkv.methods.expected import Expected, mean_rotation
from textkv.positions import RotarySpec
from textkv.segments.base import Stored

FREQ = torch.tensor([1.0, 0.1, 0.01, 0.001])


@dataclass(frozen=True)
class Seeing(Method):
    """Keeps the evidence of every layer, drops nothing."""

    name: ClassVar = "seeing"

    def needs(self) -> Needs:
        return Needs(rope=True, query_moments=4)

    def on_prefill_end(self, layer, evidence) -> None:
        layer.notes["seen"] = evidence


def case(keys, values, moments, n=None):
    """What `score` gets for one row without padding, behind n tokens."""
    batch, kv_heads, stored, dim = keys.shape
    positions = torch.arange(stored, dtype=torch.int32).expand(batch, kv_heads, stored)
    n = stored if n is None else n
    places = torch.arange(n).expand(batch, n)
    evidence = Evidence(
        moments.mean[:, :, None][:, :, :0], dim**-0.5, torch.full((batch,), n), rope_positions=places, moments=moments
    )  # fmt: skip
    return Stored(keys, values, positions), evidence


def layer_of(freq=FREQ):
    return SimpleNamespace(index=0, rotary=RotarySpec.halves(freq))


def random_case(heads=4, kv_heads=2, n=20, dim=8):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 30, dim, generator=g) + torch.randn(1, heads, 1, dim, generator=g)
    keys, values = torch.randn(2, 1, kv_heads, n, dim, generator=g)
    return case(keys, values, QueryMoments.of(q, torch.ones(1, 30, dtype=torch.bool))), q


# ---- evidence ------------------------------------------------------------------------------------------------------


def plain_queries(model, run):
    """Queries [batch, heads, m, head_dim] of each layer just before the rotary embedding, while `run()` runs."""
    found, handles = [], []
    for block in text_model(model).layers:
        attention = block.self_attn
        source = getattr(attention, "q_norm", attention.q_proj)
        handles.append(source.register_forward_hook(lambda m, i, out: found.append(out.detach())))
    run()
    for handle in handles:
        handle.remove()
    return [q.view(*q.shape[:2], -1, attention.head_dim).transpose(1, 2).double() for q in found]


def moments_differ(moments, row, q):
    """How one row's moments differ from those of q [heads, m, head_dim], "" = not at all."""
    centred = q - q.mean(1, keepdim=True)
    assert float(moments.count[row]) == q.shape[1]
    mean = mismatch(moments.mean[row].double(), q.mean(1), atol=2e-4, rtol=1e-4)
    covariance = centred.mT @ centred / q.shape[1]
    return mean + mismatch(moments.covariance[row].double(), covariance, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_5_vl"])
def test_moments_are_those_of_the_queries_before_the_rotation(model_of, family, monkeypatch):
    model, ids = model_of(family), tiny.text_ids(40)
    monkeypatch.setattr("textkv.collector._BLOCK", 16)
    caches = [MethodCache(model, Seeing()) for _ in range(2)]
    with torch.no_grad():
        queries = plain_queries(model, lambda: model(ids, past_key_values=caches[0]))
        caches[1].begin(tokens=40)
        for chunk in ids.split((3, 1, 30, 6), 1):
            model(chunk, past_key_values=caches[1])
    for cache in caches:
        for layer, q in zip(cache.layers, queries, strict=True):
            assert not moments_differ(layer.notes["seen"].moments, 0, q[0, :, 4:])


def test_padded_rows_have_their_own_moments(model_of):
    model = model_of("llama")
    ids, mask = tiny.text_ids(30, batch=3), torch.ones(3, 30, dtype=torch.int64)
    mask[1, :9], mask[2, :27] = 0, 0
    cache = MethodCache(model, Seeing())
    with torch.no_grad():
        queries = plain_queries(model, lambda: model(ids, attention_mask=mask, past_key_values=cache))
    for layer, q in zip(cache.layers, queries, strict=True):
        seen = layer.notes["seen"].moments
        assert not moments_differ(seen, 0, q[0, :, 4:])
        assert not moments_differ(seen, 1, q[1, :, 13:])
        assert seen.count[2] == 0 and not seen.mean[2].any() and not seen.covariance[2].any()


def test_a_second_turn_counts_its_own_queries(model_of):
    model, ids = model_of("llama"), tiny.text_ids(50)
    cache = MethodCache(model, Seeing())
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        assert float(cache.layers[0].notes["seen"].moments.count) == 26
        queries = plain_queries(model, lambda: model(ids[:, 30:], past_key_values=cache))
    for layer, q in zip(cache.layers, queries, strict=True):
        assert not moments_differ(layer.notes["seen"].moments, 0, q[0])
        assert layer.notes["seen"].rope_positions[0].tolist() == list(range(30, 50))


def test_a_large_mean_does_not_hide_a_small_spread():
    q = torch.randn(1, 1, 64, 4, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1000.0
    every = torch.ones(1, 64, dtype=torch.bool)
    parts = [QueryMoments.of(q[:, :, i : i + 8], every[:, :8]) for i in range(0, 64, 8)]
    expected = torch.cov(q[0, 0].double().T, correction=0)
    assert not mismatch(sum(parts[1:], parts[0]).covariance[0, 0].double(), expected, atol=1e-6, rtol=1e-2)


def test_moments_of_one_head_are_a_part():
    (_, evidence), q = random_case()
    part = evidence.part(0, 1, 2, torch.arange(3)).moments
    assert torch.equal(part.mean, evidence.moments.mean[:, 2:]) and part.scatter.shape == (1, 2, 8, 8)
    assert torch.equal(evidence.part(0, None, 2, torch.arange(3)).moments.scatter, evidence.moments.scatter)


def test_needs_join_and_are_checked():
    joined = Needs(rope=True, query_moments=4) | Needs(window=8)
    assert joined == Needs(window=8, rope=True, query_moments=4) and Needs().query_moments is None
    assert (Needs() | Needs()).query_moments is None
    with pytest.raises(ValueError, match="query_moments=4 with rope=False: .* and rope=True"):
        Needs(query_moments=4)
    with pytest.raises(ValueError, match="query_moments=-1 with rope=True: .*0 = none"):
        Needs(rope=True, query_moments=-1)


# ---- the score -----------------------------------------------------------------------------------------------------


def test_hand_case():
    """Frequency 0 turns nothing, so z = k.mu / sqrt(d) + k^2 var / (2 d): logs of 1 and 3, then of 1, 3 and 12."""
    d = 2
    log = torch.log(torch.tensor([1.0, 3.0, 12.0]))
    keys = torch.stack([log, torch.zeros(3)], -1)[None, None]
    values = torch.tensor([[2.0, 0], [0, 1.0], [3.0, 4.0]])[None, None]
    moments = QueryMoments(torch.ones(1), torch.tensor([[[d**0.5, 0.0]]]), torch.zeros(1, 1, d, d))
    method = Expected(sinks=0, future=3, epsilon=0.0)
    shares = torch.tensor([1.0, 3.0, 12.0]) / 16
    scores = method.score(layer_of(torch.zeros(1)), *case(keys, values, moments), keep=2)[0, 0]
    assert not mismatch(scores, shares * torch.tensor([2.0, 1.0, 5.0]))
    plain = Expected(sinks=0, future=3, vnorm=False, epsilon=0.5)
    scores = plain.score(layer_of(torch.zeros(1)), *case(keys, values, moments), keep=2)[0, 0]
    assert not mismatch(scores, shares + 0.5)
    wide = QueryMoments(torch.tensor([2.0]), moments.mean, torch.tensor([[[[8.0, 0], [0, 0]]]]))
    scores = plain.score(layer_of(torch.zeros(1)), *case(keys, values, wide), keep=2)[0, 0]
    assert not mismatch(scores, (log + log**2).softmax(-1) + 0.5)


def test_mean_rotation_is_the_mean_of_rotations():
    basis = torch.eye(10)[None, None].expand(2, 1, 10, 10)  # rows e_i; dims 8 and 9 are not rotary
    first = torch.tensor([0, 37])
    total = sum(rotate(basis, (first + i)[:, None].expand(2, 10), FREQ) for i in range(5)) / 5
    mean = mean_rotation(first, 5, RotarySpec.halves(FREQ, 10))
    assert not mismatch(mean, total[:, 0].mT, atol=1e-6, rtol=1e-5)


def test_the_mean_logit_is_that_of_the_queries_to_come():
    """Every prompt query at every future position: their mean q.k is what the score without covariance says."""
    (held, evidence), q = random_case()
    future = [rotate(q, torch.full((30,), p), FREQ) for p in range(20, 27)]
    mean = torch.stack([f.mean(2) for f in future]).mean(0).unflatten(1, (2, 2))
    ours = Expected(future=7, covariance=False)._expected_logits(held.keys, evidence, RotarySpec.halves(FREQ))
    assert not mismatch(ours, mean @ held.keys.mT * evidence.scale, atol=1e-5, rtol=1e-4)


def test_score_equals_plain_loops():
    (held, evidence), q = random_case()
    scores = Expected(future=9, sinks=3, epsilon=0.01).score(layer_of(), held, evidence, keep=10)
    turn = mean_rotation(torch.tensor([20]), 9, RotarySpec.halves(FREQ, 8))[0].double()
    for head in range(2):
        shares = []
        for one in q[0, 2 * head : 2 * head + 2].double():
            mu, cov = turn @ one.mean(0), turn @ torch.cov(one.T, correction=0) @ turn.T
            k = held.keys[0, head, 3:].double()
            z = torch.stack([x @ mu / 8**0.5 + x @ cov @ x / 16 for x in k])
            shares.append(z.softmax(0))
        expected = (torch.stack(shares).mean(0) + 0.01) * held.values[0, head, 3:].double().norm(dim=-1)
        assert not mismatch(scores[0, head, 3:].double(), expected, atol=1e-6, rtol=1e-4)
        assert scores[0, head, :3].tolist() == [PROTECTED] * 3


def test_blocks_of_keys_change_nothing(monkeypatch):
    (held, evidence), _ = random_case()
    whole = Expected().score(layer_of(), held, evidence, keep=10)
    monkeypatch.setattr("textkv.methods.expected._BLOCK", 7)
    assert not mismatch(Expected().score(layer_of(), held, evidence, keep=10), whole)


def test_without_covariance_and_values_it_ranks_by_the_mean_query():
    (held, evidence), _ = random_case(heads=2)
    scores = Expected(future=5, sinks=0, covariance=False, vnorm=False).score(layer_of(), held, evidence, keep=10)
    turn = mean_rotation(torch.tensor([20]), 5, RotarySpec.halves(FREQ, 8))
    product = (held.keys @ (evidence.moments.mean @ turn.mT)[..., None])[..., 0]
    assert torch.equal(scores.argsort(-1), product.argsort(-1))


def test_group_mean_and_permuted_heads():
    (held, evidence), _ = random_case()
    scores = Expected().score(layer_of(), held, evidence, keep=10)
    repeated = Stored(*(x.repeat_interleave(2, 1) for x in (held.keys, held.values, held.positions)))
    each = Expected(sinks=4).score(layer_of(), repeated, evidence, keep=10)
    assert not mismatch(scores[..., 4:], each.unflatten(1, (2, 2)).mean(2)[..., 4:])
    m, order = evidence.moments, torch.tensor([2, 3, 0, 1])
    turned = case(held.keys.flip(1), held.values.flip(1), QueryMoments(m.count, m.mean[:, order], m.scatter[:, order]))
    assert not mismatch(Expected().score(layer_of(), *turned, keep=10), scores.flip(1))


def test_sinks_make_room_for_one_other_token():
    (held, evidence), _ = random_case()
    for keep, sinks in ((1, 0), (2, 1), (4, 3), (9, 4)):
        scores = Expected().score(layer_of(), held, evidence, keep)
        assert (scores == PROTECTED).sum(-1).tolist() == [[sinks, sinks]]


# ---- on models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_every_family_keeps_the_budget_and_the_sinks(model_of, family):
    cache = MethodCache(model_of(family), "expected", 0.25)
    with torch.no_grad():
        cache._model()(tiny.text_ids(64), past_key_values=cache)
    for i in range(3):
        positions = cache.kept_positions(i)
        assert positions.shape[-1] == 16 and (positions[..., :4] == torch.arange(4)).all()
        assert (positions.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_screens_are_scored_too(model_of, family):
    model = model_of(family)
    inputs, spans = tiny.screens(2)
    cache = MethodCache(model, "expected", 0.5)
    cache.begin(**inputs, spans=spans)
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache)
    n = inputs["input_ids"].shape[1]
    assert bool(out.logits.isfinite().all())
    assert all(cache.kept_positions(i).shape[-1] == n // 2 for i in range(3))


@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_short_prompts_and_small_budgets(model_of, tokens):
    model = model_of("llama")
    cache = MethodCache(model, "expected", "2t")
    ids = tiny.text_ids(8)
    with torch.no_grad():
        model(ids[:, :tokens], past_key_values=cache)
        out = model(ids[:, tokens : tokens + 1], past_key_values=cache)
    assert bool(out.logits.isfinite().all())
    assert cache.at_rest.tokens_stored == min(tokens, 2)


@pytest.mark.parametrize(("method", "budget"), [("expected", 0.4), ("expected(future=8,epsilon=0.01)+adakv", "20t")])
def test_it_conforms(method, budget):
    assert {r.outcome for r in check_method(method, budget)} == {"passed"}


def test_arguments_are_checked():
    assert resolve_method("expected").needs() == Needs(rope=True, query_moments=4)
    with pytest.raises(ValueError, match="future=0: at least 1 position must lie ahead; the paper uses 512"):
        Expected(future=0)
    with pytest.raises(ValueError, match="sinks=-1: cannot be negative; the paper keeps 4"):
        Expected(sinks=-1)
    for epsilon in (-0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="epsilon=.*give a number of at least 0"):
            Expected(epsilon=epsilon)
