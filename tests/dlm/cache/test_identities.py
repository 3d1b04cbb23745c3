"""Settings in which a cache must equal no cache, in every logit of every forward (fp32)."""

from __future__ import annotations

import pytest
import torch

from tests.dlm.toys import Rule, block_causal, dream, llada, prompts, traced

FRESH = [
    "freecache(refresh=1)", "freecache(delay=0,refresh=1)", "prefix(refresh=1)", "dual(refresh=1)", "dkv(1)",
    "dkv(1,reset_each_block=False)", "dllm-cache(1,1,0)", "dllm-cache(1,1,1.0)", "dllm-cache(1,7,1.0)",
]  # fmt: skip
ALL = [
    "none", "freecache", "freecache(0)", "prefix", "dual", "prefix('commit_first')", "dual('commit_first')", "dkv",
    "dllm-cache", "freecache+snapkv(0.5)",
]  # fmt: skip


def gap(one, other) -> float:
    """Largest difference of two traces' logits; infinite if they asked for other slots."""
    if len(one) != len(other) or not all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True)):
        return float("inf")
    pairs = [(a[1], b[1]) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).masked_fill(a == b, 0).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", FRESH)
def test_recomputing_everything_each_step_is_no_cache(make, cache):
    model, (ids, _) = make(), prompts(5)
    truth, wanted = traced(model, ids, "none")
    got, seen = traced(model, ids, cache)
    assert torch.equal(got.ids, truth.ids)
    assert gap(seen, wanted) < 1e-5


@pytest.mark.parametrize("make", [llada, dream])
def test_the_first_forward_is_that_of_no_cache(make):
    model, (ids, _) = make(), prompts(5)
    wanted = traced(model, ids, "none")[1][0]
    for cache in ALL:
        slots, logits = traced(model, ids, cache)[1][0]
        asked = slots >= 0  # commit_first asks for the block's first slot alone
        assert torch.allclose(logits[asked], wanted[1][asked], atol=1e-5), cache


def test_caches_differ_from_no_cache_where_they_may():
    """Guards the identities: with two layers and lively weights staleness shows."""
    model, (ids, _) = llada(), prompts(5)
    wanted = traced(model, ids, "none")[1]
    for cache in ALL[1:]:
        assert gap(traced(model, ids, cache)[1], wanted) > 1e-3, cache


@pytest.mark.parametrize("delay", [0, 1])
def test_freecache_with_one_block_and_no_prompt_is_no_cache(delay):
    model, ids = llada(), torch.zeros(1, 0, dtype=torch.int64)
    wanted = traced(model, ids, "none", block_length=12)[1]
    assert gap(traced(model, ids, f"freecache({delay})", block_length=12)[1], wanted) < 1e-5


@pytest.mark.parametrize("rule", [Rule(), Rule(quota=2), Rule(threshold=0.3)])
def test_block_causal_model_is_exact_when_tokens_are_computed_as_tokens(rule):
    model, (ids, _) = block_causal(prompt=5, block=4), prompts(5)

    def run(cache):
        return traced(model, ids, cache, Rule(rule.quota, rule.threshold))

    truth, wanted = run("none")
    for cache in ("freecache", "prefix", "dual", "freecache(delay=1)"):
        got, seen = run(cache)
        assert torch.equal(got.ids, truth.ids), cache
        assert gap(seen, wanted) < 1e-5, cache
    # Without the delay a block is frozen before its last tokens were seen as tokens.
    assert gap(run("freecache(delay=0)")[1], wanted) > 1e-3


@pytest.mark.parametrize("make", [llada, dream])
def test_one_block_prefix_equals_dual(make):
    model, (ids, _) = make(), prompts(5)
    prefix, one = traced(model, ids, "prefix", block_length=12)
    dual, other = traced(model, ids, "dual", block_length=12)
    assert torch.equal(prefix.ids, dual.ids) and gap(one, other) < 1e-5
    assert dual.stats.query_tokens == 17 + 11 * (12 + model.decoding_spec.shift)


@pytest.mark.parametrize("cache", ["none", "freecache(refresh=2)", "dual", "dkv(4)"])
def test_a_shifted_model_predicts_a_slot_from_the_row_before_it(cache):
    model, (ids, _) = dream(), prompts(5)
    whole = torch.cat([ids, ids.new_full((1, 12), model.decoding_spec.mask_id)], 1)
    with torch.no_grad():
        raw = model(whole).logits.index_fill(-1, torch.tensor(model.decoding_spec.mask_id), -torch.inf)
    slots, logits = traced(model, ids, cache)[1][0]
    wanted = slots[0] >= 0
    assert slots[0][wanted].tolist() == [5, 6, 7, 8]
    assert torch.allclose(logits[0, wanted], raw[0, slots[0, wanted] - 1], atol=1e-5)
