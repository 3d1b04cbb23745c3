"""Screenshots under strongly biased keys: 4 bits on Qwen2.5-VL shapes, whose keys turn with three axes of positions."""

from __future__ import annotations

import copy

import pytest
import torch

import agentkv  # noqa: F401  (registers gui-kv)
from tests.textkv import tiny
from tests.textkv.conftest import model_of  # noqa: F401
from tests.textkv.methods.test_kivi import PerToken
from textkv import MethodCache

SMALL = "group=16,residual=16"


def biased(model, pairs: slice | list[int], norm: float = 600.0):
    """The model with a key bias of this norm per layer on some rotary pairs, and keys and queries that still matter."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            bias = torch.zeros(2, 2, 8)  # heads, halves, frequencies: 2 of time, 3 of height, 3 of width
            bias[..., pairs] = torch.randn(bias[..., pairs].shape, generator=generator)
            layer.self_attn.k_proj.bias.copy_(bias.flatten() * norm / bias.norm())
    return model


@torch.no_grad()
def attention_outputs(model, method, budget: float) -> list[torch.Tensor]:
    """Of each layer, while 24 tokens are decoded after four screenshots."""
    inputs, spans = tiny.screens(4, text=9, grid=(6, 8))
    cache = MethodCache(model, method, budget)
    cache.begin(**inputs, spans=spans)
    model(**inputs, past_key_values=cache)
    seen = [[] for _ in model.model.language_model.layers]
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out, own=own: own.append(out[0]))
        for layer, own in zip(model.model.language_model.layers, seen, strict=True)
    ]
    for token in tiny.text_ids(24)[0]:
        model(token.view(1, 1), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own, 1) for own in seen]


def errors(model, method, against: str = "full", budget: float = 1.0) -> list[float]:
    """Of each layer, |ours - truth| / |truth|."""
    ours, true = attention_outputs(model, method, budget), attention_outputs(model, against, budget)
    assert all(bool(x.isfinite().all()) for x in ours)
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, true, strict=True)]


@torch.no_grad()
def key_errors(model, method, budget: float) -> float:
    """Mean over layers of the root mean square by which stored keys differ from the exact ones, after a prompt."""
    inputs, spans = tiny.screens(4, text=9, grid=(6, 8))
    caches = [MethodCache(model, method, budget), MethodCache(model, "full")]
    for cache in caches:
        model.model.rope_deltas = None
        cache.begin(**inputs, spans=spans)
        model(**inputs, past_key_values=cache)
    errors = []
    for ours, true in zip(*(cache.layers for cache in caches), strict=True):
        held, exact = ours.stored(), true.stored().keys
        at = held.positions.clamp(min=0).long()[..., None].expand(held.keys.shape)
        errors.append((held.keys - exact.gather(2, at))[held.positions >= 0].square().mean().sqrt())
    return float(sum(errors) / len(errors))


PAIRS = {"all": slice(None), "time": slice(0, 2), "heights and widths": slice(2, 8), "slow": [4, 7]}
METHODS = [(f"kivi(4,{SMALL}{{}})", "full", 1.0), (f"gui-kv+kivi(4,{SMALL}{{}})", "gui-kv", 0.5)]


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("method, against, budget", METHODS)
def test_a_bias_costs_stored_keys_nothing(model_of, pairs, method, against, budget):  # noqa: F811
    plain = model_of("qwen2_5_vl")
    model = biased(plain, PAIRS[pairs])
    without, with_bias = (key_errors(x, method.format(""), budget) for x in (plain, model))
    assert with_bias < 1.2 * without  # a code in a near tie falls as the processor rounds; seen: at most 1.09
    if pairs != "slow":  # there a block's own zero points do the same
        assert with_bias < 0.2 * key_errors(model, method.format(",centre='fixed'"), budget)


@pytest.mark.parametrize("pairs", ["all", "time", "slow"])
@pytest.mark.parametrize("method, against, budget", METHODS)
def test_a_bias_leaves_four_bits_usable(model_of, pairs, method, against, budget):  # noqa: F811
    """Behind the first layer hidden states are off by what its values lose, and queries off by that meet the whole
    bias: no way to store keys mends it."""
    plain = model_of("qwen2_5_vl")
    model = biased(plain, PAIRS[pairs])
    without, ours = errors(plain, method.format(""), against, budget), errors(model, method.format(""), against, budget)
    wrong_axis = errors(model, PerToken(4, group=16, residual=16))
    assert ours[0] < 1.25 * without[0] < 0.6 * wrong_axis[0] and sum(ours) < 0.6 * sum(wrong_axis)
    if pairs != "slow":
        assert sum(ours) < 0.55 * sum(errors(model, method.format(",centre='fixed'"), against, budget))
