"""A method that acts on another's reading leaves the cache that it would have left itself."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

from textkv import MethodCache, list_methods, resolve_method
from textkv.method import REGISTRY
from textkv.reading import Reading, ReadsItself

COMPOSED = ("snapkv+kivi(4)", "h2o+adakv", "snapkv+mikv(16,2)", "cake+gear(4)", "snapkv+minicache", "expected+adakv")
SPELLED = {"sentence_kv": "sentence_kv(ends=(3,17,40))"}  # tiny models have no tokenizer
OURS = [
    SPELLED.get(name, name) for name in list_methods() if REGISTRY.find(name).__module__.startswith("textkv.methods")
]
TOKENS, NEW = 120, 6


def prompts(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 100, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def decoded(model, cache: MethodCache, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, NEW] and the last logits, from the logits after the prompt on."""
    told = []
    with torch.inference_mode():
        for _ in range(NEW):
            told.append(logits.argmax(-1, keepdim=True))
            logits = model(told[-1], past_key_values=cache).logits[:, -1].float()
    return torch.cat(told, 1), logits


def compare(model, method, reading: Reading, ids: torch.Tensor) -> float:
    """The method's own run beside its run on the reading: positions, bytes, counters, and the answer; returns how far
    the last logits are apart."""
    own, other = MethodCache(model, method), reading.open(method)
    with torch.inference_mode():
        logits = model(ids, past_key_values=own).logits[:, -1].float()
    torch.testing.assert_close(reading.logits, logits, atol=1e-4, rtol=1e-4)
    for number, (a, b) in enumerate(zip(own.layers, other.layers, strict=True)):
        assert torch.equal(a.held_positions(), b.held_positions()), f"layer {number}"
        assert (a.seen, a.since_eviction, a.real_seen.tolist()) == (b.seen, b.since_eviction, b.real_seen.tolist())
        assert [type(x) for x in a.segments] == [type(x) for x in b.segments]
        assert set(a.statistics) == set(b.statistics) and not b.notes
    assert (own.kv_bytes(), own.full_bytes()) == (other.kv_bytes(), other.full_bytes())
    assert own.peak_bytes == other.peak_bytes and own.at_rest.kv_bytes == other.at_rest.kv_bytes
    (said, last), (again, last_again) = decoded(model, own, logits), decoded(model, other, reading.logits)
    assert torch.equal(said, again)
    torch.testing.assert_close(last, last_again, atol=1e-3, rtol=1e-3)
    return float((last - last_again).abs().max())


@pytest.mark.parametrize("expression", [*OURS, *COMPOSED])
def test_as_its_own_run(model_of, expression) -> None:
    model, ids = model_of("llama"), prompts()
    method = resolve_method(expression, 0.5)
    # Beside others whose needs are larger: what was gathered for them must not show.
    others = [resolve_method(name, 0.5) for name in ("critic", "snapkv(window=48)", "h2o+mikv(16,2)")]
    assert compare(model, method, Reading(model, ids, [method, *others]), ids) < 0.05


@pytest.mark.parametrize("expression", ["full", "snapkv", "h2o", "streaming_llm", "kivi(4)", "cake"])
def test_with_windows_between(expression) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=24, sliding_window_pattern=3, pad_token_id=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model, ids = Gemma3ForCausalLM(config).eval(), prompts()
    method = resolve_method(expression, 0.5)
    assert compare(model, method, Reading(model, ids, [method]), ids) < 0.05


def test_a_reading_is_never_used_up(model_of) -> None:
    model, ids = model_of("qwen2"), prompts()
    methods = [resolve_method(name, 0.3) for name in ("h2o", "d2o", "lacache", "kivi(2)", "snapkv+minicache", "cake")]
    reading = Reading(model, ids, methods)
    before = [layer.segments[0].k.clone() for layer in reading._cache.layers]
    columns = [layer.notes["reading"].columns.clone() for layer in reading._cache.layers]
    for method in methods:
        decoded(model, reading.open(method), reading.logits)
    for layer, k, mass in zip(reading._cache.layers, before, columns, strict=True):
        assert torch.equal(layer.segments[0].k, k) and torch.equal(layer.notes["reading"].columns, mass)
    for method in reversed(methods):
        compare(model, method, reading, ids)


@pytest.mark.parametrize("expression", ["streaming_llm(prefill='exact_stream')"])
def test_who_reads_otherwise_is_refused(model_of, expression) -> None:
    model = model_of("llama")
    method = resolve_method(expression, "40t")
    with pytest.raises(ReadsItself, match="has to read the prompt itself"):
        Reading(model, prompts(), [method]).open(method)


def test_evidence_that_was_not_gathered_is_named(model_of) -> None:
    model = model_of("llama")
    reading = Reading(model, prompts(), [resolve_method("snapkv", 0.5)])
    for expression, lacks in (("h2o", "columns"), ("snapkv(window=64)", "window"), ("expected", "rope, query_moments")):
        with pytest.raises(ReadsItself, match=f"asks for {lacks}, which this reading did not gather"):
            reading.open(resolve_method(expression, 0.5))


def test_a_model_with_states_is_refused() -> None:
    config = Qwen3NextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers of kind state"):
        Reading(Qwen3NextForCausalLM(config).eval(), prompts(), [resolve_method("snapkv", 0.5)])
