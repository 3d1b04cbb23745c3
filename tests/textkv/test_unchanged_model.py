"""A model on which a cache was built gives, without that cache, what it gave before: to the last bit."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import agentkv.gui_kv  # noqa: F401  (registers gui-kv, which asks for hidden states)
import textkv
from tests.compare import mismatch
from tests.textkv import kinds
from textkv import MethodCache

PLAIN = ["eager", "sdpa"]
ASKING = ["streaming_llm", "lacache", "expected", "gui-kv"]
"""Methods that need more than keys and queries, so that hooks go on the model."""


def before_and_after(model, call, methods=("snapkv", "gui-kv", "lacache")):
    """What a call gives before any cache was built on the model, and after."""
    first = call()
    for method in methods:
        MethodCache(model, method, 0.4)
    assert model.config._attn_implementation.startswith("textkv")
    return first, call()


def some_kinds(implementation):
    """gpt-oss has no sdpa; the others have both."""
    return [kind for kind in kinds.KINDS if kind != "sinks" or implementation == "eager"]


EACH = [(kind, implementation) for implementation in PLAIN for kind in some_kinds(implementation)]


@pytest.mark.parametrize(("kind", "implementation"), EACH)
def test_a_plain_forward(kind, implementation):
    model = kinds.model_of_kind(kind, implementation)
    tokens, mask = kinds.ids(24, 2), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :7] = 0
    for given in (None, mask):
        first, then = before_and_after(model, lambda given=given: kinds.logits(model, tokens, mask=given))
        assert torch.equal(first, then)
        textkv.release(model)


@pytest.mark.parametrize(("kind", "implementation"), [e for e in EACH if e[0] != "hybrid"])
def test_packed_texts(kind, implementation):
    """Positions that start anew tell transformers that several texts lie in one row."""
    model = kinds.model_of_kind(kind, implementation)
    at = torch.cat([torch.arange(11), torch.arange(9), torch.arange(4)])[None]

    def call():
        with torch.no_grad():
            return model(kinds.ids(24), position_ids=at, use_cache=False).logits

    first, then = before_and_after(model, call)
    assert torch.equal(first, then)
    if kind != "sinks":  # gpt-oss does not hand its positions to the mask
        alone = kinds.logits(model, kinds.ids(24)[:, 11:20])
        assert not mismatch(then[:, 11:20], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "implementation"), [e for e in EACH if e[0] != "hybrid"])
def test_static_cache_of_generate(kind, implementation):
    model = kinds.model_of_kind(kind, implementation)
    options = dict(do_sample=False, max_new_tokens=6, cache_implementation="static", disable_compile=True)
    first, then = before_and_after(model, lambda: model.generate(kinds.ids(20), **options))
    assert torch.equal(first, then)


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_attention_weights(kind):
    model = kinds.model_of_kind(kind)

    def call():
        with torch.no_grad():
            return [x for x in model(kinds.ids(20), output_attentions=True).attentions if x is not None]

    first, then = before_and_after(model, call)
    assert len(first) and all(torch.equal(a, b) for a, b in zip(first, then, strict=True))


@pytest.mark.parametrize(("kind", "implementation"), EACH)
def test_training_with_dropout(kind, implementation):
    model = kinds.model_of_kind(kind, implementation)
    modules = [m for m in model.modules() if hasattr(m, "attention_dropout")]
    own = [m.attention_dropout for m in modules]

    def call():
        torch.manual_seed(3)
        model.zero_grad()
        out = model(kinds.ids(20, 2), labels=kinds.ids(20, 2), use_cache=False)
        out.loss.backward()
        return [out.loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    try:
        model.train()
        for module in modules:
            module.attention_dropout = 0.3
        first, then = before_and_after(model, call)
    finally:
        model.eval()
        model.zero_grad()
        for module, dropout in zip(modules, own, strict=True):
            module.attention_dropout = dropout
    assert all(torch.equal(a, b) for a, b in zip(first, then, strict=True))


@pytest.mark.parametrize(("kind", "implementation"), EACH)
def test_a_dynamic_cache_in_two_turns(kind, implementation):
    model = kinds.model_of_kind(kind, implementation)

    def call():
        plain, tokens = DynamicCache(config=model.config), kinds.ids(30)
        turns = [kinds.logits(model, part, plain) for part in tokens.split((17, 1, 1, 9, 2), 1)]
        return torch.cat(turns, 1)

    first, then = before_and_after(model, call)
    assert torch.equal(first, then)


@pytest.fixture
def wrapped():
    """Wraps every entry of transformers' registry as kvpress does, and puts the entries back."""
    names, seen = list(ALL_ATTENTION_FUNCTIONS), []
    own = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}

    def wrapper(function):
        def inner(module, query, key, value, attention_mask, dropout, **kwargs):
            if query.shape[2] == key.shape[2]:
                seen.append(module.layer_idx)
            return function(module, query, key, value, attention_mask, dropout, **kwargs)

        return inner

    def wrap():
        for name in names:
            ALL_ATTENTION_FUNCTIONS[name] = wrapper(own[name])
        return seen

    yield wrap
    for name in names:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)
        if ALL_ATTENTION_FUNCTIONS.get(name) is not own[name]:
            ALL_ATTENTION_FUNCTIONS[name] = own[name]


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
def test_a_library_that_wraps_the_registry(wrapped, kind, method, budget):
    model = kinds.model_of_kind(kind)
    textkv.use(model)  # so that our names are there to be wrapped
    plain = kinds.logits(model, kinds.ids(30))
    cache = MethodCache(model, method, budget)
    expected = [kinds.logits(model, part, cache) for part in kinds.ids(30).split((28, 1, 1), 1)]
    seen = wrapped()
    cache = MethodCache(model, method, budget)
    ours = [kinds.logits(model, part, cache) for part in kinds.ids(30).split((28, 1, 1), 1)]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert seen, "the wrapper was never asked"
    assert torch.equal(kinds.logits(model, kinds.ids(30)), plain)


def hooks_on(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_release_takes_everything_away(kind):
    model = kinds.model_of_kind(kind)
    none = hooks_on(model)
    for method in ASKING:
        MethodCache(model, method, 0.4)
    assert hooks_on(model) > none
    assert textkv.release(model) is model
    assert hooks_on(model) == none and model.config._attn_implementation == "eager"
    textkv.release(model)  # once more does no harm
    cache = MethodCache(model, "gui-kv", 0.4)  # and a cache built afterwards works
    assert bool(kinds.logits(model, kinds.ids(20), cache).isfinite().all())


def test_many_caches_leave_no_more_hooks_than_one():
    model = kinds.model_of_kind("dense")
    alive = [MethodCache(model, method, 0.4) for method in ASKING]
    once = hooks_on(model)
    alive += [MethodCache(model, ASKING[i % 4], 0.4) for i in range(100)]
    assert hooks_on(model) == once
    del alive
    gc.collect()
    assert hooks_on(model) == once


@pytest.mark.parametrize("pair", [(a, b) for a in ASKING for b in ASKING if a < b])
def test_two_threads_on_one_model(pair):
    """Each has a cache of its own; what hooks see must reach the right one."""
    model = kinds.model_of_kind("dense")
    texts = kinds.ids(60, seed=1), kinds.ids(43, seed=2)

    def read(method, text):
        cache, out = MethodCache(model, method, 0.4), []
        for part in text.split((30,) + (1,) * (text.shape[1] - 30), 1):
            out.append(kinds.logits(model, part, cache))
        return torch.cat(out, 1)

    alone, together = [read(*x) for x in zip(pair, texts, strict=True)], [None, None]
    ready = threading.Barrier(2)

    def run(i):
        ready.wait(timeout=60)
        together[i] = read(pair[i], texts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for ours, expected in zip(together, alone, strict=True):
        assert not mismatch(ours, expected, atol=1e-5, rtol=0)
