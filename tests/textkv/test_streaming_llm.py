"""StreamingLLM: its exact kept set and slots, three equal ways to place positions, streams, turns and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache
from textkv.kernels import rotate

EXACT = "streaming_llm(sinks={sinks},prefill='exact_stream',positions='{positions}')"


def stream(model, cache, ids, chunk=1):
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunk, 1)], 1)


def kept(cache, layer=0):
    return [p for p in cache.kept_positions(layer)[0, 0].tolist() if p >= 0]


def slots_by_hand(model, ids, sinks, recent):
    """Layout (a): every step re-rotates all keys to their slots. One layer at a time cannot be had from outside, so the
    model runs with a plain cache of PRE-rotary keys, rebuilt each step: only exact for a one-layer model."""
    block, rotary = model.model.layers[0], model.model.rotary_emb
    attention, out = block.self_attn, []
    keys, values = [], []
    for token in ids[0]:
        hidden = model.model.embed_tokens(token[None, None])
        x = block.input_layernorm(hidden)
        heads = lambda y: y.view(1, 1, -1, attention.head_dim).transpose(1, 2)  # noqa: E731
        q, k, v = heads(attention.q_proj(x)), heads(attention.k_proj(x)), heads(attention.v_proj(x))
        keys, values = [*keys, k], [*values, v]
        n = len(keys)
        slot = torch.arange(n)
        k_all = rotate(torch.cat(keys, 2), slot, rotary.inv_freq)
        q = rotate(q, torch.tensor([n - 1]), rotary.inv_freq)
        group = q.shape[1] // k_all.shape[1]
        scores = q @ k_all.repeat_interleave(group, 1).mT * attention.scaling
        mixed = scores.softmax(-1) @ torch.cat(values, 2).repeat_interleave(group, 1)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(1, 1, -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        out.append(model.lm_head(model.model.norm(hidden)))
        if n > sinks + recent:
            keys, values = keys[:sinks] + keys[-recent:], values[:sinks] + values[-recent:]
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def one_layer():
    torch.manual_seed(0)
    config = tiny.LlamaConfig(**{**tiny.TEXT, "num_hidden_layers": 1})
    return tiny.LlamaForCausalLM(config).eval()


def test_the_kept_set_of_the_specification(one_layer):
    cache = MethodCache(one_layer, EXACT.format(sinks=2, positions="cache"), "5t")
    stream(one_layer, cache, tiny.text_ids(8))
    assert kept(cache) == [0, 1, 5, 6, 7]


@torch.no_grad()
def test_equals_rotating_every_key_to_its_slot(one_layer):
    ids = tiny.text_ids(40)
    cache = MethodCache(one_layer, EXACT.format(sinks=2, positions="cache"), "7t")
    assert not mismatch(
        stream(one_layer, cache, ids), slots_by_hand(one_layer, ids, 2, 5), atol=1e-4, rtol=0
    )  # fmt: skip


@pytest.mark.parametrize("positions", ["cache", "original"])
@pytest.mark.parametrize("chunk", [1, 7, 12, 48])
def test_a_prompt_in_any_chunks_equals_the_stream(model_of, positions, chunk):
    model, ids = model_of("llama"), tiny.text_ids(48)
    method = EXACT.format(sinks=4, positions=positions)
    expected = stream(model, MethodCache(model, method, "16t"), ids)
    cache = MethodCache(model, method, "16t")
    assert not mismatch(stream(model, cache, ids, chunk), expected, atol=1e-4, rtol=0)
    assert kept(cache) == [0, 1, 2, 3, *range(36, 48)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_window_longer_than_the_stream_is_the_full_cache(model_of, family):
    model, ids = model_of(family), tiny.text_ids(30)
    expected = stream(model, MethodCache(model, "full"), ids, 10)
    for method in ("streaming_llm", EXACT.format(sinks=4, positions="cache"), "window"):
        assert not mismatch(stream(model, MethodCache(model, method, "64t"), ids, 10), expected, atol=1e-4, rtol=0)


def test_no_sinks_and_original_positions_is_the_window(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40)
    a = stream(model, MethodCache(model, "streaming_llm(sinks=0,positions='original')", "12t"), ids, 20)
    assert torch.equal(a, stream(model, MethodCache(model, "window", "12t"), ids, 20))


def test_long_prompt_then_decoding_keeps_slots_contiguous(model_of):
    """The published cache class kept the first decoded key at its stream index after a long prompt."""
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache = MethodCache(model, "streaming_llm", "20t")
    stream(model, cache, ids[:, :50], 50)
    stream(model, cache, ids[:, 50:])
    ring = cache.layers[0].segments[0]
    recent, rope = ring.positions[0, 4:], ring.rope[0, 4:]
    gap = ring._gap(rope[recent >= 0].min()[None, None])
    slots = sorted((recent[recent >= 0] - gap[0]).tolist())
    assert kept(cache) == [0, 1, 2, 3, *range(44, 60)] and slots == list(range(4, 20))


def test_what_left_cannot_matter(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "window", "10t")
    stream(model, cache, ids[:, :30], 30)
    other = cache.fork()
    gone = other.layers[0].segments[0].positions < 0
    for layer in other.layers:
        layer.segments[0].k[gone[:, None].expand_as(layer.segments[0].k[..., 0])] = float("nan")
    assert torch.equal(stream(model, other, ids[:, 30:]), stream(model, cache, ids[:, 30:]))


def test_memory_is_constant_over_a_long_stream(one_layer):
    cache = MethodCache(one_layer, EXACT.format(sinks=4, positions="cache"), "32t")
    ids = torch.randint(1, 100, (1, 600))
    stream(one_layer, cache, ids[:, :300], 50)
    before = cache.kv_bytes()
    out = stream(one_layer, cache, ids[:, 300:], 50)
    assert cache.kv_bytes() == before and cache.get_seq_length() == 600 and bool(out.isfinite().all())


@pytest.mark.parametrize("method", ["streaming_llm", EXACT.format(sinks=4, positions="cache")])
def test_a_padded_row_equals_the_row_alone(model_of, method):
    model = model_of("llama")
    ids, mask = tiny.text_ids(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    ids[1, :15], mask[1, :15] = 0, 0
    options = dict(do_sample=False, max_new_tokens=8)
    both = model.generate(ids, attention_mask=mask, past_key_values=MethodCache(model, method, "12t"), **options)
    alone = model.generate(ids[1:, 15:], past_key_values=MethodCache(model, method, "12t"), **options)
    assert torch.equal(both[1, 15:], alone[0])


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_screenshots_move_by_one_width_on_all_axes(model_of, family):
    """M-RoPE: positions="original" and "cache" agree as long as nothing left between sinks and window."""
    model = model_of(family)
    inputs, _ = tiny.screens(2)
    n = inputs["input_ids"].shape[1]
    runs = [
        model.generate(**inputs, past_key_values=MethodCache(model, f"streaming_llm(positions='{p}')", f"{n + 9}t"),
                       do_sample=False, max_new_tokens=6)
        for p in ("cache", "original")
    ]  # fmt: skip
    assert torch.equal(*runs)
    cache = MethodCache(model, "streaming_llm", "14t")
    model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=3)
    assert kept(cache)[:4] == [0, 1, 2, 3] and len(kept(cache)) == 14


@settings(max_examples=25, deadline=None)
@given(first=st.integers(-50, 50), second=st.integers(-50, 50))
def test_turning_twice_is_turning_once(first, second):
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    freq = 10000 ** -(torch.arange(8) / 8)
    at = lambda d: torch.full((1, 3), d)  # noqa: E731
    twice = rotate(rotate(x, at(first), freq), at(second), freq)
    assert not mismatch(twice, rotate(x, at(first + second), freq), atol=1e-5, rtol=1e-5)
    assert torch.equal(rotate(x, at(0), freq), x)


def test_a_budget_beyond_the_trained_length_warns(model_of):
    model = model_of("llama")
    with pytest.warns(UserWarning, match="longer than the 1024 positions"):
        stream(model, MethodCache(model, "streaming_llm", "2000t"), tiny.text_ids(5), 5)


def test_frequencies_that_change_with_length_are_refused():
    config = tiny.LlamaConfig(**tiny.TEXT, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model = tiny.LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="positions='original'"):
        MethodCache(model, "streaming_llm", "20t")
    MethodCache(model, "streaming_llm(positions='original')", "20t")
