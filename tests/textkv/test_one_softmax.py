"""A decoded token over packed and exact tokens in one softmax gives what the segments give one by one."""

from __future__ import annotations

import pytest
import torch

from tests.textkv import kinds, tiny
from textkv import MethodCache
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
    monkeypatch.setattr(
        PackedSegment, "_attend", lambda *a, beside=(), **k: calls.append(bool(beside)) or once(*a, beside=beside, **k)
    )
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
