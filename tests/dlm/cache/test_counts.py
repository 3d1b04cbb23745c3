"""Query tokens: the published closed forms, on models that only count the rows they are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm.cache.dllm_cache
from dlm.decode import decode
from tests.dlm.toys import Counter, Rule

P, G, B, S = 1000, 256, 32, 256


def count(cache: str, prompt: int, gen: int, block: int, steps: int, shift: int = 0):
    model = Counter(shift)
    ids = torch.zeros(1, prompt, dtype=torch.int64)
    got = decode(
        model, ids, gen_length=gen, block_length=block, steps=steps, cache=cache, unmask=Rule(quota=gen // steps)
    )
    assert model.rows == got.stats.query_tokens and got.stats.forwards == steps
    return got.stats.query_tokens, model


@pytest.mark.parametrize(
    "cache, tokens",
    [
        ("none", 321_536), ("prefix", 45_760), ("dual", 17_984), ("freecache(delay=0)", 37_864),
        ("freecache(delay=1)", 38_088), ("dkv(8)", 77_984), ("dkv(16)", 59_952), ("dkv(None)", 50_936),
    ],
)  # fmt: skip
def test_table(cache, tokens):
    assert count(cache, P, G, B, S)[0] == tokens


@pytest.mark.parametrize(
    "prompt, gen, block, savings",
    [
        (1000, 256, 32, {"freecache(0)": "8.49", "prefix": "7.03", "dual": "17.9"}),
        (1000, 1024, 256, {"freecache(0)": "3.16", "prefix": "3.14", "dual": "7.7"}),
        (200, 256, 32, {"freecache(0)": "3.15", "prefix": "2.97", "dual": "10.1"}),
    ],
)
def test_published_savings(prompt, gen, block, savings):
    base = count("none", prompt, gen, block, gen)[0]
    for cache, times in savings.items():
        digits = len(times.split(".")[1])
        assert f"{base / count(cache, prompt, gen, block, gen)[0]:.{digits}f}" == times, cache


class CountingLayer:
    """The steps of a model's layer, reduced to counting rows."""

    scaling = 1.0

    def __init__(self, index: int) -> None:
        self.layer_idx, self.computed, self.valued = index, 0, 0

    def input_norm(self, hidden):
        return hidden

    to_out = input_norm

    def qk(self, normed, rope):
        self.computed += normed.shape[1]
        zeros = normed.new_zeros(1, 1, normed.shape[1], 1)
        return zeros, zeros

    def v(self, normed):
        self.valued += normed.shape[1]
        return normed[:, None]

    def ffn(self, hidden):
        return hidden


def test_table_of_dllm_cache(monkeypatch):
    monkeypatch.setattr(dlm.cache.dllm_cache, "full_attention", lambda q, k, v, scale, mask: q)
    layers = [CountingLayer(0), CountingLayer(1)]

    class Model(Counter):
        def __call__(self, input_ids, *, past_key_values, **rest):
            hidden = torch.rand(1, input_ids.shape[1], 1)
            for layer in layers:
                hidden = past_key_values.drive(layer, hidden, (hidden, hidden), None)
            return super().__call__(input_ids, past_key_values=past_key_values, **rest)

    ids = torch.zeros(1, P, dtype=torch.int64)
    got = decode(Model(), ids, gen_length=G, block_length=B, cache="dllm-cache(50,7,0.25)", unmask=Rule()).stats
    assert got.query_tokens == layers[1].computed == 29_488
    assert got.value_tokens == 56_064 == layers[1].valued - layers[1].computed
    assert layers[0].computed == 321_536


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_closed_forms(prompt, blocks, s, quota):
    block = s * quota
    gen, steps = blocks * block, blocks * s
    full = prompt + gen
    forms = {
        "none": steps * full,
        "freecache(0)": prompt + steps * (gen + block) // 2,
        "freecache(1)": prompt + steps * (gen + block) // 2 + (blocks - 1) * block,
        "prefix": blocks * full + (s - 1) * blocks * (gen + block) // 2,
        "dual": blocks * full + (steps - blocks) * block,
    }
    for cache, tokens in forms.items():
        assert count(cache, prompt, gen, block, steps)[0] == tokens, cache


def test_a_shift_costs_one_token_in_every_forward_behind_the_first():
    plain, shifted = (count("freecache", 10, 24, 8, 24, shift)[0] for shift in (0, 1))
    assert shifted == plain + 23
    plain, shifted = (count("dual", 10, 24, 8, 24, shift)[0] for shift in (0, 1))
    assert shifted == plain + 24 - 3


def test_window_lengths():
    assert count("dual", 10, 16, 8, 16)[1].shapes == [26, *[8] * 7, 26, *[8] * 7]
    assert count("freecache(0)", 10, 16, 8, 16)[1].shapes == [26, *[16] * 7, *[8] * 8]
    assert count("freecache(1)", 10, 16, 8, 16)[1].shapes == [26, *[16] * 8, *[8] * 7]


def test_a_block_that_one_forward_fills_costs_no_other():
    """The published code indexes out of its table here, or runs a forward for nothing."""
    for cache in ("prefix", "dual", "freecache", "dkv"):
        assert count(cache, 4, 12, 4, 3)[1].shapes[0] == 16, cache


def test_short_last_block():
    assert count("dual", 2, 10, 4, 10)[1].shapes == [12, 4, 4, 4, 12, 4, 4, 4, 12, 2]
