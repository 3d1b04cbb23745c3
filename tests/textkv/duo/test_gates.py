"""Gates: exact identities of the two streams, gradients, the schedule, what training opens and closes, mean_qk."""

import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache
from textkv.duo.far_score import SPAN, far_score
from textkv.duo.gated import QUERY_BLOCK, distillation, full_attention, gated, streaming_attention
from textkv.duo.mean_qk import mean_qk_scores
from textkv.duo.passkeys import Sample
from textkv.duo.pattern import Pattern
from textkv.duo.training import GateTraining, rate_at, train_gates
from textkv.positions import RotarySpec

SINKS, RECENT = 2, 4
TAIL = np.arange(40) >= 20


def toy(**changes):
    """Two layers whose attention output matters as much as the rest."""
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(tiny.LlamaConfig(**{**tiny.TEXT, "num_hidden_layers": 2, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
            if "o_proj" in name:
                weight.mul_(20)
    return model


def draw(step):
    return Sample(tiny.text_ids(40, seed=step)[0].numpy(), TAIL, TAIL & (np.arange(40) % 2 == 0))


def loss_of(model, gates, own=False, ids=None):
    with gated(model) as decoder:
        ids = tiny.text_ids(40) if ids is None else ids
        return distillation(decoder, ids, torch.from_numpy(TAIL), gates, (SINKS, RECENT), own)


def lambda_masked(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Every head under the streaming mask, written out: an oracle without code of ours."""
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = (j <= i) & ((j < SINKS) | (i - j < RECENT))
    scores = (query @ key.repeat_interleave(group, 1).mT * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("test_lambda", lambda_masked)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_open_gates_lose_exactly_nothing(model_of, family):
    model = model_of(family)
    for own in (False, True):
        gates = torch.ones(3, 2, requires_grad=True)
        loss = loss_of(model, gates, own)
        loss.backward()
        assert loss.item() == 0 and bool(gates.grad.isfinite().all())
    assert model.config._attn_implementation == "sdpa"


def test_closed_gates_are_the_lambda_masked_model():
    model, ids = toy(), tiny.text_ids(40)
    plain = model.model(ids, use_cache=False).last_hidden_state
    model.set_attn_implementation("test_lambda")
    masked = model.model(ids, use_cache=False).last_hidden_state
    expected = (plain - masked)[:, 20:].square().mean()
    model.set_attn_implementation("sdpa")
    for own in (False, True):
        assert not mismatch(loss_of(model, torch.zeros(2, 2), own), expected, rtol=1e-4, atol=0)


def test_half_open_gates_differ_by_where_the_full_branch_comes_from():
    model = toy()
    gates = torch.full((2, 2), 0.5)
    assert abs(loss_of(model, gates) - loss_of(model, gates, own=True)) > 1e-4


@pytest.mark.parametrize("n", [1, 5, 3 * QUERY_BLOCK // 2])
@pytest.mark.parametrize("window", [(2, 4), (70, 1100), (1, 1)])
def test_streaming_attention_in_blocks_is_the_mask(n, window):
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, heads, n, 8, generator=g) for heads in (2, 1, 1))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = (j <= i) & ((j < window[0]) | (i - j < window[1]))
    expected = (q @ k.mT * 0.3).masked_fill(~visible, -torch.inf).softmax(-1) @ v
    assert not mismatch(streaming_attention(q, k, v, 0.3, *window), expected, atol=1e-5, rtol=1e-5)
    if window[1] >= n:
        assert not mismatch(full_attention(q, k, v, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_are_right(own):
    model = toy().double()
    gates = torch.tensor([[0.2, 0.9], [0.6, 0.4]], dtype=torch.float64, requires_grad=True)
    loss_of(model, gates, own).backward()
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros(2, 2, dtype=torch.float64)
        # Not smaller: Llama's norm layers round to fp32 even in an fp64 model.
        step[place] = 1e-3
        slope = (loss_of(model, gates.detach() + step, own) - loss_of(model, gates.detach() - step, own)) / 2e-3
        assert not mismatch(gates.grad[place], slope, rtol=2e-3, atol=1e-7)


def test_padding_and_sliding_windows_are_refused(model_of):
    with gated(model_of("llama")) as decoder, pytest.raises(ValueError, match="rows of one length: give no padding"):
        decoder(tiny.text_ids(4), attention_mask=torch.tensor([[0, 1, 1, 1]]), use_cache=False)
    torch.manual_seed(0)
    sliding = tiny.MistralForCausalLM(tiny.MistralConfig(**tiny.TEXT, sliding_window=16))
    with pytest.raises(ValueError, match="slides over 16 tokens: its heads cannot be identified with 40 tokens"):
        loss_of(sliding, torch.ones(3, 2))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (39, 0.1), (199, 0.5), (399, 1), (1000, 1), (1999, 0.1)])
def test_the_learning_rate(step, expected):
    assert rate_at(step, 2000) == pytest.approx(expected)


def test_the_authors_defaults():
    s = GateTraining()
    assert (s.steps, s.rate, s.weight, s.initial, s.sinks, s.recent) == (2000, 0.02, 0.05, 1.0, 128, 256)
    assert (s.full_branch, s.supervise) == ("teacher", "tail")


def test_a_useless_head_closes_and_its_cache_may_go(tmp_path):
    """Head 1 of layer 0 is cut from the output: its gate falls to 0, the others hold; streaming it then costs nothing,
    while streaming any other head instead changes the model."""
    model, seen = toy(), []
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 32:] = 0
    before = {name: x.clone() for name, x in model.state_dict().items()}
    settings = GateTraining(steps=40, rate=0.1, sinks=SINKS, recent=RECENT)
    gates = train_gates(model, draw, settings, seen.append)
    assert gates[0, 1] < 0.05 and gates.flatten()[[0, 2, 3]].min() > 0.8
    assert [p.step for p in seen] == list(range(40)) and seen[0].distillation == 0 and seen[-1].open == 3
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    ids, gaps = tiny.text_ids(60, seed=99), []
    full = MethodCache(model, "full")
    expected = _decode(model, full, ids)
    for n in range(4):
        wrong = torch.ones(4)
        wrong[n] = 0
        for name, g in (("learned", gates), ("random", wrong.view(2, 2))):
            Pattern(g, SINKS, RECENT).save(tmp_path / f"{name}.json")
        if n == 0:
            gaps.append(_gap(model, ids, expected, tmp_path / "learned.json"))
        if n != 1:
            gaps.append(_gap(model, ids, expected, tmp_path / "random.json"))
    assert gaps[0] < 1e-4 and min(gaps[1:]) > 100 * max(gaps[0], 1e-5)


def _decode(model, cache, ids):
    with torch.no_grad():
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split((50, *[1] * 10), 1)], 1)


def _gap(model, ids, expected, file):
    method = f"duo_attention(pattern={str(file)!r},sparsity=0.25,sinks={SINKS},recent={RECENT})"
    return (_decode(model, MethodCache(model, method), ids) - expected).abs().max().item()


def test_gates_stay_within_0_and_1_and_checkpointing_changes_nothing():
    model = toy()
    runs = [
        train_gates(model, draw, GateTraining(steps=4, rate=0.9, weight=w, sinks=2, recent=4, checkpointing=c))
        for w, c in ((2.0, False), (2.0, True), (0.0, False))
    ]
    assert torch.equal(runs[0], runs[1]) and all(bool(((g >= 0) & (g <= 1)).all()) for g in runs)
    assert not model.training and not any(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize(("full_branch", "supervise"), [("student", "tail"), ("teacher", "passkeys")])
def test_the_papers_variants_train(full_branch, supervise):
    settings = GateTraining(
        steps=3, initial=0.5, sinks=2, recent=4, full_branch=full_branch, supervise=supervise
    )  # fmt: skip
    gates = train_gates(toy(), draw, settings)
    plain = train_gates(toy(), draw, GateTraining(steps=3, initial=0.5, sinks=2, recent=4))
    assert bool(gates.isfinite().all()) and not torch.equal(gates, plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"sinks": 0}, "sinks=0"), ({"recent": 0}, "recent=0"), ({"rate": 0}, "rate=0"),
        ({"weight": -1}, "weight=-1"), ({"initial": 1.5}, "initial=1.5: a gate lies"),
        ({"full_branch": "both"}, "use 'teacher' or 'student'"), ({"supervise": "all"}, "use 'tail' or 'passkeys'"),
    ],
)  # fmt: skip
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        GateTraining(**wrong)


def test_far_scores_by_hand():
    """One frequency that turns by half a circle over the span: equal means look near, opposite far, zero evenly."""
    frequency, key = torch.tensor([math.pi / (SPAN - 1)]), torch.tensor([[1.0, 0.0]])
    near, even, far = (
        far_score(query * key, key, RotarySpec.halves(frequency), 20.0).item() for query in (1.0, 0.0, -1.0)
    )
    assert near < 0.25 < 0.75 < far and even == pytest.approx((SPAN + 1) / (2 * SPAN))


def test_far_scores_average_the_group():
    frequency, g = torch.tensor([0.3, 0.01]), torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 4, generator=g), torch.randn(2, 4, generator=g)
    each = [
        far_score(query[n : n + 1], key[n // 2 : n // 2 + 1], RotarySpec.halves(frequency), 1.0).item()
        for n in range(4)
    ]
    expected = torch.tensor([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])
    assert not mismatch(far_score(query, key, RotarySpec.halves(frequency), 1.0), expected)


@torch.no_grad()
def test_means_are_taken_before_the_rotation(model_of):
    """Against projections of the first layer's own input, which no rotation has touched."""
    model, ids = model_of("llama"), tiny.text_ids(30)
    rotary, block = model.model.rotary_emb, model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(ids)).mean((0, 1))
    query, key = block.self_attn.q_proj(x).view(4, 16), block.self_attn.k_proj(x).view(2, 16)
    scores = mean_qk_scores(model, [ids, ids])
    assert scores.shape == (3, 2) and bool(((scores >= 0) & (scores <= 1)).all())
    assert not mismatch(
        scores[0], far_score(query, key, RotarySpec.halves(rotary.inv_freq), block.self_attn.scaling), atol=1e-4, rtol=0
    )  # fmt: skip


def test_no_text_is_refused(model_of):
    with pytest.raises(ValueError, match="at least one row of text"):
        mean_qk_scores(model_of("llama"), [])
