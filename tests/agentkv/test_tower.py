"""Screenshots that were encoded before are not encoded again, and nothing else changes."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from agentkv.agent import Agent
from agentkv.models import AGENTS
from agentkv.models.chat import ChatAdapter
from agentkv.tower import shown, tower_of
from tests.agentkv.models.tiny import CONFIGS, tiny

FAMILIES = {"qwen2_5_vl": "ui-tars", "qwen3_vl": "qwen3-vl", "qwen3_5": "qwen3.5", "opencua": "opencua"}
SIZE = (160, 120)


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(params=CONFIGS)
def adapter(request: pytest.FixtureRequest) -> ChatAdapter:
    shared = tiny(AGENTS[FAMILIES[request.param]])
    return type(shared)(copy.deepcopy(shared.model), shared.tokenizer, shared.processor)


def read(adapter: ChatAdapter, numbers: list[int], seen: bool) -> torch.Tensor:
    *past, now = map(picture, numbers)
    prompt = adapter.prompt("Find it", [(image, "") for image in past], now)
    with torch.inference_mode():
        if not seen:
            return adapter.model(**prompt.inputs).logits
        with shown(adapter.model, prompt.pictures):
            return adapter.model(**prompt.inputs).logits


def test_logits_are_those_of_a_tower_without_memory(adapter: ChatAdapter) -> None:
    # Known and new ones, one twice, another order.
    for numbers in ([0], [0, 1], [0, 1, 1, 2], [2, 0, 3], [3, 2, 0], [4, 4]):
        assert torch.allclose(read(adapter, numbers, True), read(adapter, numbers, False), atol=1e-5)


def test_a_step_encodes_its_own_screenshot_alone(adapter: ChatAdapter) -> None:
    module, given = tower_of(adapter.model)._module, []
    own = module.forward

    def spread(pixels: torch.Tensor, grid_thw: torch.Tensor, **more: object) -> object:
        given.append(len(grid_thw))
        return own(pixels, grid_thw, **more)

    module.forward = spread  # as accelerate does
    agent = Agent(adapter, "full", 1.0, 2)
    for step in range(4):
        agent.decide("Find it", [(picture(n), "") for n in range(step)], picture(step), SIZE)
    agent.decide("Find it", [(picture(n), "") for n in range(3)], picture(3), SIZE)
    assert given == [1, 1, 1, 1] and module.forward is spread


def test_the_tower_is_as_it_was_outside(adapter: ChatAdapter) -> None:
    module = tower_of(adapter.model)._module
    before = read(adapter, [0, 1], False)
    read(adapter, [0, 1], True)
    assert "forward" not in vars(module)
    assert torch.equal(read(adapter, [0, 1], False), before)


def test_other_weights_are_another_tower(adapter: ChatAdapter) -> None:
    read(adapter, [0], True)
    with torch.no_grad():
        next(tower_of(adapter.model)._module.parameters()).mul_(1.5)
    assert torch.allclose(read(adapter, [0], True), read(adapter, [0], False), atol=1e-5)
    adapter.model.double()
    assert read(adapter, [0], True).dtype == torch.float64


def test_the_oldest_go(adapter: ChatAdapter) -> None:
    read(adapter, [0], True)
    one = tower_of(adapter.model).nbytes
    assert one > 0
    for number in range(20):
        read(adapter, [number], True)
    assert tower_of(adapter.model).nbytes == 2 * one
    read(adapter, [0, 1, 2], True)
    read(adapter, [3], True)
    assert tower_of(adapter.model).nbytes == 4 * one


def test_threads_with_pictures_and_without_share_one_tower(adapter: ChatAdapter) -> None:
    expected = {number: read(adapter, [number, 9], False) for number in range(3)}
    found: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}

    def work(number: int) -> None:
        for _ in range(8):
            found[number].append(read(adapter, [number, 9], number < 2))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, all_logits in found.items():
        assert len(all_logits) == 8
        assert all(torch.allclose(logits, expected[number], atol=1e-5) for logits in all_logits)


def test_gradients_and_more_outputs_are_the_model_s_own(adapter: ChatAdapter) -> None:
    prompt = adapter.prompt("Find it", [], picture(0))
    weight = next(tower_of(adapter.model)._module.parameters())
    with shown(adapter.model, prompt.pictures):
        adapter.model(**prompt.inputs).logits.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_a_model_that_was_made_in_inference_mode(adapter: ChatAdapter) -> None:
    with torch.inference_mode():
        made = type(adapter)(copy.deepcopy(adapter.model), adapter.tokenizer, adapter.processor)
        assert next(made.model.parameters()).is_inference()
    for numbers in ([0], [0, 1]):
        assert torch.allclose(read(made, numbers, True), read(made, numbers, False), atol=1e-5)
