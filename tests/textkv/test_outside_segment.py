"""A segment and a method that a stranger wrote work with all that a cache can do."""

from __future__ import annotations

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import kinds, outside_segment  # noqa: F401  (registers host_topk)
from textkv import MethodCache
from textkv.conformance import check_method
from textkv.method import REGISTRY
from textkv.segments.base import SEGMENTS

ALL = "host_topk(k=500)"
FEW = "host_topk(k=6)"


@pytest.fixture(autouse=True)
def registered_here():
    """Other tests list the registries: what is no part of ours is taken out again."""
    from tests.textkv.outside_segment import HostSegment, HostTopK

    REGISTRY["host_topk"], SEGMENTS["host_topk"] = HostTopK, HostSegment
    yield
    del REGISTRY["host_topk"], SEGMENTS["host_topk"]


def talk(model, cache, batch: int = 1):
    parts = kinds.ids(60, batch).split((44, 1, 1, 13, 1), 1)
    return torch.cat([kinds.logits(model, part, cache) for part in parts], 1)


def filled(model, method: str = FEW, batch: int = 1):
    cache = MethodCache(model, method)
    kinds.logits(model, kinds.ids(44, batch), cache)
    kinds.steps(model, kinds.ids(3, batch, seed=1), cache)
    return cache


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize("batch", [1, 2])
def test_with_enough_it_equals_full_attention(kind, batch):
    model = kinds.model_of_kind(kind)
    expected = talk(model, MethodCache(model, "full"), batch)
    assert not mismatch(talk(model, MethodCache(model, ALL), batch), expected, atol=2e-4, rtol=0)
    few = talk(model, MethodCache(model, FEW), batch)
    assert float((few - expected).abs().max()) > 1e-3, "six tokens give what all do: the choice is never made"


def test_it_conforms():
    assert all(check.outcome in ("passed", "not applicable") for check in check_method(ALL, 1.0))


def test_bytes_apart():
    model = kinds.model_of_kind("dense")
    cache = filled(model)
    values = 3 * 2 * 44 * 16 * 4
    assert cache.host_bytes() == values
    device = sum(x.nbytes for layer in cache.layers for n, x in layer.tensors().items() if not n.endswith(".values"))
    assert cache.kv_bytes() == device
    report = cache.report()
    assert report.kv_bytes == cache.kv_bytes() and "host_topk" in str(report)
    assert all(row["seen"] == 47 for row in report.rows)


def test_save_and_load(tmp_path):
    model = kinds.model_of_kind("dense")
    cache = filled(model)
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    assert (loaded.host_bytes(), loaded.kv_bytes()) == (cache.host_bytes(), cache.kv_bytes())
    more = kinds.ids(4, seed=2)
    assert torch.equal(kinds.steps(model, more, loaded), kinds.steps(model, more, cache))
    del SEGMENTS["host_topk"]  # where the segment is not known, that is said
    with pytest.raises(ValueError, match="host_topk"):
        MethodCache.load(tmp_path, model)
    SEGMENTS["host_topk"] = outside_segment.HostSegment


def test_fork_and_rows():
    model = kinds.model_of_kind("dense")
    cache = filled(model, batch=2)
    other, order, more = cache.fork(), torch.tensor([1, 0]), kinds.ids(4, 2, seed=2)
    other.reorder_cache(order)
    expected = kinds.steps(model, more, cache)
    assert not mismatch(kinds.steps(model, more[order], other)[order], expected, atol=1e-5, rtol=0)


def test_crop():
    model = kinds.model_of_kind("dense")
    cache = filled(model)
    again, more = cache.fork(), kinds.ids(4, seed=2)
    kinds.steps(model, more, cache)
    cache.crop(-4)
    assert not mismatch(kinds.steps(model, more, cache), kinds.steps(model, more, again), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="can take back only"):
        cache.crop(-20)


@pytest.mark.parametrize("method", [ALL, FEW])
def test_forget(method):
    model = kinds.model_of_kind("dense")
    cache, plain, spans = filled(model, method, 2), filled(model, "full", 2), [[(3, 17), (44, 46)], [(20, 40)]]
    before = cache.kv_bytes(), cache.host_bytes()
    for held in (cache, plain):
        held.forget(spans)
    assert cache.kv_bytes() <= before[0] and cache.host_bytes() < before[1]
    out, expected = (kinds.steps(model, kinds.ids(3, 2, seed=4), held) for held in (cache, plain))
    assert bool(out.isfinite().all())
    if method == ALL:
        assert not mismatch(out, expected, atol=2e-4, rtol=0)


def test_a_hidden_passage():
    model, mask = kinds.model_of_kind("dense"), torch.ones(1, 48, dtype=torch.int64)
    mask[0, 5:40] = 0
    both = [kinds.logits(model, kinds.ids(1, seed=3), filled(model, m), mask) for m in (ALL, "full")]
    assert not mismatch(*both, atol=2e-4, rtol=0)


def test_forgetting_right_after_the_prompt():
    """The segment for new tokens is still empty, and does not even know the shape of one."""
    model = kinds.model_of_kind("dense")
    both = []
    for method in (ALL, "full"):
        cache = MethodCache(model, method)
        kinds.logits(model, kinds.ids(44), cache)
        cache.forget([[(5, 20)]])
        both.append(kinds.steps(model, kinds.ids(3, seed=1), cache))
    assert not mismatch(*both, atol=2e-4, rtol=0)
