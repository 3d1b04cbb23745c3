"""Packing behind other methods: what is kept is packed, whoever chose it, and what cannot go together says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.textkv import tiny
from textkv import Budget, MethodCache, resolve_method
from textkv.methods.kivi import Kivi
from textkv.methods.snapkv import SnapKV
from textkv.segments.packed import PackedSegment
from textkv.segments.ragged import RaggedSegment
from textkv.segments.split import ChunkedRing, SplitSegment
from textkv.segments.stack import StackSegment

SMALL = "group=16,residual=16"


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def packed_and_exact(cache) -> tuple[int, int]:
    """Tokens of the first layer's first head in packed segments and beside them."""
    split = [0, 0]
    for segment in cache.layers[0].segments:
        split[not isinstance(segment, PackedSegment)] += int(segment.lengths()[0, 0])
    return tuple(split)


def test_behind_a_scorer_packs_what_is_kept(model_of):
    model = model_of("llama")
    alone, both = MethodCache(model, "snapkv", 0.5), MethodCache(model, f"snapkv+kivi(8,{SMALL})", 0.5)
    for cache in (alone, both):
        feed(model, cache, tiny.text_ids(100, 2))
    assert packed_and_exact(both) == (48, 2)
    assert torch.equal(alone.kept_positions(0), both.kept_positions(0))
    step = tiny.text_ids(1, 2, seed=9)
    torch.testing.assert_close(feed(model, both, step), feed(model, alone, step), rtol=0, atol=0.05)
    assert both.kv_bytes() < 0.7 * alone.kv_bytes()


def test_heads_of_different_length_need_nothing_special(model_of):
    model = model_of("llama")
    alone, both = MethodCache(model, "adakv", 0.5), MethodCache(model, f"adakv+kivi(8,{SMALL})", 0.5)
    for cache in (alone, both):
        feed(model, cache, tiny.text_ids(150, 2))
    lengths = both.layers[0].lengths()
    packed, buffer = both.layers[0].segments
    assert isinstance(buffer, RaggedSegment) and torch.equal(lengths, alone.layers[0].lengths())
    assert torch.equal(packed.lengths(), lengths // 16 * 16) and len(set(lengths.flatten().tolist())) > 1
    for i in range(20):
        step = tiny.text_ids(1, 2, seed=i)
        torch.testing.assert_close(feed(model, both, step), feed(model, alone, step), rtol=0, atol=0.05)
    assert torch.equal(both.layers[0].segments[0].lengths(), (lengths + 20) // 16 * 16)


def test_what_a_scorer_marked_down_does_not_stay(model_of):
    model = model_of("llama")
    for n in (40, 100):  # nothing to pack, and something
        cache = MethodCache(model, "h2o+kivi(4)", 0.9)
        feed(model, cache, tiny.text_ids(n))
        assert not any(layer.statistics for layer in cache.layers)
        lengths = cache.layers[0].lengths()
        feed(model, cache, tiny.text_ids(1))  # nor does it evict while decoding
        assert torch.equal(cache.layers[0].lengths(), lengths + 1)


def test_a_method_that_cuts_other_layers_later_is_packed_last(model_of):
    model = model_of("llama")
    alone, both = MethodCache(model, "cake(decode='none')", 0.5), MethodCache(model, f"cake+kivi(8,{SMALL})", 0.5)
    for cache in (alone, both):
        feed(model, cache, tiny.text_ids(150))
        feed(model, cache, tiny.text_ids(1, seed=1))
    for i, layer in enumerate(both.layers):
        assert isinstance(layer.segments[0], PackedSegment) and not layer.statistics
        assert torch.equal(both.kept_positions(i).sort().values, alone.kept_positions(i).sort().values)


def test_a_later_eviction_starts_from_what_the_codes_stand_for(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"snapkv+kivi(4,{SMALL})", "40t")
    feed(model, cache, tiny.text_ids(100))
    feed(model, cache, tiny.text_ids(60, seed=1))
    # What stays of the first prompt stays as codes, in blocks with holes; only what came since is packed anew.
    packed, exact = packed_and_exact(cache)
    assert packed + exact == 40 and exact < 16
    assert cache.kept_positions(0).max() == 159


@dataclass(frozen=True)
class PerQueryHead(SnapKV):
    """Stores one copy per query head, as the official GUI-KV does."""

    def on_prefill_end(self, layer, evidence):
        if layer.lengths().shape[1] == layer.kv_heads:
            layer.repeat_heads(evidence.queries.shape[1] // layer.kv_heads)
        super().on_prefill_end(layer, evidence)


def test_repeated_heads_stay_repeated_through_packing_and_a_later_eviction(model_of):
    model = model_of("llama")
    budget = Budget.parse("40t")
    cache = MethodCache(model, Kivi(4, group=16, residual=16, inner=PerQueryHead(budget=budget), budget=budget))
    for n in (80, 1, 40, 1):
        assert bool(feed(model, cache, tiny.text_ids(n, seed=n)).isfinite().all())
    assert cache.layers[0].lengths().tolist() == [[41] * 4]


def packed_tokens(cache) -> set[int]:
    """How many tokens the retrieval heads of a split cache hold in codes; no other part may be packed."""
    found = set()
    for layer in cache.layers:
        assert isinstance(layer.segments[0], SplitSegment)
        for part in layer.segments[0].parts:
            assert isinstance(part.segment, StackSegment | ChunkedRing)
            if isinstance(part.segment, StackSegment):
                found |= set(part.segment.segments[0].lengths().flatten().tolist())
    return found


def test_retrieval_heads_are_packed_and_streaming_heads_are_not(model_of):
    model = model_of("llama")
    method = "duo_attention(sparsity=0.5,sinks=4,recent=12)"
    alone, both = MethodCache(model, method), MethodCache(model, f"{method}+kivi(8,{SMALL})")
    for cache in (alone, both):
        feed(model, cache, tiny.text_ids(80, 2))
    assert packed_tokens(both) == {80}
    for i in range(20):
        step = tiny.text_ids(1, 2, seed=i)
        torch.testing.assert_close(feed(model, both, step), feed(model, alone, step), rtol=0, atol=0.05)
    assert packed_tokens(both) == {96}
    assert both.kv_bytes() < 0.8 * alone.kv_bytes()
    feed(model, both, tiny.text_ids(30, 2, seed=3))  # a later turn leaves the heads as they are divided


def test_what_a_pair_promises():
    alone = resolve_method("kivi(4)")
    assert alone.capabilities.lossy and alone.capabilities.crop and not alone.evicts
    behind = resolve_method("adakv+kivi(2)")
    assert behind.capabilities.per_head and behind.capabilities.lossy and not behind.capabilities.scores
    assert behind.evicts and behind.expression == "snapkv+adakv+kivi(bits=2)"
    cut = resolve_method("h2o+kivi(2)").capabilities
    assert cut.crop and not cut.decode_eviction
    heads = resolve_method("duo_attention+kivi(2)").capabilities
    assert heads.decode_eviction and not heads.crop
    assert not resolve_method("full+kivi(4)").evicts
