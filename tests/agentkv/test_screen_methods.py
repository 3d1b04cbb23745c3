"""STaR-KV and ST-Lite inside whole models: conformance, exactness, rows, steps, saving, and what is refused."""

from __future__ import annotations

import pytest
import torch

import agentkv  # noqa: F401  (registers the methods)
from agentkv.agent import Agent
from agentkv.models import load_adapter
from agentkv.persistent import PersistentAgent
from agentkv.st_lite import PLACE
from agentkv.star_kv import STEPS
from tests.agentkv.test_persistent import steps
from tests.textkv import tiny
from tests.textkv.conftest import model_of  # noqa: F401
from textkv import MethodCache
from textkv.conformance import CHECKS, check_method

GREEDY = dict(do_sample=False, max_new_tokens=4)
METHODS = ("star-kv", "star-kv-official", "st-lite", "st-lite-official")
COPIES = "st-lite-official(heads='per_query_head')"


def read(model, inputs, method, budget, spans, grids):
    cache = MethodCache(model, method, budget)
    cache.begin(**inputs, spans=spans, grids=grids)
    return model.generate(**inputs, past_key_values=cache, **GREEDY), cache


def screens(frames: int, **options):
    grid = options.setdefault("grid", (4, 6))
    inputs, spans = tiny.screens(frames, **options)
    return inputs, spans, [[(grid[0] // 2, grid[1] // 2)] * frames]


@pytest.mark.parametrize("method", [*METHODS, COPIES, "star-kv+adakv", "st-lite+adakv"])
def test_conforms_like_every_method(method):
    results = check_method(method, 0.4)
    assert [r.name for r in results if r.outcome == "passed"] == list(CHECKS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frames", [0, 1, 3])
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_full_budget_equals_the_full_cache_and_counts_the_step(model_of, family, frames, method):  # noqa: F811
    model, (inputs, spans, grids) = model_of(family), screens(frames)
    out, cache = read(model, inputs, method, 1.0, spans, grids)
    assert torch.equal(out, model.generate(**inputs, **GREEDY))
    counted = [float(layer.trajectory[STEPS]) for layer in cache.context.layers if STEPS in layer.trajectory]
    assert counted == ([1.0] * 3 if method == "star-kv" and frames else [])


def test_heads_of_a_layer_share_star_kvs_choice_and_st_lites_gate(model_of):  # noqa: F811
    model, (inputs, spans, grids) = model_of("qwen2_5_vl"), screens(4, text=9, grid=(6, 8))
    n = inputs["input_ids"].shape[1]
    for kept in read(model, inputs, "star-kv", 0.4, spans, grids)[1].at_rest.kept:
        assert kept.shape[2] == int(0.4 * n) and torch.equal(kept[:, :1].expand_as(kept), kept)
        assert kept[0, 0, -8:].tolist() == list(range(n - 8, n))
    for kept in read(model, inputs, "st-lite", 0.4, spans, grids)[1].at_rest.kept:
        old = {x for head in kept[0].tolist() for x in head if any(s <= x < e for s, e in spans[0][:-1])}
        assert len(old) <= -(-int(0.4 * n) * 36 // n)


@pytest.mark.parametrize("method", [*METHODS, "star-kv+adakv", "st-lite+adakv"])
def test_rows_padded_on_the_left_equal_single_rows(model_of, method):  # noqa: F811
    model = model_of("qwen2_5_vl")
    parts = [screens(2, seed=1, text=9), screens(2, seed=2, text=4, grid=(6, 4))]
    width = max(p[0]["input_ids"].shape[1] for p in parts)
    ids, mask, spans = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64), []
    for row, (inputs, own, _) in enumerate(parts):
        pad = width - inputs["input_ids"].shape[1]
        ids[row, pad:], mask[row, pad:] = inputs["input_ids"][0], 1
        spans.append([(s + pad, e + pad) for s, e in own[0]])
    both = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == tiny.IMAGE).long()}
    both |= {name: torch.cat([p[0][name] for p in parts]) for name in ("pixel_values", "image_grid_thw")}
    together, cache = read(model, both, method, 0.4, spans, [p[2][0] for p in parts])
    for row, (inputs, own, grids) in enumerate(parts):
        alone, single = read(model, inputs, method, 0.4, own, grids)
        assert torch.equal(together[row, width:], alone[0, inputs["input_ids"].shape[1] :])
        for layer, other in zip(cache.context.layers, single.context.layers, strict=True):
            for name, known in layer.trajectory.items():
                own_part = known[row][~known[row].isnan()].view_as(other.trajectory[name][0])
                torch.testing.assert_close(own_part, other.trajectory[name][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", ["kivi(4,group=16,residual=16)", "mikv(16,4)", "minicache(window=8,block=8)"])
def test_what_is_kept_may_be_stored_in_fewer_bytes(model_of, method, store):  # noqa: F811
    model, (inputs, spans, grids) = model_of("qwen2_5_vl"), screens(4, text=9, grid=(6, 8))
    out, cache = read(model, inputs, f"{method}+{store}", 0.5, spans, grids)
    n = inputs["input_ids"].shape[1]
    assert cache.at_rest.tokens_stored == (n if "mikv" in store else n // 2)
    assert out.shape[1] == n + 4 and cache.at_rest.kv_bytes < cache.at_rest.full_bytes


def test_pictures_that_nobody_told_of_are_refused(model_of):  # noqa: F811
    model, (inputs, spans, grids) = model_of("qwen2_5_vl"), screens(2)
    for method in (*METHODS, "gui-kv"):
        with pytest.raises(ValueError, match=r"call cache.begin\(\*\*inputs, spans"):
            model.generate(**inputs, past_key_values=MethodCache(model, method, 0.4), **GREEDY)
    for method in ("star-kv", "st-lite"):
        with pytest.raises(ValueError, match="give grids"):
            MethodCache(model, method, 0.4).begin(**inputs, spans=spans)
    cache = MethodCache(model, "star-kv", 0.4)
    with pytest.raises(ValueError, match="2 x 2 is not the 6 tokens"):
        cache.begin(**inputs, spans=spans, grids=[[(2, 2)] * 2])
    with pytest.raises(ValueError, match="one grid"):
        cache.begin(**inputs, spans=spans, grids=[[(2, 3)]])
    # After a refusal, and after a first picture, what is told of the next one counts.
    cache.begin(**inputs, spans=spans, grids=grids)
    model.generate(**inputs, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="nobody told of this one"):
        model(**inputs, past_key_values=cache)


@pytest.fixture(scope="module")
def adapter():
    return load_adapter("mini")


@pytest.mark.parametrize("kind", [Agent, PersistentAgent])
def test_steps_are_counted_until_the_next_episode(adapter, kind):
    agent = kind(adapter, "star-kv", 0.3)
    for _ in range(2):
        told, _ = steps(agent, 3, history=2)
        learned = agent._learned if kind is Agent else agent.talk.cache.trajectory
        assert [float(x[STEPS]) for x in learned] == [3.0] * len(learned)
        assert all(d.tokens_stored <= 0.3 * d.prompt_tokens + 1 for d in told)


@pytest.mark.parametrize("method", ["star-kv", "st-lite", "st-lite-official", "st-lite+kivi(4)", "st-lite+mikv(16,4)"])
def test_a_cache_that_lives_from_step_to_step(adapter, method):
    agent = PersistentAgent(adapter, method, 0.3)
    told, _ = steps(agent, 4, history=3)
    assert told[-1].reused_tokens > 0 and len(told[-1].frames) == 3
    if method == "star-kv":
        return
    held = agent.talk.cache.context.layers[0]
    known = set(held.statistics[PLACE][0].tolist()) - {-1}
    shown = {x for s, e in agent.talk.cache.spans[0] for x in range(s, e)}
    assert known <= shown and len({x for s, e in agent.talk.cache.spans[0][:-1] for x in range(s, e)} & known) > 0


@pytest.mark.parametrize("method", ["star-kv", "st-lite"])
def test_what_was_learned_is_saved_copied_and_outlives_a_reset(model_of, tmp_path, method):  # noqa: F811
    model, (inputs, spans, grids) = model_of("qwen2_5_vl"), screens(3)
    _, cache = read(model, inputs, method, 0.4, spans, grids)
    cache.save(tmp_path)
    for other in (MethodCache.load(tmp_path, model), cache.fork()):
        assert other.context.grids == grids and other.spans == spans
        for layer, same in zip(cache.context.layers, other.context.layers, strict=True):
            for known, again in ((layer.trajectory, same.trajectory), (layer.statistics, same.statistics)):
                assert known.keys() == again.keys() and all(torch.equal(known[x], again[x]) for x in known)
    assert cache.kv_bytes() > MethodCache(model, "snapkv", 0.4).kv_bytes()
    learned = cache.trajectory
    cache.reset()
    assert not cache.spans and not cache.context.grids and len(learned) == len(cache.trajectory)
    assert all(x.keys() == y.keys() for x, y in zip(learned, cache.trajectory, strict=True))
    cache.new_trajectory()
    assert all(not x for x in cache.trajectory)
