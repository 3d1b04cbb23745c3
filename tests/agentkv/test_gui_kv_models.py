"""GUI-KV inside whole models: full budget, bytes, positions, padding, later screenshots, and tokens nobody looks at."""

import pytest
import torch

import agentkv  # noqa: F401  (registers gui-kv)
from tests.textkv import tiny
from tests.textkv.conftest import model_of  # noqa: F401
from textkv import MethodCache, resolve_method
from textkv.conformance import CHECKS, check_method
from textkv.conversation import Conversation

GREEDY = dict(do_sample=False, max_new_tokens=6)


def generate(model, inputs, method, budget, spans):
    cache = MethodCache(model, method, budget)
    cache.begin(**inputs, spans=spans)
    return model.generate(**inputs, past_key_values=cache, **GREEDY), cache


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("gui-kv", 0.4),
        ("gui-kv-official", 0.4),
        ("gui-kv(heads='head0',saliency='residual')", 0.4),
        ("gui-kv+adakv", 0.3),
    ],
)
def test_conforms_like_every_method(method, budget):
    results = check_method(method, budget)
    assert [r.name for r in results if r.outcome == "passed"] == list(CHECKS)


@pytest.mark.parametrize("method", ["gui-kv", "gui-kv-official"])
@pytest.mark.parametrize("frames", [0, 1, 5])
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_full_budget_equals_the_full_cache(model_of, family, frames, method):  # noqa: F811
    model = model_of(family)
    inputs, spans = tiny.screens(frames)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(generate(model, inputs, method, 1.0, spans)[0], expected)


def test_full_budget_equals_the_full_cache_under_plain_rotary_positions(model_of):  # noqa: F811
    model, ids = model_of("qwen2"), tiny.text_ids(60)
    expected = model.generate(ids, **GREEDY)
    spans = [[(3, 20), (22, 39), (40, 57)]]
    assert torch.equal(generate(model, {"input_ids": ids}, "gui-kv", 1.0, spans)[0], expected)


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_every_head_keeps_exactly_its_count_and_the_window(model_of, family):  # noqa: F811
    model = model_of(family)
    inputs, spans = tiny.screens(4, text=9, grid=(6, 8))
    n = inputs["input_ids"].shape[1]
    count = int(0.4 * n)
    history = sum(end - start for start, end in spans[0][:-1])
    for method, heads in (("gui-kv", 2), ("gui-kv-official", 4), ("gui-kv(heads='head0')", 2)):
        _, cache = generate(model, inputs, method, 0.4, spans)
        for kept in cache.at_rest.kept:
            assert kept.shape == (1, heads, count)
            for head in kept[0].tolist():
                assert head == sorted(set(head)) and head[-8:] == list(range(n - 8, n))
                old = sum(any(s <= p < e for s, e in spans[0][:-1]) for p in head)
                assert old <= history - int((1 - count / n) * history)


def test_stored_bytes_are_as_the_heads(model_of):  # noqa: F811
    model = model_of("qwen2_5_vl")
    inputs, spans = tiny.screens(3)
    held = {m: generate(model, inputs, m, 0.4, spans)[1].at_rest.kv_bytes for m in ("gui-kv", "gui-kv-official")}
    assert held["gui-kv-official"] == 2 * held["gui-kv"]


@pytest.mark.parametrize("method", ["gui-kv", "gui-kv-official"])
def test_positions_go_on_as_without_eviction(model_of, method):  # noqa: F811
    model = model_of("qwen2_5_vl")
    inputs, spans = tiny.screens(3)
    seen: list = []
    handle = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("position_ids", args[-1]).clone()), with_kwargs=True
    )
    generate(model, inputs, "full", None, spans)
    plain, seen[:] = list(seen), []
    generate(model, inputs, method, 0.3, spans)
    handle.remove()
    assert len(plain) == len(seen) and all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@pytest.mark.parametrize("method", ["gui-kv", "gui-kv-official", "gui-kv+adakv"])
def test_rows_padded_on_the_left_equal_single_rows(model_of, method):  # noqa: F811
    model = model_of("qwen2_5_vl")
    parts = [tiny.screens(2, seed=1, text=9), tiny.screens(2, seed=2, text=4)]
    width = max(p[0]["input_ids"].shape[1] for p in parts)
    ids, mask, spans = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64), []
    for row, (inputs, own) in enumerate(parts):
        pad = width - inputs["input_ids"].shape[1]
        ids[row, pad:], mask[row, pad:] = inputs["input_ids"][0], 1
        spans.append([(s + pad, e + pad) for s, e in own[0]])
    both = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == tiny.IMAGE).long(),
        "pixel_values": torch.cat([p[0]["pixel_values"] for p in parts]),
        "image_grid_thw": torch.cat([p[0]["image_grid_thw"] for p in parts]),
    }
    together, _ = generate(model, both, method, 0.4, spans)
    for row, (inputs, own) in enumerate(parts):
        alone, _ = generate(model, inputs, method, 0.4, own)
        assert torch.equal(together[row, width:], alone[0, inputs["input_ids"].shape[1] :])


def test_a_later_screenshot_makes_the_older_ones_history(model_of):  # noqa: F811
    """The persistent cache: the gate is taken again over what survived, with the new frame as the current one."""
    model = model_of("qwen2_5_vl")
    first, spans = tiny.screens(2, seed=3)
    talk = Conversation(model, "gui-kv", 0.5)
    answer = talk.generate(**first, spans=spans, **GREEDY)
    second, more = tiny.screens(1, seed=4)
    ids = torch.cat([answer, second["input_ids"]], 1)
    offset = answer.shape[1]
    spans = [spans[0] + [(s + offset, e + offset) for s, e in more[0]]]
    whole = {
        "mm_token_type_ids": (ids == tiny.IMAGE).long(),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "image_grid_thw": torch.cat([first["image_grid_thw"], second["image_grid_thw"]]),
    }
    talk.generate(ids, spans=spans, **whole, **GREEDY)
    assert talk.cache.at_rest.tokens_stored == int(0.5 * ids.shape[1])
    assert talk.cache.spans == spans


def test_dropping_what_nobody_looks_at_changes_nothing(model_of):  # noqa: F811
    """Keys opposite to every query have no attention; they go first, and decoding is as with the full cache."""
    model = model_of("llama")
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=g), dim=0)
    n, live = 40, torch.arange(40) % 3 == 0
    k = torch.randn(1, 2, n, 16, generator=g) * 0.1 + torch.where(live, 1.0, -60.0)[:, None] * direction
    v, q = torch.randn(1, 2, n, 16, generator=g), torch.randn(1, 4, n, 16, generator=g) * 0.1 + 20 * direction
    k[..., -1, :] = direction
    outs = []
    for method, budget in (("full", None), ("gui-kv(window=1,kernel=1,alpha=0.0)", f"{int(live.sum())}t")):
        cache = MethodCache(model, method, budget)
        layer = cache.layers[0]
        layer.lazy_initialization(k, v)
        layer.feed(q, k, v, 0.25)
        outs.append(layer.feed(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], 0.25))
    assert int(layer.lengths()[0, 0]) == int(live.sum()) + 1
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spans", [[[(0, 4), (2, 8)]], [[(8, 4)]], [[(0, 500)]]])
def test_bad_spans_are_refused_before_any_work(model_of, spans):  # noqa: F811
    with pytest.raises(ValueError, match="must lie in"):
        MethodCache(model_of("qwen2"), "gui-kv", 0.4).begin(tiny.text_ids(30), spans=spans)


@pytest.mark.parametrize(
    "store",
    ["kivi(4,group=16,residual=16)", "gear(4,group=16,residual=16)", "mikv(16,4)", "minicache(window=8,block=8)"],
)
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_what_gui_kv_keeps_may_be_stored_in_fewer_bytes(model_of, family, store):  # noqa: F811
    model = model_of(family)
    inputs, spans = tiny.screens(4, text=9, grid=(6, 8))
    plain = generate(model, inputs, "gui-kv", 0.5, spans)[1]
    _, cache = generate(model, inputs, f"gui-kv+{store}", 0.5, spans)
    if store.startswith("mikv"):  # what gui-kv would drop is demoted
        assert cache.at_rest.tokens_stored == inputs["input_ids"].shape[1]
        assert cache.at_rest.kv_bytes < cache.at_rest.full_bytes
        return
    # A pair of layers keeps the same tokens, as many as gui-kv keeps in each.
    assert cache.at_rest.tokens_stored == plain.at_rest.tokens_stored
    assert cache.at_rest.kv_bytes < plain.at_rest.kv_bytes


def test_copies_per_query_head_cannot_be_demoted():
    with pytest.raises(ValueError, match="stores a copy per query head"):
        resolve_method("gui-kv-official+mikv(16,2)")
