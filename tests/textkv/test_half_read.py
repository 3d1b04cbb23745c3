"""Between the chunks of a prompt that was announced: what is known so far goes with its tokens and rows."""

from __future__ import annotations

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import kinds
from textkv import MethodCache
from textkv.evidence import Needs
from textkv.reading import NAME, Recorder

JUDGING = ["h2o", "snapkv", "expected", "tri_attention", "pyramidkv", "vatp", "kvcrush", "d2o", "cake", "mikv"]


@pytest.mark.parametrize("second", [3, 20])
@pytest.mark.parametrize("spans", [[[(5, 20)], [(5, 20)]], [[(0, 9), (30, 40)], [(12, 31)]]])
def test_votes_of_tokens_that_stay_when_others_are_forgotten(spans, second):
    model, ids = kinds.model_of_kind("dense"), kinds.ids(40 + second, 2)
    whole, parts = (MethodCache(model, Recorder(asked=Needs(columns=True))) for _ in range(2))
    whole.begin(ids)
    for cache in (whole, parts):
        kinds.logits(model, ids[:, :40], cache)
    before = [layer.notes[NAME].columns for layer in parts.context.layers]
    for cache in (whole, parts):
        cache.forget(spans)
        kinds.logits(model, ids[:, 40:], cache)
    for layer, other, first in zip(whole.context.layers, parts.context.layers, before, strict=True):
        at, second_votes = layer.held_positions().long(), other.notes[NAME].columns
        known = torch.cat([first, torch.zeros_like(second_votes)], 2).gather(2, at.clamp(min=0))
        expected = (known + second_votes).masked_fill(at < 0, 0)
        assert not mismatch(layer.notes[NAME].columns, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", JUDGING)
def test_rows_that_are_taken_between_two_chunks(method):
    model, ids, rows = kinds.model_of_kind("dense"), kinds.ids(60, 3), torch.tensor([2, 0])
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[2, :9] = 0
    moved, fresh = (MethodCache(model, method, 0.4) for _ in range(2))
    for cache, of in ((moved, slice(None)), (fresh, rows)):
        cache.begin(ids[of])
        kinds.logits(model, ids[of, :40], cache, mask[of, :40])
    moved.batch_select_indices(rows)
    for cache in (moved, fresh):
        kinds.logits(model, ids[rows, 40:], cache, mask[rows])
    new = kinds.ids(3, 2, seed=1)
    ours, expected = kinds.steps(model, new, moved, mask[rows]), kinds.steps(model, new, fresh, mask[rows])
    assert not mismatch(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["forgotten", "frozen"])
def test_a_stream_knows_where_its_tokens_stand(way):
    """The tokens of the first block are fewer, or more, than those that its end finds."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(60, 2)
    cache = MethodCache(model, "streaming_llm", 0.4)
    if way == "forgotten":
        cache.begin(ids)
    cache.freeze(way == "frozen")
    kinds.logits(model, ids[:, :40], cache)
    cache.freeze(False)
    if way == "forgotten":
        cache.forget([[(5, 20), (30, 33)], [(0, 9)]])
    kinds.logits(model, ids[:, 40:], cache)
    for layer in cache.context.layers:
        (ring,) = layer.segments
        at = ring.positions
        assert bool((at >= 0).any()) and torch.equal(ring.rope[at >= 0], at[at >= 0])
