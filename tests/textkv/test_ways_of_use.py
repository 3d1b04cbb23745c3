"""Ways in which people run models: half precision, inference mode, drafts, interruptions, wrong models."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from tests.compare import mismatch
from tests.textkv import kinds, tiny
from textkv import MethodCache

GREEDY = dict(do_sample=False, max_new_tokens=12)
CROPPING = [
    ("full", None), ("snapkv", 0.4), ("adakv", 0.4), ("kivi(4)", None), ("pyramidkv", 0.5), ("snapkv+minicache", 0.4),
]  # fmt: skip


def model_alike(implementation: str = "eager"):
    """A model of its own for tests that change it."""
    torch.manual_seed(0)
    model = deepcopy(kinds.model_of_kind("dense"))
    model.set_attn_implementation(implementation)
    return model


def talk(model, cache, seed: int = 0):
    """A prompt, two steps, a second turn and one more step."""
    parts = kinds.ids(60, seed=seed).split((44, 1, 1, 13, 1), 1)
    return torch.cat([kinds.logits(model, part, cache) for part in parts], 1)


# ---- precision ---------------------------------------------------------------------------------------------------


def test_float64_is_refused_when_the_cache_is_built():
    with pytest.raises(ValueError, match=r"computes in float64.*use model.float\(\)"):
        MethodCache(model_alike().double())


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
def test_autocast(kind, method, budget):
    model = kinds.model_of_kind(kind)
    exact = talk(model, MethodCache(model, "full"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = MethodCache(model, method, budget)
        out = talk(model, cache)
        reference = talk(model, MethodCache(model, "full"))
    assert bool(out.isfinite().all())
    assert float((reference - exact).abs().mean()) < 0.1
    if method == "full":
        assert cache.kv_bytes() < 1.5 * cache.full_bytes()


@pytest.mark.parametrize("how", ["half", "bfloat16"])
@pytest.mark.parametrize(("method", "budget"), [*kinds.METHODS, ("expected", 0.4), ("tri_attention", 0.4)])
def test_another_precision_after_loading_and_after_building_a_cache(method, budget, how):
    model = model_alike()
    early = MethodCache(model, method, budget)
    getattr(model, how)()
    out = talk(model, early)
    fresh = talk(model, MethodCache(model, method, budget))
    assert bool(out.isfinite().all()) and out.dtype == model.dtype
    assert torch.equal(out, fresh)  # tables of frequencies are rounded with the model


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
@pytest.mark.parametrize("inference_first", [True, False])
def test_inference_mode_and_no_grad_in_turns(kind, method, budget, inference_first):
    model = kinds.model_of_kind(kind)
    expected = talk(model, MethodCache(model, method, budget))
    cache, out = MethodCache(model, method, budget), []
    for i, part in enumerate(kinds.ids(60).split((44, 1, 1, 13, 1), 1)):
        within = torch.inference_mode if (i % 2 == 0) == inference_first else torch.no_grad
        with within():
            out.append(model(part, past_key_values=cache).logits.clone())
    assert not mismatch(torch.cat(out, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
def test_backward_is_one_clear_error(kind, method, budget):
    """A forget no_grad around inference does no harm; a backward pass says what it cannot do."""
    model = kinds.model_of_kind(kind)
    cache = MethodCache(model, method, budget)
    out = [model(part, past_key_values=cache).logits for part in kinds.ids(60).split((44, 1, 1, 13, 1), 1)]
    assert not mismatch(
        torch.cat([x.detach() for x in out], 1), talk(model, MethodCache(model, method, budget)), atol=1e-5, rtol=0
    )
    with pytest.raises(RuntimeError, match="no gradients flow through a cache"):
        out[0].sum().backward()
    assert not any(x.requires_grad for layer in cache.context.layers for x in layer.tensors().values())


# ---- places ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "snapkv", "streaming_llm", "expected", "tri_attention"])
def test_a_model_whose_layers_lie_on_disk(method, tmp_path):
    """accelerate's hooks fetch a layer for its forward, and hand on copies of what a call passes down."""
    accelerate = pytest.importorskip("accelerate")
    model = kinds.model_of_kind("dense")
    expected = model.generate(kinds.ids(20), **GREEDY)
    places = {"model.layers.1": "disk", "model.layers.2": "disk"}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    away = accelerate.dispatch_model(deepcopy(model), places, main_device="cpu", offload_dir=tmp_path)
    cache = MethodCache(away, method, 1.0)
    assert torch.equal(away.generate(kinds.ids(20), past_key_values=cache, **GREEDY), expected)


# ---- wrappers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "budget"), [("full", None), ("snapkv", 0.4), ("streaming_llm", 0.4)])
def test_a_compiled_model(method, budget):
    model = model_alike()
    expected = talk(model, MethodCache(model, method, budget))
    compiled = torch.compile(model, backend="eager")
    assert not mismatch(talk(compiled, MethodCache(compiled, method, budget)), expected, atol=1e-5, rtol=0)
    assert not mismatch(talk(compiled, MethodCache(model, method, budget)), expected, atol=1e-5, rtol=0)


def test_a_model_under_lora():
    peft = pytest.importorskip("peft")
    model = model_alike()
    plain = talk(model, MethodCache(model, "snapkv", 0.4))
    torch.manual_seed(0)
    adapter = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapter).eval()
    ours, full = (talk(wrapped, MethodCache(wrapped, name, share)) for name, share in (("snapkv", 0.4), ("full", None)))
    assert mismatch(ours, plain, atol=1e-3, rtol=0)  # the adapter does change the answers
    expected = talk(wrapped.merge_and_unload(), DynamicCache())
    assert not mismatch(full, expected, atol=1e-5, rtol=0) and ours.isfinite().all()


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_generate_of_a_model_under_lora_sees_its_pictures_and_ids(family):
    """PEFT's own `generate` calls the model inside past the wrapper: what is looked at in a call is seen there too."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(deepcopy(tiny.build(family)), adapter).eval()
    inputs, spans = tiny.screens(2)
    expected = model.generate(**inputs, **GREEDY)
    cache = MethodCache(model, "sentence_kv(ends=(5, 50))", 1.0)
    cache.begin(**inputs, spans=spans)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), expected)
    with pytest.raises(ValueError, match="asks where the screenshots of a prompt lie"):
        model.generate(**inputs, past_key_values=MethodCache(model, "gui-kv", 0.4), **GREEDY)


@pytest.mark.parametrize("wrapper", ["peft", "compile"])
def test_generate_of_a_wrapped_model_goes_back_to_where_a_call_began(wrapper):
    """Of a model with linear states, whose layers cannot tell how far a call came."""
    model = deepcopy(kinds.model_of_kind("hybrid"))
    if wrapper == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    else:
        wrapped = torch.compile(model, backend="eager")
    expected = wrapped.generate(kinds.ids(20), past_key_values=MethodCache(wrapped, "full"), **GREEDY)
    cache = MethodCache(wrapped, "full")

    def stop(*args):
        raise Interruption

    for module in (model.model.layers[2], model.lm_head):
        handle = module.register_forward_hook(stop)
        with pytest.raises(Interruption):
            wrapped.generate(kinds.ids(20), past_key_values=cache, **GREEDY)
        handle.remove()
    assert torch.equal(wrapped.generate(kinds.ids(20), past_key_values=cache, **GREEDY), expected)


def test_a_learned_prompt_is_read_and_learned_keys_are_refused():
    peft = pytest.importorskip("peft")
    ids, options = kinds.ids(20), {"max_new_tokens": 6, "do_sample": False}
    prompted = peft.get_peft_model(model_alike(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    prompted.eval()
    expected = prompted.generate(input_ids=ids, **options)
    cache = MethodCache(prompted, "full")
    assert torch.equal(prompted.generate(input_ids=ids, past_key_values=cache, **options), expected)
    prefixed = peft.get_peft_model(model_alike(), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the adapter is PREFIX_TUNING.*use an adapter of weights, such as LoRA"):
        MethodCache(prefixed, "full")


# ---- drafts ------------------------------------------------------------------------------------------------------


def assistant():
    """A worse copy: some of its drafts are taken and some are not."""
    torch.manual_seed(1)
    model = deepcopy(kinds.model_of_kind("dense"))
    with torch.no_grad():
        for weight in model.model.layers[2].parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    model.generation_config.num_assistant_tokens = 4
    return model


@pytest.mark.parametrize(("method", "budget"), CROPPING)
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_drafts_equal_plain_greedy_decoding(method, budget, how):
    if how == "assistant" and method == "snapkv+minicache":
        pytest.xfail(
            "the first drafts come in the prompt's own forward; a layer merges with the next one, which they have not "
            "reached yet, so what the first layer shall show them does not exist when they are there"
        )
    model = kinds.model_of_kind("dense")
    # Without a token that comes twice nothing can be looked up before the prompt is in.
    prompt = torch.randperm(99, generator=torch.Generator().manual_seed(2))[None, :51] + 1
    options = GREEDY | ({"assistant_model": assistant()} if how == "assistant" else {"prompt_lookup_num_tokens": 3})
    plain, drafted = MethodCache(model, method, budget), MethodCache(model, method, budget)
    expected = model.generate(prompt, past_key_values=plain, **GREEDY)
    drafted.begin(prompt)  # says where the prompt ends and the first drafts begin
    assert torch.equal(model.generate(prompt, past_key_values=drafted, **options), expected)
    more = torch.cat([expected, tiny.text_ids(6, seed=3)], 1)  # and a further turn goes on from the same state
    drafted.begin(more)  # says that no draft comes next, but a prompt
    again = model.generate(more, past_key_values=drafted, **GREEDY)
    assert torch.equal(again, model.generate(more, past_key_values=plain, **GREEDY))


@pytest.mark.parametrize(
    "method", ["h2o", "tova", "streaming_llm", "lacache", "duo_attention", "d2o", "cake", "tri_attention", "rkv"]
)
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_who_evicts_while_decoding_refuses_drafts_at_once(method, how):
    model = kinds.model_of_kind("dense")
    options = GREEDY | ({"assistant_model": assistant()} if how == "assistant" else {"prompt_lookup_num_tokens": 3})
    cache = MethodCache(model, method, 0.4)
    with pytest.raises(ValueError, match="cannot take drafts back"):
        model.generate(tiny.text_ids(17).repeat(1, 3), past_key_values=cache, **options)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_drafts_into_a_cache_that_is_filled_already(how):
    """transformers feeds the whole prompt again, into any cache: here that is an error instead of tokens twice."""
    model, cache, prompt = (
        kinds.model_of_kind("dense"),
        MethodCache(kinds.model_of_kind("dense"), "snapkv", 0.4),
        kinds.ids(50),
    )
    kinds.logits(model, prompt[:, :-1], cache)
    options = GREEDY | ({"assistant_model": assistant()} if how == "assistant" else {"prompt_lookup_num_tokens": 3})
    with pytest.raises(ValueError, match="give it an empty cache"):
        model.generate(prompt, past_key_values=cache, **options)
    assert cache.get_seq_length() == 49


@pytest.mark.parametrize("method", ["snapkv+mikv(16,4)", "mikv", "h2o+adakv", "tri_attention+adakv"])
def test_who_reads_all_queries_of_a_prompt_says_so(method):
    model = kinds.model_of_kind("dense")
    with pytest.raises(ValueError, match="reads all queries of a prompt|cannot take drafts back"):
        model.generate(
            tiny.text_ids(17).repeat(1, 3),
            past_key_values=MethodCache(model, method, 0.4),
            prompt_lookup_num_tokens=3,
            **GREEDY,
        )


# ---- interruptions -----------------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


def interrupted(model, at: int | str, part, cache) -> None:
    """One forward that stops behind a layer, or in the head when all layers are through."""
    module = model.lm_head if at == "head" else model.model.layers[at]

    def stop(*args):
        raise Interruption

    handle = module.register_forward_hook(stop)
    try:
        with pytest.raises(Interruption):
            kinds.logits(model, part, cache)
    finally:
        handle.remove()


STOPS = [(at, when) for at in (0, 1) for when in (0, 1, 3)] + [("head", 0), ("head", 3)]
"""Behind which layer, and in which forward: the prompt, a step, a second turn."""


@pytest.mark.parametrize(("at", "when"), STOPS)
@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), [*kinds.METHODS, ("cake", 0.4), ("d2o", 0.4), ("pyramidkv", 0.5)])
def test_a_forward_that_stopped_half_way_and_comes_again(method, budget, kind, at, when):
    """Right, or refused: never are tokens there twice."""
    model = kinds.model_of_kind(kind)
    expected, cache, out = talk(model, MethodCache(model, method, budget)), MethodCache(model, method, budget), []
    for i, part in enumerate(kinds.ids(60).split((44, 1, 1, 13, 1), 1)):
        if i == when:
            interrupted(model, at, part, cache)
        try:
            out.append(kinds.logits(model, part, cache))
        except ValueError as error:
            assert "stopped" in str(error) and "\n" not in str(error)
            cache.reset()  # what the message advises works
            assert not mismatch(talk(model, cache), expected, atol=1e-4, rtol=0)
            return
    assert not mismatch(torch.cat(out, 1), expected, atol=2e-4, rtol=0)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("at", [1, "head"])
@pytest.mark.parametrize("method", ["snapkv", "expected", "pyramidkv", "vatp", "kvcrush"])
def test_a_chunk_of_a_prompt_that_stopped_and_comes_again(method, at):
    """What the chunk's queries saw is counted once."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(60)
    whole, torn = MethodCache(model, method, 0.4), MethodCache(model, method, 0.4)
    for cache in (whole, torn):
        cache.begin(ids)
        for i, part in enumerate(ids.split((30, 20, 10), 1)):
            if cache is torn and i == 1:
                interrupted(model, at, part, cache)
            kinds.logits(model, part, cache)
    for a, b in zip(whole.context.layers, torn.context.layers, strict=True):
        assert torch.equal(a.held_positions(), b.held_positions())


# ---- rows, and wrong models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["streaming_llm", "streaming_llm(positions='original')", "lacache", "duo_attention"])
@pytest.mark.parametrize("row", [0, 1])
def test_a_row_goes_on_alone_after_the_batch(method, row):
    """Rows of 300 and 30 tokens: the short one's window is smaller, and the long one's ring has shrunk by then."""
    model = kinds.model_of_kind("dense")
    ids, mask = kinds.ids(300, 2), torch.ones(2, 300, dtype=torch.int64)
    mask[1, :270] = 0
    both, alone, one = MethodCache(model, method, 0.4), MethodCache(model, method, 0.4), slice(row, row + 1)
    kinds.logits(model, ids, both, mask)
    kinds.logits(model, ids[one, 270 * row :], alone)
    both.batch_select_indices(torch.tensor([row]))
    new, mask = kinds.ids(140, seed=4), mask[one]
    ours, expected = kinds.steps(model, new, both, mask), kinds.steps(model, new, alone)
    assert not mismatch(ours, expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
def test_a_cache_on_another_model_of_the_same_shape(method, budget):
    model, other = kinds.model_of_kind("dense"), model_alike()
    MethodCache(other, method, budget)
    cache = MethodCache(model, method, budget)
    with pytest.raises(ValueError, match="built for another model"):
        kinds.logits(other, kinds.ids(20), cache)
    assert not mismatch(talk(model, cache), talk(model, MethodCache(model, method, budget)), atol=1e-5, rtol=0)
