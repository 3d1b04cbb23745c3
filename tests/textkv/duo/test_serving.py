"""DuoAttention serving: every forward against a masked oracle, padding, screenshots, head order, copies."""

import copy

import pytest
import torch
from transformers import DynamicCache

import textkv
from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.duo.toy import GATES, duo, feed, pattern_file
from textkv import MethodCache
from textkv.conformance import MASKED
from textkv.duo.pattern import Pattern


@pytest.fixture
def pattern(tmp_path):
    return pattern_file(tmp_path)


@pytest.mark.parametrize("prefill", ["full_then_trim", "chunks"])
def test_every_forward_equals_full_attention_over_what_each_head_holds(model_of, pattern, prefill):
    """Chunks, single tokens and later turns: a head sees what it held before, and the new tokens causally."""
    model, ids, plain = model_of("llama"), tiny.text_ids(47, batch=2), DynamicCache()
    cache = MethodCache(model, duo(pattern, sparsity=0.5, prefill=prefill))
    seen = 0
    for part in ids.split((20, 7, 1, 1, 1, 9, 1, 1, 6), 1):
        held = [torch.ones(2, 2, seen, dtype=torch.bool)] * 3
        if seen:
            held = [torch.stack([torch.isin(torch.arange(seen), h) for h in cache.kept_positions(i).flatten(0, 1)])
                    .view(2, 2, seen) for i in range(3)]  # fmt: skip
        textkv.use(model)
        ours = feed(model, cache, part, part.shape[1])
        model.set_attn_implementation(MASKED)
        with torch.no_grad():
            expected = model(part, past_key_values=plain, kept=dict(enumerate(held))).logits
        assert not mismatch(ours, expected, atol=1e-4, rtol=0)
        seen += part.shape[1]
    assert cache.layers[0].lengths().tolist() == [[5, 5]] * 2


def test_a_prompt_in_one_chunk_is_exact(model_of, pattern):
    model, ids = model_of("llama"), tiny.text_ids(40)
    expected = feed(model, MethodCache(model, "full"), ids, 40)
    for prefill in ("full_then_trim", "chunks"):
        cache = MethodCache(model, duo(pattern, sparsity=0.5, prefill=prefill))
        assert not mismatch(feed(model, cache, ids, 40), expected, atol=1e-5, rtol=0)


def test_chunks_free_bytes_before_an_announced_prompt_ends(model_of, pattern):
    model = model_of("llama")
    peaks = []
    for prefill in ("full_then_trim", "chunks"):
        cache = MethodCache(model, duo(pattern, sparsity=0.5, prefill=prefill))
        cache.begin(tokens=60)
        feed(model, cache, tiny.text_ids(60), 10)
        peaks.append(cache.peak_bytes)
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize("chunks", [False, True])
def test_padded_rows_and_padded_later_turns_equal_rows_alone(model_of, pattern, chunks):
    model, ids = model_of("llama"), tiny.text_ids(50, batch=2)
    method = duo(pattern, sparsity=0.5, prefill="chunks" if chunks else "full_then_trim")
    # Row 1 has 4 pads in the prompt and 3 more in the second turn.
    mask = torch.ones(2, 36, dtype=torch.int64)
    mask[1, :4], mask[1, 21:24] = 0, 0
    both, alone = MethodCache(model, method), MethodCache(model, method)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for a, b in ((0, 20), (20, 21), (21, 30), (30, 31), (31, 36)):
        real = mask[1, a:b].bool()
        with torch.no_grad():
            ours = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b], past_key_values=both)
            expected = model(ids[1:, a:b][:, real], past_key_values=alone)
        assert not mismatch(ours.logits[1, real], expected.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_windows_longer_than_the_stream_are_the_full_cache_with_screenshots(model_of, family):
    model, (inputs, _) = model_of(family), tiny.screens(2)
    runs = [
        model.generate(**inputs, past_key_values=MethodCache(model, method), do_sample=False, max_new_tokens=5)
        for method in ("full", duo(sparsity=0.5, sinks=4, recent=100))
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_reordering_kv_heads_and_gates_alike_changes_nothing(model_of, family, tmp_path):
    """What the authors do to the weights (with biases and head norms too), and we do by index."""
    model, ids, g = copy.deepcopy(model_of(family)), tiny.text_ids(40), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=g)
    other = copy.deepcopy(model)
    swapped = GATES[:2] + [GATES[2][::-1]]
    swap = lambda x, width: x.unflatten(0, (-1, width)).roll(1, 0).flatten(0, 1)  # noqa: E731
    with torch.no_grad():
        attention = other.model.layers[2].self_attn
        dim, group = attention.head_dim, 2
        for name, width in (("q_proj", group * dim), ("k_proj", dim), ("v_proj", dim)):
            for parameter in getattr(attention, name).parameters():
                parameter.copy_(swap(parameter, width))
        attention.o_proj.weight.copy_(swap(attention.o_proj.weight.T, group * dim).T)
    outs = []
    for m, gates in ((model, GATES), (other, swapped)):
        Pattern(torch.tensor(gates), 2, 4).save(tmp_path / "p.json")
        cache = MethodCache(m, duo(str(tmp_path / "p.json"), sparsity=0.5))
        outs.append(feed(m, cache, ids, (20, 1, 1, 10, 8)))
        assert cache.layers[2].lengths().tolist() == ([[5, 40]] if m is model else [[40, 5]])
    assert not mismatch(*outs, atol=1e-4, rtol=0)


def test_a_cache_in_chunks_can_be_saved_and_forked(model_of, pattern, tmp_path):
    model, ids = model_of("llama"), tiny.text_ids(40, batch=2)
    cache = MethodCache(model, duo(pattern, sparsity=0.5, prefill="chunks"))
    feed(model, cache, ids[:, :20], 10)
    cache.save(tmp_path / "saved")
    loaded, fork = MethodCache.load(tmp_path / "saved", model), cache.fork()
    expected = feed(model, cache, ids[:, 20:], (10, 1, 1, 8))
    assert torch.equal(feed(model, loaded, ids[:, 20:], (10, 1, 1, 8)), expected)
    assert torch.equal(feed(model, fork, ids[:, 20:], (10, 1, 1, 8)), expected)


def test_rows_may_be_dropped_until_a_part_is_empty(model_of):
    """Without a pattern the rows' full heads differ: a selection can leave a part of a layer without any unit."""
    model, ids = model_of("llama"), tiny.text_ids(60, batch=3)
    cache = MethodCache(model, duo(sparsity=0.5))
    feed(model, cache, ids[:, :50], 50)
    expected = feed(model, cache.fork(), ids[:, 50:], 1)
    for row in range(3):
        one = cache.fork()
        one.batch_select_indices(torch.tensor([row]))
        assert not mismatch(feed(model, one, ids[row : row + 1, 50:], 1), expected[row : row + 1])
