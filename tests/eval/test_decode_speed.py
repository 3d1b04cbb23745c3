"""What a decoded token costs beside transformers' own cache, in operations of torch: equal on any machine."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from agentkv.eval import decode_speed
from textkv import MethodCache, release

# Of DynamicCache's calls, and how often the host asks a tensor, per token and layer. What evicts only at the end of a
# prompt costs next to nothing; a window moves a ring; the others score every token. `d2o` looks for the token to merge
# with; packed and coded caches read codes beside what is exact, and join the two.
LIMITS = {
    "full": (1.15, 0), "snapkv": (1.15, 0), "pyramidkv": (1.15, 0), "adakv": (1.15, 0), "vatp": (1.15, 0),
    "window": (1.5, 0), "streaming_llm": (1.5, 0), "h2o": (2.5, 0), "tova": (2.5, 0), "cake": (2.5, 0),
    "d2o": (2.9, 0), "kivi(4)": (2.5, 0), "gear(4)": (2.6, 0), "turboquant(4)": (2.5, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return decode_speed.shaped(4, "cpu")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (1, 1024), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    return counted(model, DynamicCache(config=model.config), ids)[0]


@torch.inference_mode()
def counted(model: LlamaForCausalLM, cache, ids: torch.Tensor) -> tuple[float, float]:
    if not isinstance(cache, MethodCache):
        release(model)
    decode_speed.read(model, cache, ids)
    return decode_speed.calls(model, cache, ids[:, :1])


@pytest.mark.parametrize("method", list(LIMITS))
def test_a_decoded_token_costs_few_calls_and_asks_the_device_nothing(model, ids, plain, method):
    most, questions = LIMITS[method]
    calls, asked = counted(model, MethodCache(model, method, 0.5), ids)
    assert calls <= most * plain, f"{calls} calls, DynamicCache {plain}: {calls / plain:.2f}"
    assert asked == questions


def test_default_methods_are_all_that_have_a_limit():
    named = set(decode_speed.METHODS.split(","))
    assert {name for name in LIMITS if name not in ("pyramidkv", "vatp")} <= named
