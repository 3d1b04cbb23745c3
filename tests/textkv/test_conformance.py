"""Every method passes the suite that third parties run on theirs; and the suite catches methods that cheat."""

from dataclasses import dataclass

import pytest
import torch

from tests.textkv import kinds
from textkv import list_methods, register, resolve_method
from textkv.conformance import CHECKS, check_method
from textkv.method import REGISTRY, Method
from textkv.methods.snapkv import SnapKV

OURS = [name for name in list_methods() if REGISTRY[name].__module__.startswith("textkv.")]
SPELLED = {"sentence_kv": "sentence_kv(ends=(3,17,40))"}  # the small model has no tokenizer
COMPOSED = [
    ("snapkv+adakv(floor=0.5,safeguard='protect')", 0.2),
    ("streaming_llm(positions='original')", 0.4),
    ("streaming_llm(prefill='exact_stream')", "24t"),
    ("snapkv(window=8,kernel=7,pooling='max')", "30t"),
]


@pytest.mark.parametrize(("method", "budget"), [(SPELLED.get(m, m), 0.4) for m in OURS] + COMPOSED)
def test_method_conforms(method, budget):
    results = check_method(method, budget)
    assert [r.name for r in results] == list(CHECKS)
    declared = [r.name for r in results if r.outcome == "not applicable"]
    known = resolve_method(method, budget).capabilities
    allowed = {
        "equals_masked_full_attention"
    }  # its oracle knows exact tokens, at their places, that stay while decoding
    if not known.crop:
        allowed.add("crop_or_refusal")  # what was dropped while decoding, a crop cannot bring back
    if known.lossy:
        allowed.add("full_budget_equals_full_cache")  # codes are not the numbers
    if known.lossy or known.merges or not known.original_positions:
        allowed.add("forgotten_tokens_are_gone")  # its oracle masks exact tokens at their own positions
    assert set(declared) <= allowed


@pytest.mark.parametrize(
    ("kind", "method"),
    [("sliding", "snapkv"), ("sliding", "adakv"), ("sliding", "minicache"), ("sinks", "full"), ("sinks", "adakv"),
     ("sinks", "h2o"), ("hybrid", "adakv"), ("hybrid", "duo_attention")],
)  # fmt: skip
def test_methods_conform_on_models_of_other_kinds(kind, method):
    assert [r.name for r in check_method(method, 0.4, kinds.model_of_kind(kind))] == list(CHECKS)


@pytest.fixture
def registered():
    names = []

    def add(name, cls):
        names.append(name)
        register(name)(cls)

    yield add
    for name in names:
        del REGISTRY[name]


def test_a_hidden_copy_is_found(registered):
    @dataclass(frozen=True)
    class Hoarder(SnapKV):
        def on_prefill_end(self, layer, evidence):
            layer.attic = layer.stored().keys.clone()
            super().on_prefill_end(layer, evidence)

    registered("hoarder", Hoarder)
    with pytest.raises(AssertionError, match="bytes_are_really_gone"):
        check_method("hoarder")


def test_a_changed_value_is_found(registered):
    @dataclass(frozen=True)
    class Forger(Method):
        def on_prefill_end(self, layer, evidence):
            layer.stored().values.mul_(1.01)

    registered("forger", Forger)
    with pytest.raises(AssertionError, match="equals_masked_full_attention"):
        check_method("forger", 1.0)


def test_a_budget_that_is_not_kept_is_found(registered):
    @dataclass(frozen=True)
    class Spender(SnapKV):
        def counts(self, layer, scores, evidence):
            return torch.full((len(evidence.tokens), 1), 70)

        def _least(self, evidence):
            return torch.zeros(len(evidence.tokens), dtype=torch.int64)

    registered("spender", Spender)
    with pytest.raises(AssertionError, match="the budget allows 36"):
        check_method("spender")
