"""Every scorer with every wrapper: what can stand together runs and keeps its budget, what cannot is refused."""

from __future__ import annotations

import pytest
import torch

from textkv import MethodCache, list_methods, resolve_method
from textkv.method import REGISTRY

# Other rooms register methods too, and whether they are here depends on what was imported; their tests compose them.
OURS = [name for name in list_methods() if REGISTRY[name].__module__.startswith("textkv.")]
SCORERS = [name for name in OURS if REGISTRY[name].capabilities.scores and not REGISTRY[name].wraps]
WRAPPERS = [name for name in OURS if REGISTRY[name].wraps]
OTHERS = [name for name in OURS if not REGISTRY[name].capabilities.scores]
ON_SCORES = [name for name in WRAPPERS if REGISTRY[name].wraps == "scorer"]
# Pages of 32 tokens, a start of 32 and blocks of 64 want longer prompts than a test has.
SMALL = {"kvcrush-official": "kvcrush-official(page=4,start=4,recent=4)"}
SMALL["sentence_kv"] = "sentence_kv(ends=(3,17,40))"  # tiny models have no tokenizer
SMALL |= {name: f"{name}(group=16,residual=16)" for name in ("kivi", "gear", "gear-l")}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_stands_under_every_wrapper(model_of, scorer: str, wrapper: str) -> None:
    model = model_of("llama")
    ids = (torch.arange(64)[None] * 7 + torch.tensor([[0], [3]])) % 100 + 2
    cache = MethodCache(model, f"{scorer}+{SMALL.get(wrapper, wrapper)}", 0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        keeps = cache.method.evicts and not cache.method.capabilities.retrieves
        assert cache.at_rest.tokens_stored <= (32.0 if keeps else 64.0)
        out = model(ids[:, :1], past_key_values=cache).logits
    assert bool(out.isfinite().all())
    assert resolve_method(cache.method.expression).expression == cache.method.expression


@pytest.mark.parametrize("wrapper", ON_SCORES)
@pytest.mark.parametrize("other", OTHERS)
def test_what_gives_no_scores_is_refused_with_the_reason(other: str, wrapper: str) -> None:
    with pytest.raises(ValueError, match="needs importance scores|wraps no other method"):
        resolve_method(f"{other}+{wrapper}", 0.5)


@pytest.mark.parametrize("name", [name for name in OURS if not REGISTRY[name].wraps])
def test_what_wraps_nothing_cannot_follow(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot follow snapkv"):
        resolve_method(f"snapkv+{name}", "64t")


def test_two_wrappers_stand_on_one_another(model_of) -> None:
    model = model_of("llama")
    cache = MethodCache(model, "knorm+adakv(floor=0.5)+kvcrush(ratio=0.5)", 0.5)
    with torch.no_grad():
        model(torch.arange(2, 66)[None], past_key_values=cache)
    assert cache.at_rest.tokens_stored <= 32.0
