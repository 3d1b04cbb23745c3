"""A decoded token over packed and exact tokens in one softmax gives what the segments give one by one."""

from __future__ import annotations

import pytest
import torch

from agentkv.eval import tiny as families
from tests.compare import mismatch
from tests.textkv import kinds, tiny
from textkv import MethodCache
from textkv.kernels.beside import Exact
from textkv.layer import Layer
from textkv.methods.mikv import MiKV
from textkv.segments.base import Segment
from textkv.segments.packed import PackedSegment

METHODS = ("kivi(4)", "gear(2)", "mikv(16,4)", "snapkv+mikv(16,4)", "adakv+kivi(4)", "kivi(4,centre='turned')")


def decoded(model, method: str, prompt: torch.Tensor, steps: int, mask: torch.Tensor | None = None):
    """Logits of some tokens behind a prompt."""
    cache = MethodCache(model, method, "0.5")
    kinds.logits(model, prompt, cache, mask)
    return kinds.steps(model, kinds.ids(steps, len(prompt), seed=1), cache, mask)


def both(monkeypatch, *args, **kwargs):
    """`decoded` as it is, and with every segment by itself; how often one softmax was taken."""
    calls = []
    once = PackedSegment._attend

    def seen(segment, q, scale, softcap, hidden, exact=None):
        calls.append(exact is not None)
        return once(segment, q, scale, softcap, hidden, exact)

    monkeypatch.setattr(PackedSegment, "_attend", seen)
    ours = decoded(*args, **kwargs)
    monkeypatch.setattr(PackedSegment, "takes_beside", False)
    true = decoded(*args, **kwargs)
    monkeypatch.undo()
    return ours, true, sum(calls)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_softmax_gives_what_a_merge_gives(method, family, monkeypatch):
    # Fewer tokens than are packed together: a code that another rounding moves would hide what is compared.
    ours, true, calls = both(monkeypatch, tiny.build(family), method, kinds.ids(150, 2), 12)
    assert calls >= (0 if method.startswith("adakv") else 12 * 3)
    assert torch.allclose(ours, true, atol=2e-5)


@pytest.mark.parametrize("kind", ["sliding", "sinks"])
def test_windows_and_sinks(kind, monkeypatch):
    ours, true, calls = both(monkeypatch, kinds.model_of_kind(kind), "kivi(4)", kinds.ids(150), 12)
    assert calls and torch.allclose(ours, true, atol=2e-5)


def test_rows_with_padding_are_read_one_segment_after_the_other(monkeypatch):
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :30] = 0
    ours, true, _ = both(monkeypatch, tiny.build("llama"), "kivi(4)", kinds.ids(150, 2), 12, mask)
    assert torch.allclose(ours, true, atol=2e-5)


def test_where_layers_share_keys_a_method_acts_by_the_owners_own_look(monkeypatch):
    """Gemma 3n: later layers read an earlier one's keys, and its own query's shares stay its own."""
    model = families.build("gemma3n_text")
    cache, looked, acted = MethodCache(model, "mikv(16,4)", 0.4), {}, {}
    with torch.no_grad():
        kinds.logits(model, kinds.ids(80), cache)
    attend, end = Layer._attend, MiKV.on_decode_end

    def attended(layer, *given, **told):
        out = attend(layer, *given, **told)
        looked.setdefault(layer.index, layer.last_share)
        return out

    def ended(method, layer, query):
        acted[layer.index] = layer.last_share
        end(method, layer, query)

    monkeypatch.setattr(Layer, "_attend", attended)
    monkeypatch.setattr(MiKV, "on_decode_end", ended)
    with torch.no_grad():
        kinds.logits(model, kinds.ids(1, seed=1), cache)
    shares = [(looked[index], share) for index, share in acted.items() if share is not None]
    assert shares and all(torch.equal(*pair) for pair in shares)


@pytest.mark.parametrize("method", ["kivi(4)", "mikv(16,4)"])
def test_a_segment_that_has_no_softmax_for_both_merges_two(method):
    """What every segment can do, ours from outside the package too, beside what a packed one does."""
    model = tiny.build("llama")
    cache = MethodCache(model, method, 0.5)
    with torch.no_grad():
        kinds.logits(model, kinds.ids(80), cache)
    layer = cache.layers[0]
    packed, near = layer.segments[0], layer.segments[-1].rectangle()
    q = torch.randn(1, layer.kv_heads * 2, 1, layer.head_dim, generator=torch.Generator().manual_seed(3))
    for exact in (Exact([near], row=True), Exact([near])):
        ours, plain = (x.attend_beside(packed, q, 0.3, None, exact) for x in (type(packed), Segment))
        assert len(ours) == len(plain) == 2 + exact.row
        assert all(not mismatch(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(ours, plain, strict=True))
