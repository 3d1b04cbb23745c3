"""The cache against transformers' own: every family, one and two turns, padding, beams, chunks, images, mix-ups."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import textkv
from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache
from textkv.conversation import Conversation

GREEDY = dict(do_sample=False, max_new_tokens=6)
FAMILIES = tiny.TEXT_FAMILIES + tiny.VISION_FAMILIES


def inputs_of(family: str, seed: int = 0):
    if family in tiny.TEXT_FAMILIES:
        return {"input_ids": tiny.text_ids(40, seed=seed)}, None
    return tiny.screens(3, seed=seed)


def switch(model, name: str):
    vision = hasattr(model.config, "vision_config")
    model.set_attn_implementation({"text_config": name} if vision else name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dynamic_cache(model_of, family, implementation):
    model = model_of(family)
    switch(model, implementation)
    inputs, spans = inputs_of(family)
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    expected = model.generate(**inputs, **options)
    for method, budget in [("full", None), ("snapkv", 1.0), ("adakv", 1.0), ("streaming_llm", 1.0)]:
        cache = MethodCache(model, method, budget)
        cache.begin(**inputs, spans=spans)
        ours = model.generate(**inputs, past_key_values=cache, **options)
        assert torch.equal(ours.sequences, expected.sequences)
        for a, b in zip(ours.logits, expected.logits, strict=True):
            assert not mismatch(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_two_turns_with_generate(model_of, family):
    model = model_of(family)
    first, more = tiny.text_ids(30), tiny.text_ids(9, seed=1)
    expected = model.generate(torch.cat([model.generate(first, **GREEDY), more], 1), **GREEDY)
    cache = MethodCache(model, "full")
    turn = model.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(torch.cat([turn, more], 1), past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "streaming_llm"])
def test_generate_gives_the_tokens_of_teacher_forcing(model_of, method):
    """Beams, padding and chunks go through `generate`; here: a padded batch row equals the row alone."""
    model = model_of("llama")
    ids, mask = tiny.text_ids(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :13] = 0
    ids[1, :13] = 0
    both = model.generate(ids, attention_mask=mask, past_key_values=MethodCache(model, method, 0.4), **GREEDY)
    for row, start in ((0, 0), (1, 13)):
        alone = model.generate(ids[row : row + 1, start:], past_key_values=MethodCache(model, method, 0.4), **GREEDY)
        assert torch.equal(both[row, 40:], alone[0, 40 - start :])


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "streaming_llm"])
def test_beams(model_of, method):
    model = model_of("qwen2")
    ids = tiny.text_ids(30, batch=2)
    beams = dict(do_sample=False, num_beams=3, max_new_tokens=6)
    out = model.generate(ids, past_key_values=MethodCache(model, method, 1.0), **beams)
    model_of("qwen2")
    assert torch.equal(out, model.generate(ids, **beams))


def test_chunked_prefill_of_generate(model_of):
    model = model_of("llama")
    ids = tiny.text_ids(50)
    cache, whole = MethodCache(model, "snapkv", 0.4), MethodCache(model, "snapkv", 0.4)
    cache.begin(ids)
    out = model.generate(ids, past_key_values=cache, prefill_chunk_size=16, **GREEDY)
    assert torch.equal(out, model.generate(ids, past_key_values=whole, **GREEDY))
    assert cache.at_rest.tokens_stored == 20


def test_prompt_lookup_decoding_takes_tokens_back(model_of):
    model = model_of("llama")
    ids = tiny.text_ids(12).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    out = model.generate(ids, past_key_values=MethodCache(model, "full"), prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_attention_is_one_clear_error(model_of, family):
    model = model_of(family)
    inputs, _ = inputs_of(family)
    cache = MethodCache(model, "snapkv", 0.4)
    switch(model, "sdpa")
    with pytest.raises(ValueError, match=r"runs attention 'sdpa'.*call textkv.use\(model\) first"):
        model(**inputs, past_key_values=cache)


def test_nothing_registered_is_replaced():
    names = ("sdpa", "eager", "flash_attention_2", "flex_attention")
    functions = {n: ALL_ATTENTION_FUNCTIONS[n] for n in names if n in ALL_ATTENTION_FUNCTIONS}
    assert all(f.__module__.startswith("transformers.") for f in functions.values())
    assert "textkv_sdpa" in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_the_vision_tower_keeps_its_attention(model_of, family):
    model = textkv.use(model_of(family))
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "textkv_sdpa"


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
def test_interleaved_conversations_equal_separate_ones(model_of, family, method):
    model = model_of(family)
    prompts = [tiny.screens(2, seed=1), tiny.screens(1, seed=2, text=9)]

    def run(turns):
        talks, last = [Conversation(model, method, 0.6) for _ in prompts], [None, None]
        for which, turn in turns:
            inputs, spans = prompts[which]
            inputs = dict(inputs)
            if turn:
                inputs["input_ids"] = torch.cat([last[which], tiny.text_ids(4, seed=turn)], 1)
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).long()
            last[which] = talks[which].generate(**inputs, spans=spans, **GREEDY)
        return last

    together = run([(0, 0), (1, 0), (0, 1), (1, 1)])
    apart = run([(0, 0), (0, 1), (1, 0), (1, 1)])
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_a_new_image_in_a_later_turn_equals_the_uncached_run(model_of, family):
    model = model_of(family)
    first, _ = tiny.screens(2, seed=3)
    talk = Conversation(model, "full")
    answer = talk.generate(**first, **GREEDY)
    second, _ = tiny.screens(1, seed=4)
    ids = torch.cat([answer, second["input_ids"]], 1)
    whole = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tiny.IMAGE).long(),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "image_grid_thw": torch.cat([first["image_grid_thw"], second["image_grid_thw"]]),
    }
    ours = talk.generate(**whole, **GREEDY)
    model = model_of(family)
    assert torch.equal(ours, model.generate(**whole, **GREEDY))


def test_what_changes_scores_in_an_unknown_way_is_refused(model_of):
    model = textkv.use(model_of("llama"))
    cache = MethodCache(model, "full")
    layer, q = model.model.layers[0].self_attn, torch.randn(1, 4, 9, 16)
    view, _ = cache.update(q[:, :2], q[:, :2], 0)
    ours = ALL_ATTENTION_FUNCTIONS["textkv_sdpa"]
    with pytest.raises(ValueError, match="passes position_bias to attention"):
        ours(layer, q, view, view, None, position_bias=torch.zeros(9, 9))
    with pytest.raises(ValueError, match="give the 2-D padding mask"):
        ours(layer, q, view, view, torch.ones(1, 4, 9, 9, dtype=torch.bool))


def test_transformers_own_cache_runs_on_our_attention(model_of):
    """A plain cache is longer than the queries in later turns: alignment must be bottom-right."""
    model = model_of("llama")
    ids = tiny.text_ids(30)

    def two_turns():
        plain = DynamicCache()
        with torch.no_grad():
            model(ids[:, :20], past_key_values=plain)
            return model(ids[:, 20:], past_key_values=plain).logits

    expected = two_turns()
    textkv.use(model)
    assert not mismatch(two_turns(), expected, atol=1e-5, rtol=0)


def test_right_padding_is_refused(model_of):
    model = model_of("llama")
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 7:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model(tiny.text_ids(10, batch=2), attention_mask=mask, past_key_values=MethodCache(model, "full"))


def test_spans_are_checked(model_of):
    cache = MethodCache(model_of("llama"), "full")
    for spans in ([(5, 5)], [(0, 4), (3, 8)], [(8, 12)], [(-1, 3)]):
        with pytest.raises(ValueError, match="must lie in"):
            cache.begin(tiny.text_ids(10), spans=[spans])
    cache.begin(tiny.text_ids(10), spans=[[(4, 8)]], attention_mask=torch.tensor([[0, 0] + [1] * 8]))
    assert cache.spans == [[(2, 6)]]


def test_report_counts_what_is_held(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "adakv", 0.5)
    model.generate(tiny.text_ids(40), past_key_values=cache, **GREEDY)
    report = cache.report()
    assert report.kv_bytes == sum(row["bytes"] for row in report.rows) == cache.kv_bytes()
    assert report.full_bytes == 3 * 2 * 2 * 45 * 16 * 4
    assert all(row["seen"] == 45 and sum(row["stored"]) == 2 * (20 + 5) for row in report.rows)
    assert {"on_prefill_end", "on_decode_end"} <= set(report.seconds)
    assert "adakv at budget 0.5" in str(report) and report.peak_bytes > cache.at_rest.kv_bytes


@pytest.mark.parametrize("method", ["adakv", "snapkv", "kivi(4)"])
def test_a_count_of_drafts_may_be_a_tensor(model_of, method):
    """As in transformers 5.17, which counts accepted drafts in one."""
    model, ids, answers = model_of("llama"), tiny.text_ids(60), []
    for count in (-2, torch.tensor(-2)):
        cache = MethodCache(model, method, 0.5)
        with torch.no_grad():
            for part in (ids[:, :40], ids[:, 40:41], ids[:, 41:42], ids[:, 42:43]):
                model(part, past_key_values=cache)
            cache.crop(count)
            answers.append(model(ids[:, 41:60], past_key_values=cache).logits)
    assert torch.equal(*answers)


@pytest.mark.parametrize("method", ["snapkv+mikv(16,2)", "kivi(4)"])
def test_tokens_are_taken_back_after_some_were_forgotten_under_inference_mode(model_of, method):
    model, ids, answers = model_of("llama"), tiny.text_ids(60), []
    for within in (torch.inference_mode, torch.no_grad):
        cache = MethodCache(model, method, 0.5)
        with within():
            model(ids[:, :40], past_key_values=cache)
            cache.forget([[(5, 9)]])
        with torch.no_grad():
            model(ids[:, 40:41], past_key_values=cache)
            model(ids[:, 41:42], past_key_values=cache)
            cache.crop(-1)
            answers.append(model(ids[:, 41:42], past_key_values=cache).logits)
    assert torch.equal(*answers)
