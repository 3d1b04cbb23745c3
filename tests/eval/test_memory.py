"""Decoding's own tensors: what is counted, and that packed caches rebuild no layer while transformers' do."""

from __future__ import annotations

import pytest
import torch

from agentkv.eval.memory import Allocations, decoding_memory, decoding_row
from agentkv.eval.quantized import HAS_FP8
from tests.textkv import tiny


def test_storages_made_anew_count_once_and_while_they_live() -> None:
    x = torch.zeros(10)
    with Allocations() as seen:
        y = x + 1  # 40 bytes
        y.view(2, 5).add_(1)  # nothing new
        torch.cat([y, y])  # 80 bytes, gone at once
        z = y.double()  # 80 bytes beside y
    assert (seen.largest, seen.alive) == (80, 120) and seen.maker == "aten.cat.default"
    assert z.shape == (10,)


def test_what_was_there_before_counts_nothing() -> None:
    x = torch.zeros(100)
    with Allocations() as seen:
        x[3:].mul_(2)
        x.t()
    assert (seen.largest, seen.alive) == (0, 0)


def test_what_goes_makes_room() -> None:
    held = [torch.zeros(100)]
    with Allocations(held) as seen:
        held[0] = held[0] + 1  # 400 bytes beside 400, then in their place
        more = held[0] * 2
    assert seen.alive == 400 and more.nbytes == 400


@pytest.mark.parametrize("method", ["kivi(4)", "gear(2)", "mikv(16,2)", "mikv(16,2,codes='scaled')", "turboquant(2)"])
def test_what_packed_caches_need_to_decode_does_not_grow_with_the_prompt(method: str, small_tiles: None) -> None:
    short, long = (decoding_memory(tiny.build("llama"), method, "0.2", tiny.text_ids(n), n - 3) for n in (512, 960))
    assert long.layer_bytes == 2 * 960 * 2 * 16 * 4
    # Tokens are read in nearly equal parts of about so many: up to half as many more.
    assert 0 < long.largest <= 1.5 * short.largest and long.largest < 0.3 * long.layer_bytes / 2, long.maker
    # What moves to a larger buffer lies in both for that moment: a layer's codes, or the exact tokens of mikv. A layer
    # that is read out would be all of it.
    assert long.alive < 1.05 * short.alive + 0.5 * (long.layer_bytes - short.layer_bytes)


def test_packing_a_buffer_is_watched_too() -> None:
    row = decoding_row(tiny.build("llama"), "kivi(4)", "0.2", 256)
    assert row["memory_tokens"] == 256 and row["n"] == 4 and row["step_alive"] > 0
    with pytest.raises(ValueError, match="memory=64: give the tokens of a prompt, at least 128"):
        decoding_row(tiny.build("llama"), "kivi(4)", "0.2", 64)


@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no fp8 cache")
def test_transformers_cache_makes_a_layers_keys_and_values() -> None:
    seen = decoding_memory(tiny.build("llama"), "hf-fp8", "1.0", tiny.text_ids(400), 398)
    assert seen.row()["step_largest_share"] == pytest.approx(0.5), "all keys of a layer in full precision"
    assert seen.row()["step_alive_share"] >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no fp8 cache")
def test_a_gpus_own_count_is_no_less_than_the_tensors() -> None:
    model = tiny.build("llama").to("cuda")
    try:
        seen = decoding_memory(model, "hf-fp8", "1.0", tiny.text_ids(400), 398)
    finally:
        model.to("cpu")
    assert seen.alive >= 2 * seen.largest
