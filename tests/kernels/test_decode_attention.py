from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.helpers import causal_mask, mismatch, naive, poisoned, ragged, randn
from textkv.kernels import compact, decode_attention

module = importlib.import_module("textkv.kernels.decode_attention")


@pytest.mark.parametrize("B, G, group, m, n, D", [(1, 1, 1, 1, 1, 64), (2, 2, 4, 3, 65, 80), (3, 1, 7, 5, 4, 128)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("mask", [None, "row", "head"])
def test_reference_equals_the_formula(B, G, group, m, n, D, causal, mask, poison):
    q, k, v = randn(B, G * group, m, D), randn(B, G, n, D), randn(B, G, n, D)
    seen = causal_mask(m, n) if causal else torch.ones(m, n, dtype=torch.bool)
    valid = {None: None, "row": torch.rand(B, n) > 0.4, "head": torch.rand(B, G, n) > 0.4}[mask]
    if valid is not None:
        per_head = valid if mask == "head" else valid[:, None]
        k, v = poisoned(k, per_head), poisoned(v, per_head)
        seen = seen & per_head.expand(B, G, n).repeat_interleave(group, 1)[:, :, None]
    truth = naive(q, k.nan_to_num(0), v.nan_to_num(0), 0.3, seen)
    assert not mismatch(decode_attention(q, k, v, scale=0.3, causal=causal, valid=valid), truth)


def test_reference_in_blocks_of_queries_equals_one_block(monkeypatch):
    q, k, v = randn(2, 4, 23, 16), randn(2, 2, 40, 16), randn(2, 2, 40, 16)
    whole = decode_attention(q, k, v, scale=0.3, causal=True)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 4 * 40 * 5)
    assert not mismatch(decode_attention(q, k, v, scale=0.3, causal=True), whole)


@pytest.mark.parametrize(
    "B, G, group, m, n, D",
    [(1, 1, 1, 1, 1, 64), (1, 2, 4, 1, 2, 80), (3, 1, 7, 1, 63, 64), (1, 2, 1, 3, 64, 128), (1, 1, 8, 1, 65, 80)],
)
def test_dense_kernel_equals_reference(B, G, group, m, n, D, dtype, interpreted):
    q, k, v = (randn(B, h, t, D, dtype=dtype) for h, t in ((G * group, m), (G, n), (G, n)))
    truth = decode_attention(q, k, v, scale=D**-0.5)
    assert not mismatch(decode_attention(q, k, v, scale=D**-0.5, _backend="triton"), truth)


@pytest.mark.parametrize("mask", ["row", "head"])
def test_masked_slots_are_never_read(mask, dtype, interpreted):
    q, k, v = (randn(2, h, t, 64, dtype=dtype) for h, t in ((4, 2), (2, 90), (2, 90)))
    valid = torch.rand(*((2, 90) if mask == "row" else (2, 2, 90))) > 0.5
    valid[1] = False  # a batch row with nothing to see
    per_head = valid[:, None] if mask == "row" else valid
    k, v = poisoned(k, per_head), poisoned(v, per_head)
    out, lse = decode_attention(q, k, v, scale=0.2, valid=valid, causal=True, _backend="triton")
    true, true_lse = decode_attention(q, k, v, scale=0.2, valid=valid, causal=True)
    assert not mismatch(out, true)
    assert not mismatch(lse, true_lse)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("m, n", [(9, 100), (40, 33)])
def test_causal_block_of_queries(m, n, interpreted):
    # m 40 x group 2 is more than one tile of query rows, and the first 7 of 40 queries on 33 keys see nothing
    q, k, v = randn(1, 4, m, 64), randn(1, 2, n, 64), randn(1, 2, n, 64)
    truth = naive(q, k, v, 0.2, causal_mask(m, n))
    assert not mismatch(decode_attention(q, k, v, scale=0.2, causal=True, _backend="triton"), truth)


@pytest.mark.parametrize("m, causal", [(1, False), (1, True), (5, True), (24, True)])
def test_ragged_kernel_equals_dense_row_by_row(m, causal, interpreted):
    k, v, rows = ragged(lengths=(0, 1, 20, 70) if m == 24 else (0, 1, 70, 300))
    q = randn(2, 6, m, 64)  # B 2, G 2, group 3
    out, lse = decode_attention(q, k, v, scale=0.2, causal=causal, **rows, _backend="triton")
    reference = decode_attention(q, k, v, scale=0.2, causal=causal, **rows)
    for r, (s, n) in enumerate(zip(rows["start"].tolist(), rows["length"].tolist(), strict=True)):
        b, heads = r // 2, slice(r % 2 * 3, r % 2 * 3 + 3)
        seen = causal_mask(m, n) if causal else torch.ones(m, n, dtype=torch.bool)
        true = naive(q[b : b + 1, heads], k[None, None, s : s + n], v[None, None, s : s + n], 0.2, seen)
        for got, want in zip(((out, lse), reference), (true, true), strict=True):
            assert not mismatch(got[0][b : b + 1, heads], want[0])
            assert not mismatch(got[1][b : b + 1, heads], want[1])


def test_ragged_kernel_in_bf16(interpreted):
    k, v, rows = ragged(torch.bfloat16, lengths=(65, 0))
    q = randn(1, 8, 2, 64, dtype=torch.bfloat16)
    truth = decode_attention(q, k, v, scale=0.2, causal=True, **rows)
    assert not mismatch(decode_attention(q, k, v, scale=0.2, causal=True, **rows, _backend="triton"), truth)


def test_appending_to_one_head_leaves_the_others_bit_equal(interpreted):
    k, v, rows = ragged(lengths=(256, 40), slack=8)
    q = randn(1, 2, 1, 64)
    before, _ = decode_attention(q, k, v, scale=0.2, **rows, _backend="triton")
    k[256], v[256] = torch.ones(64), torch.ones(64)  # head 0 grows into its slack, and into a second tile
    longer = rows | {"length": rows["length"] + torch.tensor([1, 0], dtype=torch.int32)}
    after, _ = decode_attention(q, k, v, scale=0.2, **longer, _backend="triton")
    assert torch.equal(before[:, 1], after[:, 1]) and not torch.equal(before[:, 0], after[:, 0])


@pytest.mark.parametrize("split", [20, 64, 100, 1000])
def test_result_does_not_depend_on_the_split(split, interpreted):
    q, k, v = randn(1, 2, 2, 64), randn(1, 1, 200, 64), randn(1, 1, 200, 64)
    arguments = {"scale": 0.2, "causal": True, "valid": None, "start": None, "length": None}
    assert not mismatch(module._launch(q, k, v, **arguments, split=split), module.reference(q, k, v, **arguments))
    flat = arguments | {"start": torch.tensor([0]), "length": torch.tensor([200], dtype=torch.int32)}
    assert not mismatch(
        module._launch(q, k[0, 0], v[0, 0], **flat, split=split), module.reference(q, k, v, **arguments)
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_extreme_scores(backend, interpreted):
    q = torch.ones(1, 1, 1, 64)
    v = torch.arange(70.0)[None, None, :, None].expand(1, 1, 70, 64)
    equal = decode_attention(q, torch.ones(1, 1, 70, 64), v, scale=1.0, _backend=backend)
    assert not mismatch(equal[0], torch.full((1, 1, 1, 64), 34.5))
    k = torch.full((1, 1, 70, 64), -1e4 / 64)
    k[:, :, 66] = 1e4 / 64  # one key at +1e4, all others at -1e4
    out, lse = decode_attention(q, k, v, scale=1.0, _backend=backend)
    assert not mismatch(out, torch.full((1, 1, 1, 64), 66.0))
    assert not mismatch(lse, torch.full((1, 1, 1), 1e4))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("m, n", [(1, 0), (0, 5)])
def test_empty_segment_and_no_query(m, n, backend, interpreted):
    q, k = randn(1, 2, m, 64), randn(1, 1, n, 64)
    out, lse = decode_attention(q, k, k, scale=0.2, _backend=backend)
    assert out.shape == (1, 2, m, 64) and (out == 0).all() and (lse == -torch.inf).all()
    none = {"start": torch.zeros(1, dtype=torch.int64), "length": torch.zeros(1, dtype=torch.int32)}
    out, lse = decode_attention(q, k.reshape(-1, 64)[:0], k.reshape(-1, 64)[:0], scale=0.2, **none, _backend=backend)
    assert out.shape == (1, 2, m, 64) and (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_inputs(backend, interpreted):
    q = randn(1, 3, 4, 64).transpose(1, 2)  # as projections give it: heads inside tokens
    k, v = randn(1, 2, 80, 64)[:, :, 10:60], randn(1, 2, 64, 50).mT  # a slice of a larger store; channels strided
    truth = decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.2)
    assert not mismatch(decode_attention(q, k, v, scale=0.2, _backend=backend), truth)


def test_ragged_equals_masked_dense():
    q, k, v = randn(2, 4, 1, 32), randn(2, 2, 50, 32), randn(2, 2, 50, 32)
    keep = torch.rand(2, 2, 50) > 0.5
    rows = compact(k, v, keep)
    dense = decode_attention(q, k, v, scale=0.2, valid=keep)
    assert not mismatch(decode_attention(q, rows.k, rows.v, scale=0.2, start=rows.start, length=rows.length), dense)


Q, K, FLAT = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 5, 16), torch.zeros(9, 16)
START, LENGTH = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int32)


@pytest.mark.parametrize(
    "q, k, v, options, message",
    [
        (Q[0], K, K, {}, r"q has shape \[4, 1, 16\]; it must be \[B, H, m, D\]"),
        (Q.double(), K, K, {}, "q is float64; it must be float16 or bfloat16 or float32"),
        (torch.zeros(1, 1, 1, 513), K, K, {}, "q has head_dim 513 .* the limit is 1..512"),
        (Q, K[:1], K, {}, r"k has shape \[1, 2, 5, 16\]; it must be \[2, G, n, 16\]"),
        (Q, K.half(), K, {}, "k is float16; it must be float32"),
        (Q, K, K[:, :, :4], {}, r"v has shape \[2, 2, 4, 16\]; it must be \[2, 2, 5, 16\]"),
        (Q, K.to("meta"), K, {}, "k is on meta; it must be on cpu"),
        (Q[:, :3], K, K, {}, "q has 3 heads and k has 2; the first must be a multiple of the second"),
        (Q, K, K, {"valid": torch.ones(2, 4, dtype=torch.bool)}, r"valid has shape \[2, 4\]; it must be \[2, 5\]"),
        (Q, K, K, {"valid": torch.ones(2, 5)}, "valid is float32; it must be bool"),
        (Q, K, K, {"start": START}, "start and length come together"),
        (Q, K, K, {"_backend": "cuda"}, "_backend='cuda' is not known"),
        (Q, K, K, {"start": START, "length": LENGTH}, r"k has shape \[2, 2, 5, 16\]; it must be \[total, 16\]"),
        (Q, FLAT, FLAT, {"start": START.int(), "length": LENGTH}, "start is int32; it must be int64"),
        (Q, FLAT, FLAT, {"start": START, "length": LENGTH.long()}, "length is int64; it must be int32"),
        (Q, FLAT, FLAT, {"start": START[:3], "length": LENGTH[:3]}, r"start has shape \[3\]; it must be \[B \* G\]"),
        (Q, FLAT, FLAT, {"start": START, "length": LENGTH * 10}, "start and length reach outside the 9 rows of k"),
        (Q, FLAT, FLAT, {"start": START, "length": LENGTH, "valid": K > 0}, "valid has no meaning for ragged rows"),
    ],
)
def test_errors_name_the_argument(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, scale=1.0, **options)
