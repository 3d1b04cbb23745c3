"""TurboQuant: the worked case, what leaves one by one, bytes, centres, beside kivi, refusals. The codes themselves are
tested in tests/kernels/test_codebook.py, the segment in tests/textkv/test_coded_segment.py."""

from __future__ import annotations

from functools import cache as once

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.textkv import tiny
from tests.textkv.methods.test_kivi import Watch, evenly_biased
from tests.textkv.test_coded_segment import segment_of
from textkv import MethodCache, resolve_method, use
from textkv.conformance import check_method
from textkv.kernels import decode_attention
from textkv.kernels.codebook import from_bytes
from textkv.mini import load_mini
from textkv.mini.tasks import make_example
from textkv.segments.coded import CodedSegment
from textkv.segments.split import ChunkedRing

LOSSY = {
    "full_budget_equals_full_cache",
    "equals_masked_full_attention",
    "crop_or_refusal",
    "forgotten_tokens_are_gone",
}


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


# ---- the worked case -------------------------------------------------------------------------------------------------

X = torch.tensor([3, -1, 0.5, 0, 2, -2, 1, 0.25]).view(1, 1, 1, 8)
WORKED = {  # bits: codes, bytes, decoded with the length kept, relative error with and without
    2: ([2, 3, 2, 3, 2, 1, 2, 2], [238, 166],
        [3.119275, -0.780933, -0.584585, 0.584585, 1.950104, -1.950104, 0.584585, -0.584585], 0.356492, 0.361057),
    3: ([5, 7, 4, 6, 4, 3, 5, 4], [61, 205, 149],
        [3.054714, -0.829874, 0.176596, -0.176596, 1.942294, -1.942294, 1.289016, -0.153569], 0.147606, 0.147204),
    4: ([11, 14, 8, 13, 9, 7, 10, 8], [235, 216, 121, 138],
        [3.107318, -0.841555, 0.395960, 0.187991, 1.988321, -1.960552, 0.958775, 0.200758], 0.067734, 0.073297),
}  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_worked_case_without_signs_and_centre(bits):
    codes, packed, decoded, with_length, plain = WORKED[bits]
    segment = segment_of(X, X, (bits, bits))
    row = segment.rows.k[0, 0, 0]
    assert row[:-2].tolist() == packed and from_bytes(row[:-2], bits).tolist() == codes
    for found in (segment.stored().keys, segment.stored().values):
        torch.testing.assert_close(found.flatten(), torch.tensor(decoded), rtol=0, atol=1e-3)  # the scale is float16
        assert float((found - X).norm() / X.norm()) == pytest.approx(with_length, abs=1e-4)
        assert float(found.norm()) == pytest.approx(4.394599, rel=1e-3)
    without = segment_of(X, X, (bits, bits), fit="plain").stored().keys
    assert float((without - X).norm() / X.norm()) == pytest.approx(plain, abs=1e-4)


def test_three_bits_of_the_worked_case_point_where_x_does():
    found = segment_of(X, X, (3, 3)).stored().keys
    assert float(torch.cosine_similarity(found.flatten(), X.flatten(), dim=0)) == pytest.approx(0.989106, abs=1e-4)


# ---- what is stored --------------------------------------------------------------------------------------------------


@once
def wide_model(dim=128):
    shape = {"num_hidden_layers": 1, "head_dim": dim, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**tiny.TEXT | shape)).eval()


@pytest.mark.parametrize("dim", [128, 64, 96])
@pytest.mark.parametrize(("bits", "value_bits"), [(4, None), (3, 4), (3, None), (2, None)])
def test_bytes_are_those_of_the_formula_and_nothing_else_is_kept(dim, bits, value_bits):
    """At head_dim 128 a token takes 132, 118, 100 and 68 bytes a head, keys and values together."""
    cache = MethodCache(wide_model(dim), f"turboquant({bits},{value_bits})")
    feed(wide_model(dim), cache, tiny.text_ids(640))
    token = dim * bits // 8 + 2 + dim * (value_bits or bits) // 8 + 2
    beside = 640 * 4 + 2 * dim * 4 + 2 * dim  # positions, shared by the heads; the centre; the signs
    assert cache.kv_bytes() == 2 * 640 * token + beside
    for x in cache.layers[0].tensors().values():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_a_prompt_is_read_exactly_and_many_bits_decode_almost_exactly(model_of):
    model, ids = model_of("llama"), tiny.text_ids(120, 2)
    plain = DynamicCache()
    expected = [feed(model, plain, part) for part in ids.split([100, 1, 1, 1, 17], 1)]
    cache = MethodCache(model, "turboquant(8)")
    ours = [feed(model, cache, part) for part in ids.split([100, 1, 1, 1, 17], 1)]
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    for mine, true in zip(ours[1:], expected[1:], strict=True):
        assert 1e-5 < float((mine - true).abs().max()) < 0.1


def test_more_bits_err_less(model_of):
    model, ids = model_of("llama"), tiny.text_ids(100)
    plain = DynamicCache()
    expected, error = [feed(model, plain, part) for part in ids.split([90, 10], 1)][1], []
    for bits in range(1, 9):
        cache = MethodCache(model, f"turboquant({bits})")
        ours = [feed(model, cache, part) for part in ids.split([90, 10], 1)][1]
        error.append(float((ours - expected).norm()))
    assert all(more < 0.8 * less for less, more in zip(error, error[2:], strict=False)), error


@pytest.mark.parametrize("expression", ["turboquant(4)", "snapkv+turboquant(3)", "adakv+turboquant(2,4)"])
def test_decoding_attends_to_what_the_codes_stand_for(model_of, expression):
    model = model_of("llama")
    cache = MethodCache(model, expression, 0.5)
    feed(model, cache, tiny.text_ids(75, 2))
    layer, q, x = cache.layers[0], torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    held = layer.stored()
    out = layer.feed(q, x, x, 0.25)
    # its own key and value are exact; then they are codes as well
    keys, values = torch.cat([held.keys, x], 2), torch.cat([held.values, x], 2)
    real = torch.cat([held.positions >= 0, torch.ones(2, 2, 1, dtype=torch.bool)], 2)
    torch.testing.assert_close(out, decode_attention(q, keys, values, scale=0.25, valid=real)[0], rtol=1e-5, atol=1e-5)
    assert type(layer.segments[0]) is CodedSegment and len(layer.segments) == 1
    assert torch.equal(layer.lengths(), (real.sum(-1)))


def test_signs_are_drawn_for_each_layer_from_the_seed(model_of):
    model, found = model_of("llama"), {}
    for seed in (0, 0, 1):
        cache = MethodCache(model, f"turboquant(seed={seed})")
        feed(model, cache, tiny.text_ids(20))
        signs = [layer.segments[0].coding.signs for layer in cache.layers]
        assert all(torch.equal(a, b) for a, b in zip(found.setdefault(seed, signs), signs, strict=True))
    different = [*found[0], *found[1]]
    assert len({tuple(x.flatten().tolist()) for x in different}) == 6
    assert all(x.shape == (2, 16) and set(x.flatten().tolist()) == {-1, 1} for x in different)


# ---- tokens come and go one by one -----------------------------------------------------------------------------------


def test_h2o_evicts_at_every_decoded_token_as_alone(model_of):
    model, ids = model_of("llama"), tiny.text_ids(90, 2)
    cache, alone = MethodCache(model, "h2o+turboquant(8)", "40t"), MethodCache(model, "h2o", "40t")
    for part in ids.split([60] + [1] * 30, 1):
        feed(model, cache, part)
        feed(model, alone, part)
        for layer in cache.layers:
            assert layer.lengths().tolist() == [[40, 40]] * 2
    assert cache.kv_bytes() < 0.5 * alone.kv_bytes()
    # 8 bits hardly move a score: nearly the same tokens are kept
    same = []
    for ours, true in zip(cache.layers, alone.layers, strict=True):
        kept = [x.held_positions().flatten(0, 1).tolist() for x in (ours, true)]
        same += [len(set(a) & set(b)) / 40 for a, b in zip(*kept, strict=True)]
    assert sum(same) / len(same) > 0.9


@pytest.mark.parametrize("expression", ["turboquant(2)", "adakv+turboquant(4)"])
def test_forgetting_and_keeping_never_make_bytes_grow(model_of, expression):
    model = model_of("llama")
    cache = MethodCache(model, expression, 0.6)
    feed(model, cache, tiny.text_ids(80, 2))
    held = [cache.kv_bytes()]
    for start in range(0, 80, 8):
        cache.forget([[(start, start + 3)], [(start + 1, start + 2)]])
        held.append(cache.kv_bytes())
    layer = cache.layers[0]
    layer.keep(torch.arange(0, layer.held_positions().shape[2], 2)[None, None].expand(2, 1, -1))
    held.append(cache.kv_bytes())
    assert all(now <= before for before, now in zip(held, held[1:], strict=False)), held
    assert held[-1] < 0.8 * held[0]


def test_all_that_was_decoded_can_be_taken_back_exactly(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache, other = (MethodCache(model, "turboquant(4)") for _ in range(2))
    for one in (cache, other):
        feed(model, one, ids[:, :50])
    for i in range(50, 70):
        feed(model, cache, ids[:, i : i + 1])
    cache.crop(-20)
    torch.testing.assert_close(feed(model, cache, ids[:, 70:71]), feed(model, other, ids[:, 70:71]))


@pytest.mark.parametrize("expression", ["turboquant(3)", "h2o+turboquant(4,2)", "adakv+turboquant(2)"])
def test_a_saved_cache_holds_the_same_bits_and_goes_on_alike(model_of, tmp_path, expression):
    model, ids = model_of("llama"), tiny.text_ids(90, 2)
    cache = MethodCache(model, expression, 0.5)
    feed(model, cache, ids[:, :70])
    feed(model, cache, ids[:, 70:71])
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    for ours, saved in zip(loaded.layers, cache.layers, strict=True):
        assert ours.tensors().keys() == saved.tensors().keys()
        assert all(torch.equal(x, saved.tensors()[name]) for name, x in ours.tensors().items())
    for part in ids[:, 71:].split([1, 1, 17], 1):
        assert torch.equal(feed(model, loaded, part), feed(model, cache, part))


def test_retrieval_heads_are_coded_and_streaming_heads_are_not(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "duo_attention(sparsity=0.5,sinks=4,recent=12)+turboquant(4)")
    feed(model, cache, tiny.text_ids(80, 2))
    for i in range(5):
        feed(model, cache, tiny.text_ids(1, 2, seed=i))
    kinds = {type(part.segment) for layer in cache.layers for part in layer.segments[0].parts}
    assert kinds == {CodedSegment, ChunkedRing}
    lengths = {int(x) for layer in cache.layers for x in layer.lengths().flatten()}
    assert lengths == {16, 85}


def test_no_decode_step_makes_a_tensor_as_large_as_a_layers_keys(model_of, monkeypatch):
    monkeypatch.setattr("textkv.kernels._coded_cpu._TILE", 2**12)
    model = model_of("llama")
    cache = MethodCache(model, "turboquant(4)")
    ids = tiny.text_ids(960)
    feed(model, cache, ids[:, :955])
    full, largest = 2 * 960 * 16 * 4, 0  # keys of one layer: heads, tokens, head_dim, fp32
    for i in range(955, 960):
        with Watch() as watch:
            feed(model, cache, ids[:, i : i + 1])
        largest = max(largest, watch.largest)
    assert 0 < largest < 0.4 * full, watch.name


@pytest.mark.parametrize(
    "expression",
    [
        "turboquant(3)",
        "h2o+turboquant(4)",
        "snapkv+turboquant(3)",
        "adakv+turboquant(4)",
        "turboquant(3,4,fit='least')",
    ],
)
def test_conforms(expression):
    assert {check.name for check in check_method(expression) if check.outcome != "passed"} <= LOSSY


# ---- keys with a bias ------------------------------------------------------------------------------------------------


def key_error(model, expression: str, ids) -> float:
    """Size of what the first layer's keys, as they are stored, lack."""
    true, cache = DynamicCache(), MethodCache(model, expression)
    feed(model, true, ids)
    feed(model, cache, ids)
    return float((cache.layers[0].stored().keys - true.layers[0].keys).norm())


def test_a_bias_that_turns_with_rope_costs_nothing_with_a_centre_that_does(model_of):
    ids = tiny.text_ids(90)
    plain, biased = model_of("qwen2"), evenly_biased(model_of("qwen2"), 200.0)
    unbiased = key_error(plain, "turboquant(4,centre='fixed')", ids)
    turned, fixed, none = (key_error(biased, f"turboquant(4,centre={c!r})", ids) for c in ("auto", "fixed", "none"))
    assert turned < 1.3 * unbiased < 0.5 * fixed and fixed < none, (unbiased, turned, fixed, none)


@pytest.mark.parametrize("expression", ["turboquant(4)", "h2o+turboquant(4)"])
def test_conforms_with_centres_that_turn(model_of, expression):
    check_method(expression, model=evenly_biased(model_of("qwen2"), 12.0))


def test_a_head_of_few_tokens_gets_no_centre(model_of):
    model = model_of("llama")
    for n, some in ((15, False), (16, True)):
        cache = MethodCache(model, "turboquant(4,centre='fixed')")
        feed(model, cache, tiny.text_ids(n))
        assert all(bool(layer.segments[0].centre.any()) is some for layer in cache.layers)


def test_under_mrope_the_centre_stands_still_or_is_refused(model_of):
    model = model_of("qwen2_5_vl")
    cache = MethodCache(model, "turboquant(4)")
    feed(model, cache, tiny.text_ids(40))
    assert cache.layers[0].segments[0].inv_freq is None
    cache = MethodCache(model, "turboquant(4,centre='turned')")
    with pytest.raises(ValueError, match=r"turn by three positions \(M-RoPE\); use centre='fixed'"):
        feed(model, cache, tiny.text_ids(40))


# ---- beside kivi, end to end -----------------------------------------------------------------------------------------


@once
def mini_case():
    """The embedded model, prompts with held-out facts [4, 480], and what its attention layers give for the last 32."""
    model, tokenizer = load_mini()
    prompts = [make_example("needle", 482, 10**6 + k, tokenizer).prompt_ids for k in range(4)]
    ids = torch.stack([torch.from_numpy(prompt) for prompt in prompts])
    return model, ids, outputs(model, ids, "full")[0]


def outputs(model, ids, expression: str) -> tuple[torch.Tensor, float]:
    """Attention outputs of all layers for the last 32 tokens, fed one by one; bits held per element."""
    use(model)
    cache, seen = MethodCache(model, expression), []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in model.model.layers
    ]
    feed(model, cache, ids[:, :-32])
    seen.clear()
    held = 32 * cache.kv_bytes() / cache.full_bytes()
    for i in range(ids.shape[1] - 32, ids.shape[1]):
        feed(model, cache, ids[:, i : i + 1])
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), held


@pytest.mark.parametrize(
    ("expression", "other", "most"),
    [
        ("turboquant(4)", "kivi(4)", 1.7),
        ("turboquant(3)", "kivi(2,group=32,channels=16)", 0.8),
        ("turboquant(2)", "kivi(2)", 1.2),
    ],
)
def test_attention_outputs_beside_kivi_at_as_many_bits(expression, other, most, capsys):
    """Heads of 32 channels: scales weigh more than in heads of 128; 448 tokens leave none in kivi's exact buffer."""
    model, ids, true = mini_case()
    error, bits = {}, {}
    for method in (expression, other):
        found, bits[method] = outputs(model, ids, method)
        error[method] = float((found - true).norm() / true.norm())
    with capsys.disabled():
        print("\n" + ", ".join(f"{method}: {bits[method]:.2f} bits, error {error[method]:.3f}" for method in error))
    assert bits[expression] < bits[other] + 0.1
    assert error[expression] < most * error[other]


@pytest.mark.parametrize(("expression", "budget"), [("turboquant(4)", None), ("h2o+turboquant(4)", 0.6)])
def test_the_embedded_model_still_finds_its_facts(expression, budget):
    model, tokenizer = load_mini()
    use(model)
    found = 0
    for seed in range(6):
        example = make_example("needle", 256, 10**6 + seed, tokenizer)
        prompt, wanted = torch.from_numpy(example.prompt_ids)[None], example.answer_ids
        length = {"max_new_tokens": len(wanted), "min_new_tokens": len(wanted), "do_sample": False}
        cache = MethodCache(model, expression, budget)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **length)
        found += out[0, prompt.shape[1] :].tolist() == list(wanted)
        assert cache.kv_bytes() < 0.25 * cache.full_bytes()
    assert found >= 5


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, message",
    [
        ("turboquant(9)", "bits=9 cannot be coded; use a number from 1 to 8"),
        ("turboquant(2.5)", "bits=2.5 is not a whole number"),
        ("turboquant(4,0)", "bits=0 cannot be coded"),
        ("turboquant(centre='mean')", "centre='mean' is not known; use 'auto', 'turned', 'fixed' or 'none'"),
        ("turboquant(fit='best')", "fit='best' is not known; use 'norm', 'plain', 'least' or 'unbiased'"),
        ("turboquant(seed=-1)", "seed=-1 is no seed; use a whole number from 0"),
        ("kivi(4)+turboquant(2)", "kivi has changed what it stores already; code only once"),
        ("turboquant(4)+kivi(2)", "turboquant has changed what it stores already"),
        ("streaming_llm+turboquant(4)", r"holds tokens in a way of its own.*e.g. h2o\+turboquant"),
        ("d2o+turboquant(4)", r"d2o\+turboquant: d2o holds tokens in a way of its own"),
        ("turboquant(4)+adakv", "adakv needs importance scores and turboquant gives none"),
    ],
)
def test_settings_and_pairs_that_cannot_be_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(method)


@pytest.mark.parametrize("value, found", [(float("nan"), "NaN or inf"), (float("inf"), "NaN or inf"), (1e6, r"1e\+06")])
def test_what_cannot_be_coded_names_layer_and_head(model_of, value, found):
    cache = MethodCache(model_of("llama"), "turboquant(4)")
    x = torch.randn(1, 2, 16, 16)
    bad = x.clone()
    bad[0, 1, 3, 2] = value
    layer = cache.layers[2]
    layer.lazy_initialization(x, x)
    with pytest.raises(ValueError, match=f"layer 2, row 0, head 1: the values hold .*{found}"):
        layer.feed(torch.randn(1, 4, 16, 16), x, bad, 0.25)


def test_what_a_pair_promises():
    alone, h2o = resolve_method("turboquant(4)"), resolve_method("h2o+turboquant(4)")
    assert alone.capabilities.lossy and alone.capabilities.crop and not alone.evicts
    assert h2o.capabilities.decode_eviction and not h2o.capabilities.crop and h2o.evicts
    assert resolve_method("turboquant(3,value_bits=4,seed=7)").expression == "turboquant(bits=3,value_bits=4,seed=7)"
    heads = resolve_method("adakv+turboquant").capabilities
    assert heads.per_head and heads.lossy and not heads.scores
