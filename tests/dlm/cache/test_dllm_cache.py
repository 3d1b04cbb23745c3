"""dLLM-Cache: what is reused, what is computed anew, and that state belongs to one generation."""

from __future__ import annotations

import pytest
import torch

from dlm.cache import DLLMCache
from dlm.cache.plan import Packing
from dlm.canvas import Canvas
from tests.dlm.toys import MASK, dream, llada, prompts, traced


def start(model, policy):
    ids, _ = prompts(5)
    canvas = Canvas(ids, gen_length=8, block_length=4, mask_id=MASK, shift=model.decoding_spec.shift)
    return canvas, policy.begin(canvas, model)


def forward(model, canvas, run):
    plan = run.plan(torch.full((1, 1), -1))
    run.cache.plan = plan
    with torch.no_grad():
        return model(canvas.ids, position_ids=canvas.position_ids, past_key_values=run.cache).logits


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_an_unchanged_canvas_gives_the_kept_output(make, ratio):
    model = make()
    canvas, run = start(model, DLLMCache(100, 100, ratio))
    first = forward(model, canvas, run)
    with torch.no_grad():
        assert torch.allclose(first, model(canvas.ids).logits, atol=1e-5)
    for _ in range(2):
        assert torch.allclose(forward(model, canvas, run), first, atol=1e-5)


def test_the_slots_whose_values_changed_most_are_computed_ties_by_the_lowest():
    model = llada()
    canvas, run = start(model, DLLMCache(100, 100, 0.25))
    forward(model, canvas, run)
    layer = run.cache.layers[0]
    layer.v[:, :, 5:] = 1.0
    values = layer.v[:, :, 5:].clone()
    slots = torch.arange(layer.v.shape[2])[None]
    response, two = Packing.of(slots >= 5), Packing.of(slots < 2)
    assert layer.drifted(values, response, two).slots.tolist() == [5, 6]
    noise = 1 + 1e-4 * torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    assert layer.drifted(values * noise, response, two).slots.tolist() == [5, 6]  # as much as rounding does
    values[:, :, 3] *= -1
    values[:, :, 6, 0] = -1
    assert layer.drifted(values, response, two).slots.tolist() == [8, 11]
    assert torch.equal(layer.v[:, :, 5:], values)


@pytest.mark.parametrize(
    "step, prompt, response", [(0, True, True), (2, True, False), (3, False, True), (5, False, False)]
)
def test_each_part_refreshes_at_its_own_interval(step, prompt, response):
    model = llada()
    canvas, run = start(model, DLLMCache(2, 3, 0.25))
    for _ in range(step + 1):
        plan = run.plan(torch.full((1, 1), -1))
    assert (run.cache.prompt_due, run.cache.response_due) == (prompt, response)
    assert plan.tokens == 5 * prompt + (8 if response else 2)
    assert plan.value_tokens == (0 if response else 8)


def test_a_prompt_refresh_alone_leaves_the_response_to_the_ratio():
    model = llada(3)
    canvas, run = start(model, DLLMCache(1, 100, 0.0))
    forward(model, canvas, run)
    kept = [layer.a.clone() for layer in run.cache.layers]
    canvas.commit(torch.tensor([[6]]), torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.bool))
    forward(model, canvas, run)
    for layer, before in zip(run.cache.layers, kept, strict=True):
        assert torch.equal(layer.a[:, 5:], before[:, 5:])
        assert not torch.equal(layer.a[:, :5], before[:, :5])


def test_the_first_layer_keeps_nothing():
    model, (ids, _) = llada(3), prompts(5)
    got, _ = traced(model, ids, "dllm-cache")
    per_slot = 2 * 32 + 2 * 32  # K and V of 4 heads of 8, A and F of the model's width
    assert got.stats.cache_bytes == 2 * 17 * per_slot * 4


def test_two_generations_do_not_share_state():
    model, (ids, _) = llada(), prompts(5)
    other, _ = prompts(7, seed=3)
    alone = traced(model, ids, "dllm-cache(3,3,0.25)")[0].ids
    traced(model, other, "dllm-cache(3,3,0.25)")
    assert torch.equal(traced(model, ids, "dllm-cache(3,3,0.25)")[0].ids, alone)
