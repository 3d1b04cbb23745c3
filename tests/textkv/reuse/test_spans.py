"""Spans: keys in a frame of their own, cut from caches and put together to new ones."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.textkv.tiny import TEXT, build, text_ids
from textkv import MethodCache
from textkv.reuse.spans import Span, Spans


@pytest.fixture(scope="module")
def spans() -> Spans:
    return Spans(build("llama"))


def read(model, ids: torch.Tensor, past: int = 0) -> MethodCache:
    cache = MethodCache(model)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    return cache


def test_a_turned_key_is_the_key_at_that_position(spans: Spans) -> None:
    ids, other = text_ids(6), text_ids(9, seed=1)
    # The first layer's keys depend on token and position alone: behind nine others they are those six, nine later.
    alone = spans.cut(read(spans.model, ids), 0, 6)
    behind = read(spans.model, torch.cat([other, ids], 1)).layers[0].stored()
    moved = spans.turned(alone.keys, 9)
    torch.testing.assert_close(moved[:1], behind.keys[:, :, 9:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(spans.turned(moved, -9), alone.keys, atol=1e-5, rtol=1e-5)
    assert spans.turned(alone.keys, 0) is alone.keys


def test_cutting_forgets_where_a_text_stood(spans: Spans) -> None:
    ids, other = text_ids(6), text_ids(9, seed=1)
    alone = spans.cut(read(spans.model, ids), 0, 6)
    behind = spans.cut(read(spans.model, torch.cat([other, ids], 1)), 9, 15)
    torch.testing.assert_close(alone.keys[0], behind.keys[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.values[0], behind.values[0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(alone.keys[2], behind.keys[2], atol=1e-2)


def test_a_prompt_cut_and_put_together_goes_on_as_if_it_was_read(spans: Spans) -> None:
    ids = text_ids(20)
    whole = read(spans.model, ids)
    parts = [spans.cut(whole, a, b) for a, b in ((0, 7), (7, 7), (7, 15), (15, 20))]
    made = spans.cache(spans.placed(parts))
    assert made.tokens_seen == 20 and made.kept_positions(0).tolist() == whole.kept_positions(0).tolist()
    with torch.inference_mode():
        next_ids = text_ids(3, seed=2)
        ours, truth = (spans.model(next_ids, past_key_values=c).logits for c in (made, whole))
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-4)


def test_a_method_may_keep_what_was_put_together(spans: Spans) -> None:
    whole = spans.cut(read(spans.model, text_ids(20)), 0, 20)
    made = spans.cache(whole, "keydiff", "8t")
    assert {int(n) for layer in made.layers for n in layer.lengths().flatten()} == {8}
    with pytest.raises(ValueError, match="looks at the queries of a prompt"):
        spans.cache(whole, "snapkv", "8t")


def test_spans_of_another_model_are_refused(spans: Spans) -> None:
    whole = spans.cut(read(spans.model, text_ids(5)), 0, 5)
    with pytest.raises(ValueError, match="2 layers, 2 KV heads"):
        spans.cache(Span(whole.keys[:2], whole.values[:2]))
    with pytest.raises(ValueError, match="torch.float16"):
        spans.cache(Span(whole.keys.half(), whole.values.half()))


def test_models_whose_texts_cannot_move_are_refused() -> None:
    windows = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8, layer_types=None))
    with pytest.raises(ValueError, match="is of kind sliding"):
        Spans(windows)


def test_a_text_moves_by_one_number_where_tokens_have_three_positions() -> None:
    model = build("qwen2_5_vl")
    spans, ids = Spans(model), torch.arange(3, 9)[None]
    places = [torch.arange(first, first + 6).expand(3, 1, 6) for first in (0, 11)]
    with torch.inference_mode():
        caches = [MethodCache(model, "full") for _ in places]
        for cache, at in zip(caches, places, strict=True):
            model(ids, position_ids=at, past_key_values=cache, logits_to_keep=1)
    alone, moved = (spans.cut(cache, 0, 6, at) for cache, at in zip(caches, (0, 11), strict=True))
    # Attention goes by distances alone, so that all layers are the same but for the turn.
    torch.testing.assert_close(alone.keys, moved.keys, atol=1e-4, rtol=1e-3)
    assert (spans.cut(caches[1], 0, 6, 10).keys - alone.keys).abs().max() > 0.01
