"""Composition strings, the registry, and what is refused when a method is built."""

import pytest

import textkv
from textkv import list_methods, resolve_method
from textkv.methods.adakv import AdaKV
from textkv.methods.snapkv import SnapKV


def test_arguments_and_nesting():
    method = resolve_method("snapkv(16, kernel=7)+adakv(floor=0.5)", 0.3)
    assert isinstance(method, AdaKV) and method.floor == 0.5
    assert isinstance(method.inner, SnapKV) and (method.inner.window, method.inner.kernel) == (16, 7)
    assert method.inner.budget == method.budget


@pytest.mark.parametrize("text", ["full", "snapkv(window=16)", "snapkv+adakv(floor=0.5)", "streaming_llm(sinks=2)"])
def test_expression_builds_the_same_method(text):
    assert resolve_method(resolve_method(text).expression) == resolve_method(text)


def test_a_wrapper_alone_wraps_its_papers_scorer():
    assert resolve_method("adakv", 0.2).inner == SnapKV(budget=textkv.Budget(0.2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapvk", "unknown method 'snapvk'; did you mean snapkv"),
        ("zzz", "unknown method 'zzz'; known: "),
        ("", "is malformed"),
        ("snapkv++adakv", "is malformed"),
        ("snapkv(window=16", "is malformed"),
        ("snapkv(8)(9)", "plain numbers"),
        ("snapkv(8)>(9)", "plain numbers"),
        ("snapkv(" + "-" * 20_000 + "8)", "plain numbers"),
        (".here:Class", "cannot import"),
        ("snapkv(window=__import__('os'))", "arguments must be plain"),
        ("snapkv(widnow=16)", "its arguments are: window, kernel, pooling"),
        ("snapkv(window=0)", "window=0"),
        ("snapkv(kernel=4)", "odd width"),
        ("snapkv(pooling='min')", "use 'avg' or 'max'"),
        ("adakv+snapkv", "snapkv cannot follow adakv+: it wraps no other method"),
        ("full+adakv", "adakv needs importance scores and full gives none; put a scorer before it:"),
        ("window+adakv", "adakv needs importance scores and window gives none"),
        ("adakv(floor=2)", "floor=2"),
        ("adakv(safeguard='none')", "use 'mix' or 'protect'"),
        ("streaming_llm(sinks=-1)", "sinks=-1"),
        ("streaming_llm(positions='new')", "use 'cache' or 'original'"),
        ("streaming_llm(prefill='exact_stream')", "needs the budget in tokens"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError) as caught:
        resolve_method(text)
    assert message in str(caught.value)


def test_a_budget_without_a_recent_token_is_refused():
    with pytest.raises(ValueError, match="use 5t or more"):
        resolve_method("streaming_llm", "4t")


def test_names_are_taken_once():
    assert {"full", "window", "streaming_llm", "snapkv", "adakv"} <= set(list_methods())
    with pytest.raises(ValueError, match="method name 'full' is taken"):
        textkv.register("full")(SnapKV)


def test_public_surface():
    assert set(textkv.__all__) == {
        "AtRest", "Budget", "CacheReport", "Capabilities", "Conversation", "Method", "MethodCache", "Needs",
        "list_methods", "register", "release", "resolve_method", "split_list", "use",
    }  # fmt: skip
