"""The fused path of a CPU against the reference, and what a call of it costs."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from tests.kernels.helpers import mismatch, poisoned, ragged, randn
from textkv.kernels import decode_attention, merge
from textkv.kernels._fused import _QUERIES

SHAPES = [(1, 1, 1, 1, 64), (1, 3, 3, 65, 64), (2, 2, 4, 33, 80), (3, 1, 7, 130, 20), (2, 4, 1, 70, 512)]


def differs(*args, **options):
    """What the fused path gives otherwise than the reference, "" = nothing."""
    ours = decode_attention(*args, **options, _backend="fused")
    truth = decode_attention(*args, **options, _backend="reference")
    exact = args[0].dtype == torch.float32
    said = (
        mismatch(*pair, 2e-5 if exact and pair[0].dtype == torch.float32 else 1.2e-2)
        for pair in zip(ours, truth, strict=True)
    )
    return "\n".join(filter(None, said))


@pytest.mark.parametrize("B, G, group, n, D", SHAPES)
@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "row", "head", "all", "none"])
def test_dense(B, G, group, n, D, m, causal, mask, dtype):
    q, k, v = (randn(B, h, t, D, dtype=dtype) for h, t in ((G * group, m), (G, n), (G, n)))
    valid = {None: None, "row": torch.rand(B, n) > 0.4, "head": torch.rand(B, G, n) > 0.4}.get(mask, mask)
    if mask in ("all", "none"):
        valid = torch.full((B, n), mask == "all")
    if valid is not None:
        per_head = valid if valid.dim() == 3 else valid[:, None].expand(B, G, n)
        k, v = poisoned(k, per_head), poisoned(v, per_head)
    assert not differs(q, k, v, scale=D**-0.5, causal=causal, valid=valid)
    if mask == "none":
        out, lse = decode_attention(q, k, v, scale=D**-0.5, causal=causal, valid=valid, _backend="fused")
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_half_precision_as_the_reference():
    q, k, v = (randn(2, h, t, 64, dtype=torch.float16) for h, t in ((6, 3), (2, 50), (2, 50)))
    assert not differs(q, k, v, scale=0.1, causal=True)


@pytest.mark.parametrize("window", [None, 9, 700])
@pytest.mark.parametrize("mask", [False, True])
def test_many_queries_go_by_blocks(window, mask):
    m, n = _QUERIES + 90, _QUERIES + 200
    q, k, v = (randn(1, h, t, 16) for h, t in ((2, m), (1, n), (1, n)))
    valid = torch.rand(1, n) > 0.2 if mask else None
    assert not differs(q, k, v, scale=0.3, causal=True, window=window, valid=valid)
    assert not differs(q, k, v, scale=0.3, causal=True, window=window, visible=torch.rand(1, m, n) > 0.2)
    assert not differs(k, q[:, :1], v[:, :, :m], scale=0.3, causal=True, window=window)  # more queries than keys


@pytest.mark.parametrize("m, causal", [(1, False), (1, True), (5, True), (80, True), (80, False)])
def test_ragged(m, causal, dtype):
    k, v, rows = ragged(dtype, lengths=(0, 1, 70, 130))
    assert not differs(randn(2, 6, m, 64, dtype=dtype), k, v, scale=0.2, causal=causal, **rows)
    one = {"start": rows["start"][3:], "length": rows["length"][3:]}
    assert not differs(randn(1, 3, m, 64, dtype=dtype), k, v, scale=0.2, causal=causal, **one)


def test_strided_and_sliced_storage_is_read_where_it_lies():
    q = randn(2, 3, 4, 64).transpose(1, 2)
    k, v = randn(2, 2, 80, 64)[:, :, 10:60], randn(2, 80, 2, 64).transpose(1, 2)[:, :, :50]
    assert not differs(q, k, v, scale=0.2, causal=True)
    assert not differs(q, k, randn(2, 2, 64, 50).mT, scale=0.2)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -3e38, 1.0])
def test_whatever_an_invalid_slot_holds(junk):
    q, k, v = randn(1, 4, 2, 32), randn(1, 2, 40, 32), randn(1, 2, 40, 32)
    valid = torch.rand(1, 40) > 0.3
    truth = decode_attention(q, k, v, scale=0.2, valid=valid, _backend="reference")
    k, v = (x.masked_fill(~valid[:, None, :, None], junk) for x in (k, v))
    assert not mismatch(decode_attention(q, k, v, scale=0.2, valid=valid), truth)


def test_gradients_take_the_reference():
    q, k = randn(1, 2, 1, 16).requires_grad_(), randn(1, 1, 5, 16)
    with pytest.raises(ValueError, match="_backend='fused' needs a CPU .* no gradient"):
        decode_attention(q, k, k, scale=1.0, _backend="fused")
    decode_attention(q, k, k, scale=1.0)
    with torch.no_grad():
        assert not differs(q, k, k, scale=1.0)


def calls(function):
    """Names of torch's operators that `function` calls, those that they call left out."""
    function()
    with profile() as seen:
        function()
    return [event.name for event in seen.events() if event.cpu_parent is None and event.name.startswith("aten::")]


def test_a_decoded_token_costs_a_handful_of_operators():
    q, k = randn(1, 9, 1, 64), randn(1, 3, 64, 64)
    made = calls(lambda: decode_attention(q, k[:, :, :40], k[:, :, :40], scale=0.1))
    assert len(made) <= 12 and sum("attention" in name for name in made) == 1
    window = calls(lambda: decode_attention(q, k, k, scale=0.1, causal=True, window=20))
    assert len(window) <= 12


def test_joining_two_parts_costs_few_operators_and_asks_nothing_of_the_host():
    outs, lses = [randn(1, 4, 1, 16) for _ in range(2)], [randn(1, 4, 1) for _ in range(2)]
    made = calls(lambda: merge(outs, lses))
    assert len(made) <= 14 and "aten::item" not in made
    assert not mismatch(merge(outs, lses), merge(outs, lses, _backend="reference"))
