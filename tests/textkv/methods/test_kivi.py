"""KIVI: when tokens are packed, what stays exact, what a step makes in memory, keys with a bias, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache, resolve_method
from textkv.conformance import CHECKS, check_method
from textkv.kernels import decode_attention, pack
from textkv.kernels.pack import unpack
from textkv.methods.kivi import Kivi
from textkv.segments.block_pool import blocks_of
from textkv.segments.dense import DenseSegment
from textkv.segments.packed import PackedSegment

SMALL = "group=16,residual=16"


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


def packed_and_exact(cache) -> tuple[int, int]:
    """Tokens of the first layer's first head in packed segments and beside them."""
    split = [0, 0]
    for segment in cache.layers[0].segments:
        split[not isinstance(segment, PackedSegment)] += int(segment.lengths()[0, 0])
    return tuple(split)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 67])
def test_whole_multiples_of_the_residual_are_packed_at_the_prompt_and_at_each_full_buffer(model_of, n):
    model = model_of("llama")
    cache = MethodCache(model, "kivi(2,group=16,residual=32)")
    feed(model, cache, tiny.text_ids(n))
    assert packed_and_exact(cache) == (n - n % 32, n % 32)
    for step in range(1, 65):
        feed(model, cache, tiny.text_ids(1, seed=step))
        assert packed_and_exact(cache) == (n + step - (n + step) % 32, (n + step) % 32)
    assert cache.get_seq_length() == n + 64
    assert cache.kept_positions(0)[0, 0].tolist() == list(range(n + 64))


def test_codes_are_those_of_the_formula():
    keys, values = torch.randn(3, 32, 24), torch.randn(3, 32, 24)
    k, v = Kivi(2, group=16, residual=16).encode(keys, values, torch.tensor([32, 32, 32]), prompt=True)
    tokens = keys.view(6, 16, 24)
    low = tokens.amin(1, keepdim=True).half().float()
    step = ((tokens.amax(1, keepdim=True) - low) / 3).half().float()
    assert not mismatch(unpack(k), ((tokens - low) / step).round().clamp(0, 3) * step + low)
    assert k.scale.shape == (6, 1, 24) and v.scale.shape == (6, 16, 1)


def test_the_prompt_is_read_exactly_and_eight_bits_decode_almost_exactly(model_of):
    model, ids = model_of("llama"), tiny.text_ids(120, 2)
    plain = DynamicCache()
    expected = [feed(model, plain, part) for part in ids.split([100, 1, 1, 1, 17], 1)]
    cache = MethodCache(model, f"kivi(8,{SMALL})")
    ours = [feed(model, cache, part) for part in ids.split([100, 1, 1, 1, 17], 1)]
    assert not mismatch(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    for mine, true in zip(ours[1:], expected[1:], strict=True):
        assert 1e-5 < float((mine - true).abs().max()) < 0.05


def test_decoding_attends_to_packed_and_exact_tokens_as_one(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"kivi(2,{SMALL})")
    feed(model, cache, tiny.text_ids(75))
    layer, q = cache.layers[0], torch.randn(1, 4, 1, 16)
    x = torch.randn(1, 2, 1, 16)
    out = layer.feed(q, x, x, 0.25)
    held = layer.stored()
    true, _ = decode_attention(q, held.keys, held.values, scale=0.25, valid=held.positions >= 0)
    assert not mismatch(out, true, rtol=1e-5, atol=1e-5)


def test_what_is_packed_stays_through_later_turns(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"kivi(4,{SMALL})")
    feed(model, cache, tiny.text_ids(40))
    first = cache.layers[1].segments[0].pools[0]
    codes = [first.k.codes[start : start + n // 16] for start, n in zip(first.start, first.length, strict=True)]
    feed(model, cache, tiny.text_ids(50, seed=1))
    for i in range(20):
        feed(model, cache, tiny.text_ids(1, seed=i))
    (pool,) = cache.layers[1].segments[0].pools
    assert all(torch.equal(pool.k.codes[at : at + len(x)], x) for at, x in zip(pool.start, codes, strict=True))
    assert packed_and_exact(cache) == (96, 14)


def test_crop_takes_back_what_the_buffer_still_holds(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache, other = (MethodCache(model, f"kivi(4,{SMALL})") for _ in range(2))
    for one in (cache, other):
        feed(model, one, ids[:, :40])  # 32 packed, 8 exact
    for i in range(5):
        feed(model, cache, ids[:, 40 + i : 41 + i])
    cache.crop(-5)
    assert not mismatch(feed(model, cache, ids[:, 50:51]), feed(model, other, ids[:, 50:51]))
    cache.crop(-9)
    with pytest.raises(ValueError, match="can take back only the 0 tokens"):
        cache.crop(-1)


def test_a_padded_batch_packs_each_row_by_its_own_length(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"kivi(4,{SMALL})")
    ids, mask = tiny.text_ids(50, 2), torch.ones(2, 50).long()
    mask[1, :13] = 0
    feed(model, cache, ids, mask)
    packed, buffer = cache.layers[0].segments
    assert packed.lengths().tolist() == [[48, 48], [32, 32]] and buffer.lengths().tolist() == [[2, 2], [5, 5]]
    assert cache.kept_positions(0)[1, 0].sort().values[-37:].tolist() == list(range(37))


class Watch(TorchDispatchMode):
    """Notes the most bytes of any tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.name = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                size = x.numel() * x.element_size()
                if size > self.largest:
                    self.largest, self.name = size, str(function)
        return result


@pytest.mark.parametrize("method", ["kivi(4)", "gear(2)"])
def test_no_decode_step_makes_a_tensor_as_large_as_a_layers_keys(model_of, method, small_tiles):
    model = model_of("llama")
    cache = MethodCache(model, method)
    ids = tiny.text_ids(960)
    feed(model, cache, ids[:, :955])
    full = 2 * 960 * 16 * 4  # keys of one layer: heads, tokens, head_dim, fp32
    largest = 0
    for i in range(955, 960):  # flushes once, at the end
        with Watch() as watch:
            feed(model, cache, ids[:, i : i + 1])
        largest = max(largest, watch.largest)
    assert packed_and_exact(cache) == (960, 0)
    assert 0 < largest < 0.4 * full, watch.name
    assert cache.peak_bytes < 0.6 * cache.full_bytes()  # nor did the prompt hold more than one of 3 layers in full


def test_bytes_are_those_of_the_formula_and_nothing_else_is_kept(model_of):
    model = model_of("llama")  # head_dim 16: values share a scale over 16 channels, keys over 64 tokens
    cache = MethodCache(model, "kivi(4)")
    feed(model, cache, tiny.text_ids(640))
    elements = 2 * 640 * 16  # a layer's keys, and as many values
    keys, values = elements * (4 + 32 / 64) / 8, elements * (4 + 32 / 16) / 8
    extra = 640 * 4 + 2 * 16 * 4 + 2 * 12  # positions, shared by the heads; the centre; bounds of the runs
    assert cache.layers[0].kv_bytes() == keys + values + extra
    assert cache.kv_bytes() == 3 * (keys + values + extra)


def test_no_storage_is_larger_than_what_lies_in_it(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"kivi(4,{SMALL})")
    feed(model, cache, tiny.text_ids(75))
    for x in cache.layers[0].tensors().values():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize(
    "method", ["kivi(4)", f"kivi(2,{SMALL})", f"adakv+kivi(4,{SMALL})", f"duo_attention+kivi(4,{SMALL})"]
)
def test_conforms(method):
    skipped = {check.name for check in check_method(method) if check.outcome != "passed"}
    declared = {
        "full_budget_equals_full_cache",  # codes are not the numbers
        "equals_masked_full_attention",  # its oracle reads the exact numbers
        "forgotten_tokens_are_gone",  # its oracle too
    }
    if not resolve_method(method).capabilities.crop:
        declared.add("crop_or_refusal")  # streaming heads have dropped what a crop would bring back
    assert skipped == declared


# ---- keys with a bias ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerToken(Kivi):
    """The wrong axis for keys, and no centre: what other caches do by default."""

    centre: str = "none"

    def encode(self, keys, values, counts, prompt, heads):
        k, v = (blocks_of(x, counts, self.group) for x in (keys, values))
        return pack(k, self.bits, layout="token"), pack(v, self.bits, layout="token")


def biased(model, size: float):
    """The model with a key bias of this norm per layer on the slowest rotary frequencies."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = torch.zeros(2, 2, 8)  # heads, halves, frequencies
            bias[..., 6:] = torch.randn(2, 2, 2, generator=generator)
            layer.self_attn.k_proj.bias.copy_(bias.flatten() * size / bias.norm())
    return model


def test_a_large_key_bias_leaves_four_bits_as_good_as_without_it(model_of):
    model = biased(model_of("qwen2"), 300.0)
    ids = tiny.text_ids(170)
    plain = DynamicCache()
    expected = torch.cat([feed(model, plain, part) for part in ids.split([128] + [1] * 42, 1)], 1)[:, 128:]

    def error(method) -> float:
        cache = MethodCache(model, method)
        ours = torch.cat([feed(model, cache, part) for part in ids.split([128] + [1] * 42, 1)], 1)[:, 128:]
        return float((ours - expected).norm() / expected.norm())

    ours, wrong_axis = error(Kivi(4, group=16, residual=16)), error(PerToken(4, group=16, residual=16))
    assert ours < 0.2 and ours < 0.4 * wrong_axis, (ours, wrong_axis)


def test_the_centre_is_exact_in_the_scores_and_saves_what_float16_would_lose():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 64, 16) + 20000.0, torch.randn(1, 2, 64, 16)
    q = torch.randn(1, 2, 1, 16) * 0.3
    true, true_lse = decode_attention(q.double().float(), keys, values, scale=0.25)

    def attend(centre):
        segment = PackedSegment(torch.float32, keys.mean(2) if centre else None)
        centred = keys - (segment.centre[:, :, None] if centre else 0)
        counts = torch.full((1, 2), 64)
        packed = Kivi(8).encode(centred.flatten(0, 1), values.flatten(0, 1), counts.view(-1), True)
        segment.take(*packed, counts, torch.arange(64).int()[None, None])
        return segment.attend(q, 0.25)

    (with_centre, lse), (without, _) = attend(True), attend(False)
    assert float((with_centre - true).abs().max()) < 0.02 < float((without - true).abs().max())
    assert not mismatch(lse, true_lse, rtol=1e-4, atol=1e-2)


def evenly_biased(model, size: float, head: int | None = None):
    """The model with a key bias of this norm per layer on all channels, or on those of one KV head."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = torch.randn(2, 16, generator=generator)
            if head is not None:
                bias[1 - head] = 0
            layer.self_attn.k_proj.bias.copy_(bias.flatten() * size / bias.norm())
    return model


def centres_turn(cache) -> list[list[list[bool]]]:
    """Per layer and row, which heads' centres turn."""
    segments = [layer.segments[0] for layer in cache.layers]
    still = torch.zeros(segments[0].lengths().shape, dtype=torch.bool)
    return [(still if x.inv_freq is None else x.inv_freq.any(-1)).tolist() for x in segments]


def test_a_centre_turns_in_the_heads_whose_keys_have_a_bias_on_fast_frequencies(model_of):
    plain, ids = model_of("qwen2"), tiny.text_ids(60, 2)
    both, one = evenly_biased(plain, 30.0), evenly_biased(plain, 30.0, head=1)
    cases = ((plain, "auto", [False, False]), (both, "auto", [True, True]), (one, "auto", [False, True]),
             (plain, "turned", [True, True]), (both, "fixed", [False, False]))  # fmt: skip
    for model, centre, turns in cases:
        cache = MethodCache(model, f"kivi(4,{SMALL},centre={centre!r})")
        feed(model, cache, ids)
        assert centres_turn(cache) == [[turns] * 2] * 3
        names = set(cache.layers[0].segments[0].tensors())
        assert ("inv_freq" in names) == any(turns) and "centre" in names
    cache = MethodCache(both, f"kivi(4,{SMALL},centre='none')")
    feed(both, cache, ids)
    assert not {"inv_freq", "centre"} & set(cache.layers[0].segments[0].tensors())


@pytest.mark.parametrize("method", ["kivi(4,{})", "gear(2,{})", "adakv+kivi(4,{})", "duo_attention+kivi(4,{})"])
def test_turned_centres_leave_as_small_an_error_as_no_bias(model_of, method):
    """Compared are keys as they are stored: the scores of a biased model are another model's."""
    ids, errors = tiny.text_ids(90), {}
    for name, size in (("plain", 0.0), ("biased", 200.0)):
        model = evenly_biased(model_of("qwen2"), size)
        caches = [MethodCache(model, method.format(f"{SMALL},centre={c!r}"), 0.6) for c in ("auto", "fixed")]
        true = DynamicCache()
        feed(model, true, ids)
        for cache, centre in zip(caches, ("auto", "fixed"), strict=True):
            feed(model, cache, ids)
            held = cache.layers[0].stored()
            real = held.positions >= 0
            at = held.positions.clamp(min=0).long()[..., None].expand(held.keys.shape)
            error = (held.keys - true.layers[0].keys.gather(2, at))[real]
            errors[name, centre] = float(error.norm() / real.sum() ** 0.5)
    assert errors["biased", "auto"] < 1.25 * errors["plain", "fixed"] < 0.3 * errors["biased", "fixed"], errors


@pytest.mark.parametrize("method", [f"kivi(4,{SMALL})", f"adakv+kivi(4,{SMALL})"])
def test_conforms_with_centres_that_turn(model_of, method):
    """Rows that are padded, moved, forked, cropped and saved keep their turned centres."""
    assert len(check_method(method, model=evenly_biased(model_of("qwen2"), 12.0))) == len(CHECKS)


def test_where_it_is_not_known_how_keys_turn_the_centre_stays_fixed_or_is_refused(model_of):
    changing = evenly_biased(model_of("qwen2"), 30.0)
    changing.model.rotary_emb.rope_type = "dynamic"
    odd = copy.deepcopy(model_of("qwen2_5_vl"))
    odd.config.text_config.rope_parameters["mrope_section"] = [2, 3, 2]
    cases = ((changing, "rope type 'dynamic' changes its frequencies"), (odd, "an axis for 7 frequencies, .* has 8"))
    for model, reason in cases:
        cache = MethodCache(model, f"kivi(4,{SMALL})")
        feed(model, cache, tiny.text_ids(40))
        assert centres_turn(cache) == [[[False, False]]] * 3
        cache = MethodCache(model, f"kivi(4,{SMALL},centre='turned')")
        with pytest.raises(ValueError, match=rf"kivi\(centre='turned'\) cannot follow.*{reason}.*use centre='fixed'"):
            feed(model, cache, tiny.text_ids(40))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, message",
    [
        ("kivi(3)", "bits=3 cannot be packed; use 2, 4, 8 or 'fp8'"),
        ("kivi(4,group=20)", "a group of 20 tokens cannot be packed; use a multiple of 16 up to 128"),
        ("kivi(4,residual=100)", "residual=100 is no multiple of group=64; use 128"),
        ("kivi(4,residual=0)", "residual=0 is no multiple of group=64; use 64"),
        ("kivi(4,channels=0)", "channels=0: a group needs at least 1 channel"),
        ("kivi(4,centre=True)", "centre=True is not a text in quotes"),
        ("kivi(4)+kivi(2)", "kivi has changed what it stores already"),
        ("streaming_llm+kivi(4)", r"evicts or merges at every decoded token.*e.g. snapkv\+kivi"),
        ("window+kivi(4)", r"window\+kivi: window evicts or merges at every decoded token"),
        ("d2o+kivi(4)", r"d2o\+kivi: d2o evicts or merges at every decoded token"),
        ("lacache+kivi(4)", r"lacache\+kivi"),
        ("kivi(4)+adakv", "adakv needs importance scores and kivi gives none"),
    ],
)
def test_settings_and_pairs_that_cannot_be_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(method)


def test_a_channel_group_that_does_not_fit_the_model_is_refused_at_the_first_token(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "kivi(4,channels=12)")
    with pytest.raises(ValueError, match="a group of 12 channels does not divide head_dim 16; use 16"):
        feed(model, cache, tiny.text_ids(5))


@pytest.mark.parametrize("value, found", [(float("nan"), "NaN or inf"), (float("inf"), "NaN or inf"), (1e6, r"1e\+06")])
def test_keys_that_cannot_be_packed_name_layer_and_head(model_of, value, found):
    cache = MethodCache(model_of("llama"), f"kivi(4,{SMALL})")
    x = torch.randn(1, 2, 16, 16)
    bad = x.clone()
    bad[0, 1, 3, 2] = value
    with pytest.raises(ValueError, match=f"layer 2, row 0, head 1: the keys hold .*{found}"):
        layer = cache.layers[2]
        layer.lazy_initialization(x, x)
        layer.feed(torch.randn(1, 4, 16, 16), bad, x, 0.25)


def test_an_empty_buffer_is_a_dense_segment_that_takes_tokens(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"kivi(4,{SMALL})")
    feed(model, cache, tiny.text_ids(32))
    buffer = cache.layers[0].segments[1]
    assert isinstance(buffer, DenseSegment) and buffer.lengths().tolist() == [[0, 0]]
    assert buffer.k.untyped_storage().nbytes() == 0
    feed(model, cache, tiny.text_ids(1))
    assert cache.layers[0].segments[1].lengths().tolist() == [[1, 1]]
