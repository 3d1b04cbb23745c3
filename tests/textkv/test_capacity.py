"""Bytes by formula against the bytes that real caches hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from tests.textkv.tiny import build, text_ids
from textkv import MethodCache
from textkv.capacity import ModelShape

EXACT = ("full", "snapkv", "pyramidkv", "expected", "tova", "cake", "knorm")
NEAR = ("adakv", "h2o", "streaming_llm", "kivi", "kivi(2)", "snapkv+kivi(4)", "lacache", "rkv")


def shape_of(model) -> ModelShape:
    return ModelShape.of(lambda: type(model)(model.config), model.config, torch.float32)


def held(model, method: str, tokens: int) -> MethodCache:
    cache = MethodCache(model, method, 0.25)
    with torch.inference_mode():
        model(text_ids(tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", EXACT)
def test_methods_that_store_tokens_as_they_are_weigh_what_is_computed(family, method):
    model = build(family)
    shape = shape_of(model)
    for tokens in (160, 211):
        cache = held(model, method, tokens)
        assert shape.kv_bytes(method, 0.25, tokens) == cache.kv_bytes()
        assert shape.full_bytes(tokens) == cache.full_bytes()


@pytest.mark.parametrize("method", NEAR)
def test_what_a_method_notes_beside_its_tokens_is_small(method):
    model = build("llama")
    cache = held(model, method, 300)
    noted = cache.kv_bytes() - shape_of(model).kv_bytes(method, 0.25, 300)
    # At most 16 bytes a token, head and layer, and a few hundred bytes for all.
    assert 0 <= noted <= 16 * cache.at_rest.tokens_stored * 3 * 2 + 400


def test_layers_with_windows_hold_what_they_see():
    config = Gemma3TextConfig(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    cache = held(model, "snapkv", 200)
    assert shape_of(model).kv_bytes("snapkv", 0.25, 200) == pytest.approx(cache.kv_bytes(), rel=0.05)


def test_states_of_hybrid_models_count():
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = held(model, "snapkv", 96)
    assert shape_of(model).kv_bytes("snapkv", 0.25, 96) == cache.kv_bytes()
    assert sum(x.state for x in shape_of(model).layers) > 0


def test_weights_are_counted_and_not_made():
    model = build("llama")
    shape = ModelShape.of(lambda: type(model)(model.config), model.config, torch.bfloat16)
    assert shape.weights == 2 * sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize("method", ["gear", "minicache", "quest", "snapkv+gear"])
def test_what_has_no_formula_is_refused(method):
    with pytest.raises(ValueError, match="no formula"):
        shape_of(build("llama")).kv_bytes(method, 0.25, 100)
