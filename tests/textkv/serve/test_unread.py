"""What is refused before weights are read is what would be refused with them, and nothing else."""

import pytest
import torch

from eval.tiny import build
from textkv import MethodCache, list_methods
from textkv.method import REGISTRY
from textkv.models.loading import load
from textkv.serve import Opening
from textkv.serve.engine import ChatEngine
from textkv.serve.unread import check_cache

OURS = [name for name in list_methods() if REGISTRY[name].__module__.startswith("textkv.")]
WHOLE = {"full", "gear", "gear-l", "kivi", "turboquant", "minicache"}
"""Methods that take no budget."""


def said(action) -> str | None:
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def mini():
    return load("mini")[0]


@pytest.mark.parametrize("method", OURS)
def test_a_method_is_served_if_its_cache_can_be_built(mini, method):
    budget = None if method in WHOLE else 0.5
    with_weights = said(lambda: MethodCache(mini, method, budget))
    for memory in (None, 10**9):
        opening = Opening("mini", method=method, budget=budget, memory=memory)
        assert said(lambda opening=opening: ChatEngine.check(opening)) == with_weights


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_is_held_against_a_model_of_experts_too(family, dtype):
    config = build(family).config
    for memory, refused in ((10**9, False), (100, True)):
        opening = Opening(family, dtype=dtype, memory=memory)
        line = said(lambda opening=opening: check_cache(lambda: type(build(family))(config), config, opening, "full"))
        assert bool(line) == refused and (line is None or "--memory of 100 bytes" in line)


def test_what_does_not_fit_into_memory_may_go_elsewhere(tmp_path):
    assert said(lambda: ChatEngine.check(Opening("mini", memory=1000, disk=tmp_path))) is None
    assert said(lambda: ChatEngine.check(Opening("mini", memory=1000, host=10**6))) is None
    assert "--memory of 1,000 bytes" in said(lambda: ChatEngine.check(Opening("mini", memory=1000)))
