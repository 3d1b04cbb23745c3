"""Methods whose layers keep different numbers of tokens: PyramidKV's line and VL-Cache's shares."""

from types import SimpleNamespace

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.test_eviction import case
from textkv import Budget, MethodCache
from textkv.methods.pyramidkv import PyramidKV, PyramidKVOfficial
from textkv.methods.vl_cache import VLCache, VLCacheOfficial


def kept(model, method, budget, ids, spans=None):
    cache = MethodCache(model, method, budget)
    cache.begin(ids, spans=spans)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache, [cache.kept_positions(i) for i in range(len(cache.layers))]


def prompt(n=64):
    return torch.randint(1, 100, (1, n), generator=torch.Generator().manual_seed(1))


def test_the_line_spends_exactly_the_budget():
    assert PyramidKV(window=8).line(32, 8, 200, 5) == [55, 44, 32, 20, 9]
    assert PyramidKV(window=8).line(32, 8, 40, 5) == [40, 36, 32, 28, 24]
    for layers in range(2, 30):
        for keep in (12, 33, 100, 511):
            line = PyramidKV(window=8).line(keep, 8, 1000, layers)
            assert sum(line) == keep * layers and line == sorted(line, reverse=True) and min(line) > 8


def test_the_official_line_overspends_and_starts_late():
    line = PyramidKVOfficial(window=8).line(32, 8, 200, 5)
    assert line == [55, 44, 33, 22, 11] and sum(line) == 165 > 5 * 32
    assert PyramidKVOfficial(window=8).line(32, 8, 40, 5) == [32] * 5


def test_a_flat_pyramid_is_snapkv(model_of):
    model, ids = model_of("llama"), prompt()
    flat = kept(model, "pyramidkv(window=8,beta=1)", 0.4, ids)[1]
    snap = kept(model, "snapkv(window=8)", 0.4, ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(flat, snap, strict=True))


def test_early_layers_keep_more(model_of):
    cache, positions = kept(model_of("llama"), "pyramidkv(window=8)", 0.4, prompt())
    sizes = [p.shape[-1] for p in positions]
    assert sizes[0] > sizes[1] > sizes[2] and sum(sizes) == 3 * 25
    assert all((p[..., -8:] == torch.arange(56, 64)).all() for p in positions)
    assert cache.report().kv_bytes < 0.6 * cache.report().full_bytes


def test_shares_are_proportional_capped_and_complete():
    method = VLCache(budget=Budget(fraction=0.5))
    assert method.shares(torch.tensor([0.1, 0.1, 0.2]), 100) == [38, 37, 75]
    assert method.shares(torch.tensor([0.01, 0.01, 0.9]), 100) == [25, 25, 100]
    # A layer whose share is below one token still gets it, and the sum holds.
    assert sum(method.shares(torch.tensor([0.17, 0.86, 0.005, 0.2, 0.35, 0.72, 0.63]), 91)) == 7 * 45
    assert method.shares(torch.tensor([0.0, 0.0]), 10) == [5, 5]


def test_density_counts_against_the_row_or_absolutely():
    """Zero keys spread each row evenly: nothing is small beside the largest, everything is below one per cent."""
    held, evidence = case(torch.zeros(1, 2, 300, 4), torch.randn(1, 4, 3, 4))
    layer = SimpleNamespace(stored=lambda: held)
    assert VLCache()._density(layer, evidence, 0) == 1.0
    assert VLCacheOfficial()._density(layer, evidence, 0) == 0.0
    held.keys[:, :, 7, 0] = 50.0
    evidence.queries[..., 0] = 5.0
    assert VLCache()._density(layer, evidence, 0) == pytest.approx(1 / 299, rel=0.01)


def test_even_layers_make_it_snapkv_with_the_text_behind_the_image(model_of, monkeypatch):
    monkeypatch.setattr(VLCache, "_density", lambda *args: 0.5)
    model, ids = model_of("llama"), prompt()
    ours = kept(model, "vl-cache", 0.5, ids, spans=[[(5, 30), (33, 54)]])[1]
    snap = kept(model, "snapkv(window=10,kernel=1)", 0.5, ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours, snap, strict=True))
    without = kept(model, "vl-cache(text_window=6)", 0.5, ids)[1]
    snap = kept(model, "snapkv(window=6,kernel=1)", 0.5, ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(without, snap, strict=True))


def test_all_layers_are_cut_together_and_the_sum_is_the_budget(model_of):
    model, ids = model_of("llama"), prompt()
    cache, positions = kept(model, "vl-cache(threshold=0.2)", 0.4, ids, spans=[[(5, 50)]])
    sizes = [p.shape[-1] for p in positions]
    assert sum(sizes) == 3 * 25 and len(set(sizes)) > 1
    assert all((p[..., -1] == 63).all() for p in positions)
    assert all(not layer.notes for layer in cache.layers)
    assert cache.peak_bytes >= cache.report().full_bytes


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_rows_with_their_own_spans_equal_single_runs(model_of, family):
    model = model_of(family)
    ids, short = prompt(60), 44
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, : 60 - short] = 0
    both = torch.cat([ids, torch.cat([torch.zeros(1, 60 - short, dtype=torch.long), ids[:, :short]], 1)])
    cache = MethodCache(model, "vl-cache", 0.5)
    cache.begin(both, spans=[[(4, 40)], [(60 - short + 4, 60 - short + 30)]], attention_mask=mask)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(both, past_key_values=cache, attention_mask=mask, position_ids=places)
    for row, (n, span) in enumerate(((60, (4, 40)), (short, (4, 30)))):
        alone = kept(model, "vl-cache", 0.5, ids[:, :n], spans=[[span]])[1]
        for layer, positions in enumerate(alone):
            mine = cache.kept_positions(layer)[row]
            assert [sorted(set(head.tolist()) - {-1}) for head in mine] == [sorted(h.tolist()) for h in positions[0]]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="beta=0: 1 keeps the same"):
        PyramidKV(beta=0)
    with pytest.raises(ValueError, match="kernel=2: pooling needs an odd width"):
        VLCache(kernel=2)
    with pytest.raises(ValueError, match="both are shares below 1"):
        VLCache(threshold=1.5)
