"""MiniCache in whole models: which layers and tokens merge and when, eviction of pairs, bytes, memory, refusals."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.textkv import tiny
from tests.textkv.watch import Largest
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.methods.minicache import MiniCache
from textkv.segments import paired
from textkv.segments.paired import PairedSegment


def run(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def model_of_layers(count, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny.TEXT | {"num_hidden_layers": count} | changes)).eval()


def sizes(cache, layer=1):
    """Tokens of a layer that are merged and that are exact."""
    lengths = [int(segment.lengths()[0, 0]) for segment in cache.layers[layer].segments]
    return (0, *lengths)[-2:]


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("minicache(4)", 0.4), ("snapkv+minicache(4,window=4,group=16,block=16)", 0.6),
        ("snapkv+minicache(retention='topk',gamma=0.2,window=8)", 0.5), ("minicache(8,start=0,t=0.5,sinks=0)", 0.4),
    ],
)  # fmt: skip
def test_it_conforms_with_other_settings(method, budget):
    skipped = {check.name for check in check_method(method, budget) if check.outcome != "passed"}
    assert skipped == {
        "full_budget_equals_full_cache",  # a pair of layers shares directions (where none is merged: the test below)
        "equals_masked_full_attention",  # its oracle reads each layer's own keys and values
        "forgotten_tokens_are_gone",  # its oracle too
    }


@pytest.mark.parametrize(
    ("method", "budget"), [("minicache(gamma=1.0,window=4,block=4)", 0.4), ("snapkv+minicache(4,gamma=1.0)", 1.0)]
)
def test_with_every_token_kept_it_is_the_full_cache(model_of, method, budget):
    model, ids = model_of("qwen2"), tiny.text_ids(100, batch=2)
    cuts = (60, 1, 1, 1, 1, 1, 1, 24, 1, 9)
    plain, expected = DynamicCache(), []
    for step in ids.split(cuts, 1):
        expected.append(run(model, plain, step))
    cache = MethodCache(model, method, budget)
    for step, true in zip(ids.split(cuts, 1), expected, strict=True):
        torch.testing.assert_close(run(model, cache, step), true, rtol=0, atol=1e-4)
    assert sizes(cache)[0] > 40


@pytest.mark.parametrize(
    ("layers", "start", "pairs"),
    [
        (2, None, [(0, 1)]), (3, None, [(1, 2)]), (4, None, [(2, 3)]), (8, None, [(4, 5), (6, 7)]),
        (7, None, [(3, 4), (5, 6)]), (7, 2, [(2, 3), (4, 5)]), (5, 0, [(0, 1), (2, 3)]),
    ],
)  # fmt: skip
def test_layers_go_in_pairs_from_the_middle_on(layers, start, pairs):
    method = MiniCache(start=start)
    partners = [method.partner(index, layers) for index in range(layers)]
    expected = dict(pairs) | {b: a for a, b in pairs}
    assert partners == [expected.get(index) for index in range(layers)]


def test_only_paired_layers_are_merged_and_the_window_is_exact(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100)
    cache = MethodCache(model, "minicache")
    run(model, cache, ids)
    assert [len(layer.segments) for layer in cache.layers] == [1, 2, 2]
    assert sizes(cache, 1) == sizes(cache, 2) == (68, 32)
    plain = DynamicCache()
    model.set_attn_implementation("sdpa")
    run(model, plain, ids)
    for index in (1, 2):
        held = cache.layers[index].stored()
        assert held.positions[0, 0].tolist() == list(range(100))
        torch.testing.assert_close(held.keys[:, :, 68:], plain.layers[index].keys[:, :, 68:])
        torch.testing.assert_close(held.keys[:, :, :4], plain.layers[index].keys[:, :, :4])
        torch.testing.assert_close(held.values.norm(dim=-1), plain.layers[index].values.norm(dim=-1))


def test_decoded_tokens_are_merged_in_blocks(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100)
    cache = MethodCache(model, "minicache(4,window=8,block=16,group=16)")
    run(model, cache, ids[:, :60])
    seen = [sizes(cache)]
    for i in range(60, 90):
        run(model, cache, ids[:, i : i + 1])
        seen.append(sizes(cache))
        assert sizes(cache, 2) == sizes(cache, 1)
    # 52 tokens lie before the window: three whole groups are packed, 4 wait with the 8.
    packed = [48] * 12 + [64] * 16 + [80] * 3
    assert seen == [(old, 60 + i - old) for i, old in enumerate(packed)]


def test_short_prompts_wait_and_can_be_taken_back(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache = MethodCache(model, "minicache")
    run(model, cache, ids[:, :30])
    assert sizes(cache) == (0, 30)
    for i in range(30, 64):
        run(model, cache, ids[:, i : i + 1])
    assert sizes(cache) == (32, 32)
    cache.crop(-5)
    assert sizes(cache) == (32, 27) and cache.get_seq_length() == 59
    with pytest.raises(ValueError, match="can take back only the 27 tokens"):
        cache.crop(-28)


def test_a_later_turn_leaves_what_was_merged(model_of):
    model, ids = model_of("llama"), tiny.text_ids(200)
    cache = MethodCache(model, "minicache(4)")
    run(model, cache, ids[:, :100])
    before = cache.layers[1].stored().keys[:, :, :64]
    run(model, cache, ids[:, 100:180])
    assert sizes(cache) == (128, 52)
    assert torch.equal(cache.layers[1].stored().keys[:, :, :64], before)


def test_a_later_turn_of_an_evicting_cache_chooses_anew(model_of):
    model, ids = model_of("llama"), tiny.text_ids(200)
    cache = MethodCache(model, "snapkv+minicache", "60t")
    run(model, cache, ids[:, :100])
    run(model, cache, ids[:, 100:180])
    assert sizes(cache) == (28, 32) and sizes(cache, 0) == (0, 60)
    assert torch.equal(cache.kept_positions(1), cache.kept_positions(2))
    assert int(cache.kept_positions(1)[0, 0, -1]) == 179


def test_both_layers_of_a_pair_keep_the_best_of_their_summed_scores(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100, batch=2)
    scorer = resolve_method("snapkv(window=8)", 0.3)
    found = []

    class Spy(MethodCache):
        pass

    cache = Spy(model, resolve_method("snapkv(window=8)+minicache(window=4)", 0.3))
    original = type(scorer).scores

    def scores(self, layer, evidence):
        found.append(original(self, layer, evidence))
        return found[-1]

    type(scorer).scores = scores
    try:
        run(model, cache, ids)
    finally:
        type(scorer).scores = original
    best = (found[1] + found[2]).sort(dim=-1, descending=True, stable=True).indices[..., :30].sort(-1).values
    for index in (1, 2):
        assert torch.equal(cache.kept_positions(index).long(), best)
    alone = found[0].sort(dim=-1, descending=True, stable=True).indices[..., :30].sort(-1).values
    assert torch.equal(cache.kept_positions(0).long(), alone)


def test_layers_of_unequal_budgets_meet_in_the_middle():
    model, ids = model_of_layers(4), tiny.text_ids(100)
    alone, cache = (MethodCache(model, f"pyramidkv(window=8){tail}", 0.3) for tail in ("", "+minicache"))
    run(model, alone, ids)
    run(model, cache, ids)
    counts, ours = ([int(layer.lengths()[0, 0]) for layer in c.layers] for c in (alone, cache))
    assert counts[2] != counts[3]
    assert ours == [counts[0], counts[1], (counts[2] + counts[3]) // 2, (counts[2] + counts[3]) // 2]


def test_bytes_are_told_once_and_less_than_full():
    model, ids = model_of_layers(8), tiny.text_ids(600)
    share = {}
    for name in ("full", "minicache", "minicache(4)"):
        cache = MethodCache(model, name)
        run(model, cache, ids)
        share[name] = cache.kv_bytes() / cache.full_bytes()
        assert cache.report().kv_bytes == sum(layer.kv_bytes() for layer in cache.layers)
    # Half of the layers, with 32 of 600 tokens exact, 16 channels, and few tokens kept: 3/4 + lengths.
    assert 0.75 < share["minicache"] < 0.86 < share["full"]
    assert share["minicache(4)"] < 0.72


@pytest.mark.parametrize("method", ["minicache", "minicache(4)"])
def test_decoding_never_rebuilds_a_layer(monkeypatch, method):
    """One head of 16 channels: 640 tokens are 10,240 numbers; 64 restored at a time are 1,024."""
    monkeypatch.setattr(paired, "BLOCK", 64)
    model = model_of_layers(2, num_key_value_heads=1, vocab_size=128)
    cache, ids = MethodCache(model, method), tiny.text_ids(700)
    run(model, cache, ids[:, :640])
    watch = Largest()
    with watch:
        for i in range(640, 680):
            run(model, cache, ids[:, i : i + 1])
    assert 0 < watch.numbers < 640 * 16 / 2


def test_biased_keys_are_packed_as_well_as_others(model_of):
    """Keys with a large constant part, as Qwen2.5 has them: beside the merging, four bits cost little."""
    model = model_of("qwen2")
    ids, biases = tiny.text_ids(112), [layer.self_attn.k_proj.bias for layer in model.model.layers]
    before = [bias.detach().clone() for bias in biases]
    g = torch.Generator().manual_seed(0)
    outs = {}
    try:
        with torch.no_grad():
            for bias in biases:
                bias.copy_(30 * torch.randn(bias.shape, generator=g) * (torch.rand(bias.shape, generator=g) < 0.2))
        for name in ("full", "minicache", "minicache(8)", "minicache(4)"):
            cache = MethodCache(model, name)
            run(model, cache, ids[:, :96])  # 64 tokens before the window: as many whole groups as merged tokens
            outs[name] = torch.cat([run(model, cache, ids[:, i : i + 1]) for i in range(96, 112)], 1)
    finally:
        with torch.no_grad():
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old)
    gap = {name: float((out - outs["full"]).norm()) for name, out in outs.items()}
    packing = {name: float((out - outs["minicache"]).norm()) for name, out in outs.items()}
    assert packing["minicache(8)"] < 0.02 * gap["minicache"]
    assert packing["minicache(4)"] < 0.2 * gap["minicache"]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("minicache(3)", "bits=3 cannot be packed"),
        ("minicache(4,group=24)", "a group of 24 tokens cannot be packed"),
        ("minicache(4,block=40)", "block=40 is not a multiple of group=32; use 64"),
        ("minicache(t=1.5)", "t=1.5: a place between two layers"),
        ("minicache(gamma=-0.1)", "gamma=-0.1: a share"),
        ("minicache(retention='all')", "retention='all': use 'range' or 'topk'"),
        ("minicache(window=0)", "window=0.*at least 1 token"),
        ("snapkv+adakv+minicache", r"adakv\+minicache: adakv gives every head its own number"),
        ("minicache+snapkv", "snapkv cannot follow minicache"),
        ("streaming_llm+minicache", "streaming_llm gives none"),
    ],
)
def test_bad_settings_are_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(expression, 0.5)


@pytest.mark.parametrize(
    ("layers", "method", "told"),
    [(3, "minicache(start=2)", "start=2: minicache governs 3 layers"), (1, "minicache", "minicache governs 1 layers")],
)
def test_a_model_without_a_pair_is_refused(layers, method, told):
    with pytest.raises(ValueError, match=told):
        MethodCache(model_of_layers(layers), method)


def test_unlike_layers_are_no_pair():
    model = model_of_layers(3)
    cache = MethodCache(model, "minicache")
    k = torch.zeros(1, 2, 0, 16)
    cache.layers[1].lazy_initialization(k, k)
    with pytest.raises(ValueError, match="layers 1 and 2 cannot be a pair: kv_heads 2 and 4; choose another `start`"):
        cache.layers[2].lazy_initialization(torch.zeros(1, 4, 0, 16), torch.zeros(1, 4, 0, 16))
    model.config.no_rope_layers = [1, 1, 0]
    with pytest.raises(ValueError, match="rotary 1 and 0"):  # known before any token
        MethodCache(model, "minicache")


def test_the_layers_must_run_in_their_order(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "minicache")
    run(model, cache, tiny.text_ids(40))
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="layer 2 has seen 41 tokens and layer 1, its pair, 40"):
        cache.layers[2].feed(q, k, k, 0.25)


def test_a_fork_shares_nothing_but_keeps_its_pair_together(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache = MethodCache(model, "minicache(4,window=4)")
    run(model, cache, ids)
    other = cache.fork()
    first, second = (layer.segments[0] for layer in other.layers[1:])
    assert isinstance(first, PairedSegment) and first.pair is second.pair
    assert first.pair is not cache.layers[1].segments[0].pair


@pytest.mark.parametrize("alike", [0.8, -1.0])
def test_a_pair_whose_layers_point_apart_keeps_both(alike):
    model, ids = model_of_layers(4), tiny.text_ids(48, batch=2)
    cache = MethodCache(model, f"minicache(window=4,block=4,sinks=1,alike={alike})")
    found = run(model, cache, ids[:, :40])
    for token in ids[:, 40:].split(1, 1):
        found = run(model, cache, token)
    apart = not any(isinstance(layer.segments[0], PairedSegment) for layer in cache.layers)
    assert apart == (alike == 0.8)  # random weights: nothing is alike
    if apart:
        torch.testing.assert_close(found, run(model, DynamicCache(config=model.config), ids)[:, -1:], atol=1e-5, rtol=0)


def test_merging_what_points_apart_is_warned_of():
    model = model_of_layers(4)
    with pytest.warns(UserWarning, match=r"layers 2 and 3, whose mean cosine is .*use alike=0.8"):
        run(model, MethodCache(model, "minicache(window=4)"), tiny.text_ids(40))
    with pytest.raises(ValueError, match=r"alike=2.*use e.g. 0.8"):
        resolve_method("minicache(alike=2.0)")
