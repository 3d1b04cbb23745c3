"""VATP: SnapKV's score times the value's L1 norm."""

from __future__ import annotations

import pytest
import torch

from tests.textkv.tiny import build
from textkv import MethodCache


def kept(method: str, scale_of: int | None = None) -> set[int]:
    """Tokens that head 0 of layer 0 keeps of 60 at a budget of 16; `scale_of` = a token whose value is made large."""
    model = build("llama")
    cache = MethodCache(model, method, budget="16t")
    layer = cache.layers[0]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 60, 16) for heads in (4, 2, 2))
    if scale_of is not None:
        v[:, :, scale_of] *= 1000
    layer.update(k, v)
    layer.feed(q, k, v, 0.25)
    return set(layer.stored().positions[0, 0].tolist())


def test_a_large_value_is_kept_and_only_here() -> None:
    dull = next(t for t in range(10, 50) if t not in kept("snapkv(window=4,kernel=1)"))
    assert dull in kept("vatp(window=4,kernel=1)", scale_of=dull)
    assert dull not in kept("snapkv(window=4,kernel=1)", scale_of=dull)


def test_first_tokens_stay_up_to_a_quarter_of_the_budget() -> None:
    assert {0, 1, 2, 3} <= kept("vatp(window=4)")
    assert kept("vatp(window=32)") >= {0, 1, 2, 3, 58, 59}  # a window that does not fit gives way, not its last tokens
    assert {0, 1} <= kept("vatp(window=4,sinks=2)")


def test_values_of_one_size_leave_snapkv() -> None:
    model = build("llama")
    caches = [
        MethodCache(model, m, budget=0.4) for m in ("snapkv(window=4,kernel=1)", "vatp(window=4,kernel=1,sinks=0)")
    ]
    torch.manual_seed(1)
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    for cache in caches:
        cache.layers[0].update(k, torch.ones_like(k))
        cache.layers[0].feed(q, k, torch.ones_like(k), 0.25)
    first, second = (cache.layers[0].stored().positions for cache in caches)
    assert torch.equal(first, second)


def test_negative_sinks_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks=-1"):
        MethodCache(build("llama"), "vatp(sinks=-1)")
