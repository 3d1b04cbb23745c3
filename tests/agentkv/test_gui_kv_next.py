"""A budget that is spent on codes: three tokens for one, in no more bytes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentkv.gui_kv_next import GuiKVNext
from tests.textkv.tiny import TEXT, build
from textkv import Budget, MethodCache, resolve_method
from textkv.conformance import check_method


def after_prompt(model: torch.nn.Module, method: str, budget: float | str, tokens: int = 400) -> MethodCache:
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = MethodCache(model, method, budget)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_it_keeps_what_gui_kv_keeps_of_three_budgets():
    model = build("llama")
    ours, theirs = after_prompt(model, "gui-kv-next", 0.1), after_prompt(model, "gui-kv", 0.3)
    assert ours.at_rest.tokens_stored == theirs.at_rest.tokens_stored == 120
    for kept, wanted in zip(ours.at_rest.kept, theirs.at_rest.kept, strict=True):
        assert torch.equal(kept, wanted)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("budget", [0.05, 0.1, "40t"])
def test_in_no_more_bytes_than_the_budget_costs_at_sixteen_bits(width, budget):
    model = LlamaForCausalLM(LlamaConfig(**TEXT | {"head_dim": width, "max_position_embeddings": 4096})).bfloat16()
    ours, theirs = (after_prompt(model, method, budget, 2000) for method in ("gui-kv-next", "gui-kv"))
    assert ours.kv_bytes() <= theirs.kv_bytes()


def test_behind_another_scorer_and_as_text():
    method = resolve_method("snapkv+adakv+gui-kv-next(stretch=2.0)", 0.2)
    assert [method.allowance, method.inner.budget, method.inner.inner.budget] == [Budget(fraction=0.4)] * 3
    assert method.budget == Budget(fraction=0.2)
    again = resolve_method(method.expression, method.budget)
    assert again == method
    assert resolve_method("gui-kv-next", "100t").inner.budget == Budget(tokens=300)


def test_a_budget_for_a_third_drops_nothing():
    method = resolve_method("gui-kv-next", 0.34)
    assert method.allowance.is_full and method.inner.budget.is_full


def test_conformance():
    assert all(check.outcome in ("passed", "not applicable") for check in check_method("gui-kv-next", 0.2))


@pytest.mark.parametrize("stretch", [0.5, float("nan"), float("inf"), -3])
def test_a_stretch_that_is_none(stretch):
    with pytest.raises(ValueError, match="use 1 or more"):
        GuiKVNext(budget=Budget(fraction=0.1), stretch=stretch)
