"""LLaDA2, SDAR, LLaDA-MoE and Fast-dLLM v2: checkpoints in the published layout against slow loops, and their decoding
with every cache against the sampler that computes everything anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dlm.check_models import sampled
from dlm.decode import decode
from dlm.models import load_model
from tests.compare import mismatch
from tests.dlm.models import slow_blocks as slow
from tests.dlm.models.checkpoints import published, write

FAMILIES = pytest.mark.parametrize("family", list(slow.CONFIGS))
BLOCKS = pytest.mark.parametrize("family", ["sdar", "sdar_moe", "fast_dllm", "llada2"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("blocks")
    return {f: load_model(write(root / f, c, slow.random_state(f)))[0] for f, c in slow.CONFIGS.items()}


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, (1, tokens), generator=torch.Generator().manual_seed(seed))


@FAMILIES
def test_the_published_layout_loads_and_equals_the_slow_loops(models, family):
    model = models[family]
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == slow.shapes(family)
    assert model.decoding_spec.block == slow.block_of(family)
    # Two blocks and a part; LLaDA2's are long, so only one and a part there.
    ids = ids_of({"llada2": 37, "fast_dllm": 19}.get(family, 11))
    ids[0, 7:9] = 60
    with torch.no_grad():
        got = model(ids).logits[0].double()
        expected = slow.logits(slow.random_state(family), family, ids[0].tolist())
        assert (got - expected).abs().max() < 5e-5 * expected.abs().max()
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            assert not mismatch(model(ids).logits[0].double(), got, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("dlm")


@FAMILIES
def test_a_token_sees_its_own_block_and_those_before(models, family):
    model, block = models[family], slow.block_of(family)
    ids = ids_of(40)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 60
    with torch.no_grad():
        changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 1e-6
    assert bool(changed[39 // block * block if block else 0 :].all())
    assert block is None or not bool(changed[: 39 // block * block].any())


def test_sdar_moe_is_qwen3_moe_with_another_mask(models):
    c = slow.CONFIGS["sdar_moe"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
             "num_key_value_heads", "rms_norm_eps", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
             "norm_topk_prob", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    rope = {"rope_theta": c["rope_theta"], "rope_type": "default"}
    qwen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{n: c[n] for n in names}, rope_parameters=rope)).eval()
    state = {name: t for name, t in slow.random_state("sdar_moe").items() if ".experts." not in name}
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts."
        own = slow.random_state("sdar_moe")
        state[at + "gate_up_proj"] = torch.stack(
            [torch.cat([own[f"{at}{e}.{n}_proj.weight"] for n in ("gate", "up")]) for e in range(6)]
        )
        state[at + "down_proj"] = torch.stack([own[f"{at}{e}.down_proj.weight"] for e in range(6)])
    qwen.load_state_dict(state)
    ids, number = ids_of(10), torch.arange(10) // 4
    mask = torch.zeros(10, 10).masked_fill(number[None] > number[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = qwen(ids, attention_mask=mask[None, None]).logits
        assert not mismatch(models["sdar_moe"](ids).logits, expected, rtol=1e-4, atol=1e-4)


@BLOCKS
@pytest.mark.parametrize("prompt", [16, 11, 30])
def test_decoding_is_the_sampler_that_computes_everything_anew(models, family, prompt):
    model, shift = models[family], models[family].decoding_spec.shift
    rule = "threshold(0.3)"
    ids = ids_of(prompt, seed=prompt)

    def forward(x):
        with torch.no_grad():
            return model(torch.tensor([x])).logits[0]

    want, forwards = sampled(forward, model.decoding_spec, ids[0].tolist(), 16, rule)
    for cache in ("none", "block", "block(fold=False)", "freecache", "prefix", "dual", "block+suffix(0)"):
        got = decode(model, ids, gen_length=16, cache=cache, unmask=rule, eos="none")
        assert got.ids[0].tolist() == want, cache
        # A forward that only finishes a block writes nothing, but for a shifted model, whose next block it begins.
        assert got.stats.forwards == forwards or cache == "block(fold=False)" or (shift and "block" in cache), cache
        assert got.stats.forwards >= forwards


@FAMILIES
def test_generations_of_the_slow_network_by_the_plain_sampler(models, family):
    """Nothing of ours but the answer: loops over tokens and heads in fp64, and everything anew in every forward."""
    model, state = models[family], slow.random_state(family)
    prompt, length = ids_of({"llada2": 26}.get(family, 9), seed=4)[0].tolist(), 6
    rule = "threshold(0.3)" if model.decoding_spec.block else "confidence"
    want = sampled(lambda x: slow.logits(state, family, x), model.decoding_spec, prompt, length, rule)
    got = decode(model, torch.tensor([prompt]), gen_length=length, cache="none", unmask=rule, eos="none")
    assert (got.ids[0].tolist(), got.stats.forwards) == want


@BLOCKS
def test_defaults_write_16_tokens_and_the_cache_of_blocks_computes_less(models, family):
    model, ids = models[family], ids_of(9)
    done = decode(model, ids, gen_length=16)
    assert done.ids.shape == (1, 16) and not bool((done.ids == 60).any())
    anew = decode(model, ids, gen_length=16, cache="none")
    assert torch.equal(done.ids, anew.ids)
    if family != "llada2":  # one block holds all of it there
        assert done.stats.query_tokens < anew.stats.query_tokens


def test_llada_moe_decodes_as_a_llada(models):
    done = decode(models["llada_moe"], ids_of(5), gen_length=16)
    assert done.ids.shape == (1, 16) and models["llada_moe"].decoding_spec.unmask == "confidence"


def test_query_tokens_of_the_two_ways_to_finish_a_block(models):
    """P=8, G=8, B=4, one token a forward: prompt and block at first; then folded 8 + 3 * 4, or apart 4 + 4 * 4."""
    ids = ids_of(8)
    options = dict(gen_length=8, unmask="threshold(1)", eos="none")
    folded, apart = (decode(models["sdar"], ids, cache=c, **options).stats for c in ("block", "block(fold=False)"))
    assert (folded.forwards, folded.query_tokens) == (8, 12 + 3 * 4 + 8 + 3 * 4)
    assert (apart.forwards, apart.query_tokens) == (10, 8 + 4 * 4 + 4 + 4 * 4)


def test_ends_come_from_the_generation_config_too(tmp_path: Path):
    folder = write(tmp_path, slow.CONFIGS["sdar"], slow.random_state("sdar"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [59, 61]}))
    assert load_model(folder)[0].decoding_spec.eos_ids == (61, 59)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Dream", {"pad_token_id": 59}), ("Dream", {"architectures": ["DreamModel"], "max_position_embeddings": 512}),
     ("llada", {"max_sequence_length": 256})],
)  # fmt: skip
def test_dream_coder_diffucoder_and_llada_1_5_load_by_their_config(tmp_path: Path, family: str, changes: dict):
    """The same graphs with other ids and limits."""
    model, _ = load_model(published(tmp_path, family, **changes))
    assert decode(model, ids_of(4), gen_length=16).ids.shape == (1, 16)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sdar", dict(block_length=3), "block_length=3 does not divide this model's blocks of 4"),
        ("sdar", dict(cache="dllm-cache"), "a block-causal model has cache block"),
        ("llada_moe", dict(cache="block"), "cache block is for block-causal models"),
    ],
)
def test_what_does_not_go_together_is_refused(models, family, options, message):
    with pytest.raises(ValueError, match=message):
        decode(models[family], ids_of(4), **({"gen_length": 8} | options))


@pytest.mark.parametrize("model_type", ["diffusion_gemma", "nemotron_dllm", "llada21_moe"])
def test_models_that_are_looked_for_in_vain_are_refused_by_name(tmp_path: Path, model_type: str):
    write(tmp_path, slow.SDAR | {"model_type": model_type}, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"is a '{model_type}' model, which is not read here: "):
        load_model(tmp_path)


def without(name: str) -> dict:
    return {key: value for key, value in slow.CONFIGS["llada_moe"].items() if key != name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without("rope_theta"), "rope_theta is missing in this LLaDA-MoE config"),
        (without("num_experts_per_tok"), "num_experts_per_tok is missing"),
        (without("") | {"moe_layer_freq": [1, 0]}, "moe_layer_freq makes layer 1 dense"),
        (without("") | {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not supported"),
    ],
)
def test_what_a_llada_moe_config_does_not_say_is_not_guessed(tmp_path: Path, config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path, config, slow.random_state("llada_moe")))
