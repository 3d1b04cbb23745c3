"""Numbers per stored token move, grow and go with their tokens; column sums are gathered over a prompt's chunks."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.compare import mismatch
from textkv import Capabilities, Method, MethodCache, Needs, use
from textkv.evidence import Evidence
from textkv.layer import Layer


@dataclass(frozen=True)
class WithStatistics(Method):
    """Gives every prompt token its position and column sum, and keeps what the test says."""

    name: ClassVar = "with-statistics"
    capabilities: ClassVar = Capabilities()
    ragged: bool = False

    def needs(self) -> Needs:
        return Needs(columns=True)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        layer.statistics["position"] = layer.stored().positions.float()
        layer.statistics["columns"] = evidence.columns
        if self.ragged:
            keep = torch.zeros(layer.stored().positions.shape, dtype=torch.bool)
            keep[:, 0, ::3], keep[:, 1, 1::2] = True, True
            layer.keep_mask(keep)
        else:
            layer.keep(torch.arange(1, 40, 3)[None, None])


@pytest.fixture
def filled(model_of):
    def fill(ragged: bool, chunks: tuple[int, ...] = (40,)) -> tuple[MethodCache, torch.Tensor]:
        model, ids = model_of("llama"), torch.arange(44)[None] % 60 + 2
        cache = MethodCache(model, WithStatistics(ragged=ragged))
        cache.begin(tokens=40)
        with torch.no_grad():
            for chunk in ids[:, :40].split(chunks, 1):
                model(chunk, past_key_values=cache)
            for token in range(40, 44):
                model(ids[:, token : token + 1], past_key_values=cache)
        return cache, ids

    return fill


@pytest.mark.parametrize("ragged", [False, True])
def test_statistics_stay_beside_their_tokens(filled, ragged):
    cache, _ = filled(ragged)
    for layer in cache.layers:
        positions, numbers = layer.stored().positions, layer.statistic("position")
        old = (positions >= 0) & (positions < 40)
        assert bool((numbers[old] == positions[old]).all())
        assert bool((numbers[~old] == 0).all())


@pytest.mark.parametrize("ragged", [False, True])
def test_statistics_follow_rows_crops_and_saving(filled, ragged, tmp_path, model_of):
    cache, _ = filled(ragged)
    before = cache.layers[1].statistic("position")
    cache.save(tmp_path)
    loaded = MethodCache(model_of("llama"), WithStatistics(ragged=ragged))
    assert "1.statistic.position" in __import__("safetensors.torch").torch.load_file(tmp_path / "cache.safetensors")
    assert loaded.layers[1].statistics == {}
    cache.crop(-2)
    assert cache.layers[1].statistic("position").shape == cache.layers[1].stored().positions.shape
    cache.reorder_cache(torch.tensor([0, 0]))
    assert torch.equal(
        cache.layers[1].statistic("position")[1], before[0, :, : cache.layers[1].statistic("position").shape[-1]]
    )
    cache.reset()
    assert cache.layers[1].statistics == {}


def test_statistics_count_as_bytes(filled):
    cache, _ = filled(False)
    layer = cache.layers[0]
    held = layer.kv_bytes()
    layer.statistics.clear()
    assert held - layer.kv_bytes() == 2 * 2 * 13 * 4


def test_columns_are_the_same_in_chunks(filled):
    whole, chunked = filled(False)[0], filled(False, (7, 1, 32))[0]
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        assert not mismatch(a.statistic("columns"), b.statistic("columns"))


def test_columns_sum_to_the_number_of_queries(model_of):
    @dataclass(frozen=True)
    class Keeping(WithStatistics):
        def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
            layer.statistics["columns"] = evidence.columns

    model = model_of("llama")
    ids = torch.arange(60).view(2, 30) % 50 + 2
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = MethodCache(model, Keeping())
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    sums = cache.layers[0].statistics["columns"].sum(-1)
    assert not mismatch(sums, torch.tensor([[30.0] * 2, [23.0] * 2]))


def test_columns_of_ragged_heads_count_every_query(filled, model_of):
    cache, ids = filled(True)
    before = cache.layers[0].lengths().clone()
    assert before[0, 0] != before[0, 1]
    seen = {}

    @dataclass(frozen=True)
    class Looking(WithStatistics):
        def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
            seen[layer.index] = evidence.columns

    cache.context.method = Looking()
    with torch.no_grad():
        use(model_of("llama"))(ids[:, :6], past_key_values=cache)
    assert not mismatch(seen[0].sum(-1), torch.full((1, 2), 6.0))
    assert bool((seen[0][0, 0, int(before[0, 0]) + 6 :] == 0).all())
