"""Block prefill: what is held is bounded at every moment, and equal to one-shot eviction where that is the same."""

from __future__ import annotations

import pytest
import torch

from tests.textkv.kinds import model_of_kind
from tests.textkv.tiny import build, text_ids
from textkv import MethodCache
from textkv.reuse.epicache.blocks import BlockPrefill, probe_scores
from textkv.reuse.epicache.budgets import layer_entries, sensitivities
from textkv.segments.base import Stored
from textkv.softmax import Softmax

TOKENS, PROBE = 60, text_ids(5, seed=3)[0].tolist()
IDS = text_ids(TOKENS)[0].tolist()
LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module")
def model():
    return build("llama")


def read(model, entries, block: int, ids=IDS, **how) -> MethodCache:
    blocks = BlockPrefill(model, entries, block, **how)
    cache = blocks.open(PROBE)
    blocks.read(cache, ids, PROBE)
    return cache


def full(model, ids) -> MethodCache:
    cache = MethodCache(model)
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=cache)
    return cache


def next_logits(model, cache: MethodCache) -> torch.Tensor:
    with torch.inference_mode():
        return model(text_ids(3, seed=5), past_key_values=cache).logits


# ---- exact settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 16, 64])
def test_a_budget_of_all_tokens_is_the_full_prefill(model, block) -> None:
    cache, truth = read(model, [TOKENS] * LAYERS, block), full(model, IDS)
    for ours, theirs in zip(cache.layers, truth.layers, strict=True):
        torch.testing.assert_close(ours.stored().keys, theirs.stored().keys, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, truth), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", ["pair", "uniform"])
def test_one_block_is_one_shot_eviction_by_the_same_probe(model, level) -> None:
    entries = 20
    cache = read(model, [entries] * LAYERS, TOKENS, level=level)
    truth = full(model, [*IDS, *PROBE])
    with torch.inference_mode():
        from textkv.attention import CAPTURE

        seen: dict = {}
        model.model(torch.tensor([[*IDS, *PROBE]]), use_cache=False, **{CAPTURE: seen.__setitem__})
    for number, layer in enumerate(cache.layers):
        keys, queries = truth.layers[number].stored().keys[:, :, :TOKENS], seen[number][1][:, :, -len(PROBE) :]
        at = torch.arange(TOKENS).expand(1, HEADS, -1)
        scores = probe_scores(queries, Stored(keys, keys, at), Softmax(queries.shape[-1] ** -0.5))[0]
        scores[:, :4] = torch.inf
        if level == "uniform":
            wanted = [sorted(row.topk(entries).indices.tolist()) for row in scores]
        else:
            best = scores.flatten().topk(entries * HEADS).indices
            wanted = [sorted((best[best // TOKENS == h] % TOKENS).tolist()) for h in range(HEADS)]
        kept = [[p for p in row if p >= 0] for row in layer.held_positions()[0].tolist()]
        assert kept == wanted


def test_scores_are_the_most_attention_that_any_query_of_a_group_pays() -> None:
    queries, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 6, 8)
    at = torch.arange(6).expand(1, 2, -1).clone()
    at[0, 1, 5] = -1
    scores = probe_scores(queries, Stored(keys, keys, at), Softmax(0.5))
    first = (queries[0, :2] @ keys[0, 0].T * 0.5).softmax(-1).amax((0, 1))
    second = (queries[0, 2:] @ keys[0, 1, :5].T * 0.5).softmax(-1).amax((0, 1))
    torch.testing.assert_close(scores[0, 0], first)
    torch.testing.assert_close(scores[0, 1, :5], second)
    assert scores[0, 1, 5] == float("-inf")


# ---- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["pair", "uniform"])
def test_no_layer_ever_holds_more_than_budget_block_and_probe(model, level) -> None:
    entries, block = [10, 14, 18], 8
    peaks = []
    for tokens in (60, 240):
        cache = read(model, entries, block, text_ids(tokens)[0].tolist(), level=level)
        assert [int(layer.lengths().sum()) for layer in cache.layers] == [n * HEADS for n in entries]
        assert cache.tokens_seen == tokens
        peaks.append(cache.peak_bytes)
    # Keys and values in fp32, a position and the tables of ragged heads; buffers may idle by an eighth or 8 tokens.
    token = 2 * HEADS * 16 * 4 + HEADS * 4
    assert max(peaks) <= token * sum(n + block + len(PROBE) + 8 for n in entries) + LAYERS * HEADS * 12
    assert peaks[1] <= peaks[0] * 1.05


def test_the_probe_leaves_no_trace_and_positions_go_on(model) -> None:
    cache = read(model, [20] * LAYERS, 16)
    assert cache.tokens_seen == TOKENS
    for layer in cache.layers:
        at = layer.held_positions()
        assert int(at.max()) < TOKENS and bool((at[..., :4] == torch.arange(4)).all())
    # The next token lies behind all that was read: the keys that stayed are those of the full cache.
    truth = full(model, IDS)
    first, real = cache.layers[0].stored(), truth.layers[0].stored()
    index = first.positions.long().clamp(min=0)[..., None].expand(-1, -1, -1, 16)
    hole = (first.positions < 0)[..., None]
    torch.testing.assert_close(
        first.keys.masked_fill(hole, 0), real.keys.gather(2, index).masked_fill(hole, 0), atol=1e-5, rtol=1e-5
    )
    before = next_logits(model, cache)
    cache.crop(-3)
    torch.testing.assert_close(next_logits(model, cache), before)


@pytest.mark.parametrize(("kind", "name"), [("sliding", "sliding"), ("hybrid", "state"), ("sinks", "sliding")])
def test_a_model_that_cannot_take_a_probe_back_is_refused_when_built(kind, name) -> None:
    with pytest.raises(ValueError, match=f"layer 0 is of kind {name} and cannot take the probe back"):
        BlockPrefill(model_of_kind(kind), [20], 16)


def test_what_cannot_be_read_is_refused(model) -> None:
    for match, entries, block, how in (
        ("block=0", [20] * 3, 0, {}),
        ("4 tokens and 4 are protected", [20, 4, 20], 8, {}),
        ("entries for 2 layers", [20] * 2, 8, {}),
        ("level='heads'", [20] * 3, 8, {"level": "heads"}),
    ):
        with pytest.raises(ValueError, match=match):
            BlockPrefill(model, entries, block, **how)
    blocks = BlockPrefill(model, [20] * 3, 8)
    for probe in ([], list(range(9))):
        with pytest.raises(ValueError, match=f"a probe of {len(probe)} tokens"):
            blocks.open(probe)


# ---- budgets of layers ---------------------------------------------------------------------------------------------


def test_layers_share_exactly_what_there_is() -> None:
    given = [0.0, 0.1, 0.4, 0.2, 0.30001]
    for alpha in (0, 1, 1.3, 4):
        for floor in (0, 0.25, 1):
            made = layer_entries(given, 101, alpha, floor)
            assert sum(made) == 505 and min(made) >= int(floor * 101)
            order = sorted(range(5), key=given.__getitem__)
            assert [made[i] for i in order] == sorted(made)
    assert layer_entries(given, 101, alpha=0) == [101] * 5
    assert layer_entries([0.2] * 3, 7) == layer_entries([0.0] * 3, 7) == [7] * 3
    assert layer_entries([1, 3], 8, alpha=1, floor=0) == [4, 12]  # Eq. 10 itself


def test_impossible_budgets_of_layers_are_refused() -> None:
    for given, how in (([], {}), ([-1.0], {}), ([float("nan")], {})):
        with pytest.raises(ValueError, match="sensitivity="):
            layer_entries(given, 8, **how)
    with pytest.raises(ValueError, match="floor=2"):
        layer_entries([1.0], 8, floor=2)


def test_sensitivity_is_how_far_keys_move_when_blocks_forget(model) -> None:
    found = sensitivities(model, IDS, block=16, sinks=4)
    # The first layer's keys see no context at all.
    assert len(found) == LAYERS and found[0] < 1e-5 < min(found[1:])
    # Nothing is forgotten where a block keeps all of the one before, and there are two.
    assert max(sensitivities(model, IDS[:32], block=16, sinks=0, overlap=1.0)) < 1e-5
    with pytest.raises(ValueError, match="has 60 tokens, a block 64"):
        sensitivities(model, IDS, block=64)


def test_what_sensitivity_forgets_is_all_but_sinks_and_the_end_of_the_block_before(model) -> None:
    block, sinks = 16, 4
    found = sensitivities(model, IDS[:48], block=block, sinks=sinks)
    columns = torch.arange(48)
    start = columns // block * block
    seen = columns <= columns[:, None]
    seen &= (columns < sinks) | (columns >= start[:, None] - block // 2)
    with torch.inference_mode():
        from transformers import DynamicCache

        masked, plain = DynamicCache(), DynamicCache()
        # Added to the scores: every implementation of attention reads such a mask alike.
        added = torch.zeros(1, 1, 48, 48).masked_fill(~seen, torch.finfo(torch.float32).min)
        model(torch.tensor([IDS[:48]]), attention_mask=added, past_key_values=masked)
        model(torch.tensor([IDS[:48]]), past_key_values=plain)
    for number in range(LAYERS):
        a, b = (c.layers[number].keys[:, :, block:] for c in (masked, plain))
        apart = 1 - float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())
        assert found[number] == pytest.approx(apart, abs=1e-4)
