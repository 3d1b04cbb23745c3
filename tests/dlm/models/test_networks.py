"""LLaDA and Dream compute what they should: against slow loops, against transformers' causal relatives, and with
padding, windows and row selection.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from dlm.check_models import sampled
from dlm.decode import decode
from dlm.models.backbone import MaskedDiffusionModel, RMSNorm, full_tables, rope_tables, rotate
from dlm.models.loading import MODELS
from tests.compare import mismatch
from tests.dlm.models import slow
from tests.dlm.models.checkpoints import CONFIGS, random_state

GRAPHS = {"llada": slow.llada(heads=4, layers=2), "Dream": slow.dream(heads=6, kv_heads=2, layers=2)}
FAMILIES = pytest.mark.parametrize("family", ["llada", "Dream"])


def build(family: str, seed: int = 0) -> MaskedDiffusionModel:
    kind = MODELS[family]
    model = kind(kind.config_class(**CONFIGS[family])).eval()
    model.load_state_dict(random_state(CONFIGS[family], seed))
    return model


def ids_of(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@FAMILIES
def test_equals_the_slow_reference(family: str) -> None:
    ids = ids_of(1, 7)
    ids[0, 4:] = 60
    expected = slow.logits(random_state(CONFIGS[family]), GRAPHS[family], ids[0].tolist())
    with torch.no_grad():
        got = build(family)(ids).logits[0]
    assert (got.double() - expected).abs().max() < 2e-5 * expected.abs().max()


@FAMILIES
def test_equals_the_slow_reference_at_far_positions_and_with_hidden_keys(family: str) -> None:
    ids, visible = ids_of(1, 6, seed=1), [False, True, True, False, True, True]
    positions = [90, 17, 3, 4, 120, 5]
    expected = slow.logits(random_state(CONFIGS[family]), GRAPHS[family], ids[0].tolist(), positions, visible)
    with torch.no_grad():
        got = build(family)(ids, attention_mask=torch.tensor([visible]), position_ids=torch.tensor([positions])).logits
    assert (got[0].double() - expected).abs().max() < 5e-5 * expected.abs().max()


@FAMILIES
def test_generations_of_the_slow_reference_by_the_plain_sampler(family: str) -> None:
    model, state, prompt = build(family), random_state(CONFIGS[family]), ids_of(1, 5)[0].tolist()
    spec = model.decoding_spec
    want = sampled(lambda x: slow.logits(state, GRAPHS[family], x), spec, prompt, 6, spec.unmask)
    got = decode(model, torch.tensor([prompt]), gen_length=6, cache="none", eos="none")
    assert (got.ids[0].tolist(), got.stats.forwards) == want


@FAMILIES
def test_the_last_token_reaches_position_0(family: str) -> None:
    model, ids = build(family), ids_of(1, 5)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 60
    with torch.no_grad():
        assert (model(ids).logits[0, 0] - model(other).logits[0, 0]).abs().max() > 1e-2
        model.set_attn_implementation("sdpa")
        for layer in model.layers:
            layer.is_causal = True
        assert torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])


def test_dream_with_a_causal_mask_is_qwen2() -> None:
    c = CONFIGS["Dream"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    rope = {"rope_theta": c["rope_theta"], "rope_type": "default"}
    qwen = Qwen2ForCausalLM(Qwen2Config(**{n: c[n] for n in names}, rope_parameters=rope)).eval()
    state = random_state(c)
    qwen.load_state_dict(state)
    model, ids = build("Dream"), ids_of(2, 9)
    model.set_attn_implementation("sdpa")
    for layer in model.layers:
        layer.is_causal = True
    with torch.no_grad():
        assert not mismatch(model(ids).logits, qwen(ids).logits, rtol=1e-5, atol=1e-5)


def test_llada_is_llama_without_its_causal_mask() -> None:
    c = CONFIGS["llada"]
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    )).eval()  # fmt: skip
    pairs = {
        "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    }  # fmt: skip
    ends = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    renamed = {}
    for name, tensor in random_state(c).items():
        parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
        new = ends[parts[0]] if len(parts) == 1 else f"model.layers.{parts[1]}.{pairs[parts[2]]}"
        renamed[new + ".weight"] = tensor
    llama.load_state_dict(renamed)
    ids = ids_of(2, 9)
    with torch.no_grad():
        everything = torch.zeros(2, 1, 9, 9)
        expected = llama(ids, attention_mask=everything).logits
        assert not mismatch(build("llada")(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_llada_rotates_in_fp32_and_dream_in_the_dtype_of_the_model() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(100, 105)[None].expand(2, -1)
    fine = full_tables(rope_tables(positions, 8, 1e6))
    coarse = tuple(table.bfloat16() for table in fine)
    assert torch.equal(rotate(x, fine), rotate(x.float(), fine).bfloat16())
    rope = Qwen2RotaryEmbedding(Qwen2Config(
        hidden_size=24, num_attention_heads=3, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    ))  # fmt: skip
    expected, _ = apply_rotary_pos_emb(x, x, *rope(x, positions))
    assert torch.equal(rotate(x, coarse), expected)
    assert not torch.equal(rotate(x, coarse), rotate(x, fine))
    seen = []
    for family in ("llada", "Dream"):
        model = build(family).bfloat16()
        model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1][0].dtype))
        model(ids_of(1, 3))
    assert seen == [torch.float32, torch.bfloat16]


def test_the_norm_scales_after_it_went_back_to_the_dtype_of_the_model() -> None:
    norm = RMSNorm(16, 1e-5).bfloat16()
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(16, generator=generator).bfloat16()
    x = (100 * torch.randn(4, 16, generator=generator)).bfloat16()
    exact = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).float().bfloat16()
    assert torch.equal(norm(x), norm.weight * exact)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows_on_either_side_and_pads_do_not_matter(family: str, side: str) -> None:
    model, short, long = build(family), ids_of(1, 4, seed=2), ids_of(1, 7, seed=3)
    place = slice(3, 7) if side == "left" else slice(0, 4)
    batch, mask = torch.full((2, 7), 61), torch.zeros(2, 7, dtype=torch.long)
    batch[0, place], batch[1], mask[0, place], mask[1] = short, long, 1, 1
    with torch.no_grad():
        got = model(batch, attention_mask=mask).logits
        assert not mismatch(got[0, place], model(short).logits[0], rtol=1e-5, atol=1e-5)
        assert not mismatch(got[1], model(long).logits[0], rtol=1e-5, atol=1e-5)
        batch[0][mask[0] == 0] = 5
        assert torch.equal(model(batch, attention_mask=mask).logits[0, place], got[0, place])


def test_positions_count_the_visible_tokens_unless_given() -> None:
    model, seen = build("llada"), []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1][1]))
    model(ids_of(2, 4), attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    model(ids_of(1, 4))
    model(ids_of(1, 4), position_ids=torch.tensor([[0, 0, 0, 1]]))
    assert torch.equal(seen[0][1], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])


@FAMILIES
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_implementations_agree(family: str, implementation: str) -> None:
    model, ids = build(family), ids_of(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = [model(ids, attention_mask=m).logits[mask.bool()] for m in (mask, None)]
        model.set_attn_implementation(implementation)
        got = [model(ids, attention_mask=m).logits[mask.bool()] for m in (mask, None)]
    assert not mismatch(got, expected, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_embeddings_stand_for_ids(family: str) -> None:
    model, ids = build(family), ids_of(2, 5)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=2))
def test_the_head_runs_on_the_rows_asked_for(rows: list[list[int]]) -> None:
    model, ids = build("llada"), ids_of(2, 6)
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        got = model(ids, logits_rows=torch.tensor(rows)).logits
        assert seen == [(2, 3, 32)]
        expected = torch.stack([model(ids).logits[i, row] for i, row in enumerate(rows)])
    assert not mismatch(got, expected, rtol=1e-6, atol=1e-6)


def test_row_minus_1_is_allowed_and_gives_a_row_of_no_meaning() -> None:
    got = build("llada")(ids_of(1, 4), logits_rows=torch.tensor([[2, -1]])).logits
    assert got.shape == (1, 2, 64) and bool(got.isfinite().all())


def test_logits_are_raw_and_the_card_says_which_slot_a_row_is_for() -> None:
    """Aligned logits are `raw[slot - shift]`; Dream's own sampler says it by moving all rows down by one."""
    model, ids = build("Dream"), ids_of(1, 6)
    slots = torch.arange(1, 6)[None]
    with torch.no_grad():
        raw = model(ids).logits
        aligned = torch.cat((raw[:, :1], raw[:, :-1]), dim=1)
        rows = model(ids, logits_rows=slots - model.decoding_spec.shift).logits
    assert not mismatch(rows, aligned[:, 1:], rtol=1e-6, atol=1e-6)
    assert build("llada").decoding_spec.shift == 0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_flow_and_recomputed_layers_give_the_same() -> None:
    grads = []
    for recompute in (False, True):
        model = build("llada").train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids_of(2, 5)).logits.logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None and bool((g != 0).any()) for g in grads[0])
    assert not mismatch(grads[1], grads[0])


def test_bad_input_is_named() -> None:
    model, ids = build("llada"), ids_of(2, 4)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of the two"):
        model()
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of the two"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 3\], the input has \[batch, tokens\] = \[2, 4\]"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="position_ids are missing"):
        model(ids, past_key_values=object())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention 'sdpa' cannot read a cache of slots; call .*'dlm'"):
        model(ids, position_ids=torch.arange(4)[None], past_key_values=object())
