"""What was forgotten on demand is none of the conversation's: budgets, screenshots and the full cache's bytes."""

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache

SPANS = [[(3, 9), (12, 18)]]


def read(model, cache, ids, start, stop):
    cache.begin(ids[:, :stop])
    with torch.no_grad():
        return model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits[0, -1]


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "cake", "h2o", "keydiff", "d2o", "adakv"])
def test_a_budget_is_a_share_of_what_remains(method):
    model, ids = tiny.build("llama"), tiny.text_ids(60)
    cache = MethodCache(model, method, 0.5)
    read(model, cache, ids, 0, 40)
    cache.forget([[(0, 20)]])
    read(model, cache, ids, 40, 60)
    # 40 of 60 tokens remain: at most 20 of them on average, not 30
    assert cache.at_rest.tokens_stored <= 20


def test_the_full_cache_that_is_compared_with_has_forgotten_too():
    model, ids = tiny.build("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "full")
    read(model, cache, ids, 0, 40)
    whole = cache.full_bytes()
    cache.forget([[(5, 15)]])
    assert cache.full_bytes() == whole * 30 // 40
    cache.forget([[(10, 20)]])  # half of it is gone already
    assert cache.full_bytes() == whole * 25 // 40 and cache.context.gone.tolist() == [15]


def test_what_is_taken_back_is_not_forgotten_when_it_comes_again():
    model, ids = tiny.build("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "full")
    cache.begin(ids)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for column in range(5):
            model(ids[:, column : column + 1], past_key_values=cache)
        cache.context.forgotten = torch.zeros(1, 45, dtype=torch.bool)
        cache.context.forgotten[0, 42:] = True
        cache.crop(-4)
    assert cache.context.gone.tolist() == [0]


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "kivi(4,group=16,residual=16)", "snapkv+gear(4)"])
def test_what_came_behind_it_can_still_be_taken_back(method):
    model, ids, other = tiny.build("llama"), tiny.text_ids(40), tiny.text_ids(6, seed=5)
    answers = []
    for detour in (False, True):
        cache = MethodCache(model, method, None if method.startswith(("full", "kivi")) else 0.5)
        read(model, cache, ids, 0, 40)
        with torch.no_grad():
            if detour:
                for token in other[0]:
                    model(token.view(1, 1), past_key_values=cache)
            cache.forget([[(10, 20)]])
            if detour:
                cache.crop(-6)
            answers.append(model(ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


def test_what_lies_in_it_cannot():
    model, ids = tiny.build("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "snapkv", 0.5)
    read(model, cache, ids, 0, 40)
    with torch.no_grad():
        for token in ids[0, :6]:
            model(token.view(1, 1), past_key_values=cache)
    cache.forget([[(42, 43)]])
    cache.fork().crop(-3)
    with pytest.raises(ValueError, match="take back"):
        cache.crop(-4)


def test_a_screenshot_that_is_gone_is_no_screenshot_any_more():
    model, ids = tiny.build("llama"), tiny.text_ids(20)
    cache = MethodCache(model, "full")
    cache.begin(ids, spans=SPANS)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.forget([[(3, 9)]])
    assert cache.spans == [[(12, 18)]]


def test_copies_rows_and_saves_remember_what_was_forgotten(tmp_path):
    model, ids = tiny.build("llama"), tiny.text_ids(20, batch=2)
    cache = MethodCache(model, "snapkv", 0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.forget([[(0, 4)], []])
    cache.save(tmp_path)
    assert MethodCache.load(tmp_path, model).context.gone.tolist() == [4, 0]
    assert cache.fork().context.gone.tolist() == [4, 0]
    cache.batch_select_indices(torch.tensor([1, 0, 0]))
    assert cache.context.gone.tolist() == [0, 4, 4]
    cache.reset()
    assert cache.context.gone is None
