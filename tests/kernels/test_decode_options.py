"""What models ask of attention beyond the plain kind: soft caps, sliding windows, masks by query, wide heads."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import TOLERANCE, causal_mask, mismatch, naive, poisoned, ragged, randn
from textkv.kernels import decode_attention, merge

BACKENDS = pytest.mark.parametrize("backend", ["reference", "fused", "triton"])
CAPPING = pytest.mark.parametrize("backend", ["reference", "triton"])


def sample(B, G, group, m, n, D, dtype=torch.float32):
    return (randn(B, h, t, D, dtype=dtype) for h, t in ((G * group, m), (G, n), (G, n)))


@CAPPING
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("m, n, causal", [(1, 65, False), (5, 40, True)])
def test_soft_cap(softcap, m, n, causal, backend, interpreted):
    q, k, v = sample(2, 2, 3, m, n, 64)
    q = 3 * q  # scores of some tens
    seen = causal_mask(m, n) if causal else torch.ones(m, n, dtype=torch.bool)
    ours = decode_attention(q, k, v, scale=0.4, causal=causal, softcap=softcap, _backend=backend)
    assert not mismatch(ours, naive(q, k, v, 0.4, seen, softcap), 3e-5)


@CAPPING
def test_soft_cap_of_ragged_rows_and_of_extreme_scores(backend, interpreted):
    k, v, rows = ragged(lengths=(0, 1, 70, 130))
    q = randn(2, 6, 3, 64)
    out, lse = decode_attention(q, k, v, scale=40.0, causal=True, softcap=30.0, **rows, _backend=backend)
    for r, (s, n) in enumerate(zip(rows["start"].tolist(), rows["length"].tolist(), strict=True)):
        b, heads = r // 2, slice(r % 2 * 3, r % 2 * 3 + 3)
        flat = (x[None, None, s : s + n] for x in (k, v))
        true = naive(q[b : b + 1, heads], *flat, 40.0, causal_mask(3, n), 30.0)
        assert not mismatch((out[b : b + 1, heads], lse[b : b + 1, heads]), true, 5e-5)


def test_a_large_soft_cap_changes_nothing():
    q, k, v = sample(1, 2, 2, 2, 30, 32)
    assert not mismatch(decode_attention(q, k, v, scale=0.2, softcap=1e6), decode_attention(q, k, v, scale=0.2), 1e-4)


@BACKENDS
@pytest.mark.parametrize("m, n", [(1, 90), (2, 90), (7, 90), (40, 90), (40, 33), (90, 90)])
@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_window(window, m, n, backend, interpreted):
    q, k, v = sample(1, 2, 2, m, n, 32)
    ours = decode_attention(q, k, v, scale=0.2, causal=True, window=window, _backend=backend)
    assert not mismatch(ours, naive(q, k, v, 0.2, causal_mask(m, n, window)))


@BACKENDS
@pytest.mark.parametrize("m, window", [(1, 1), (1, 40), (6, 3), (6, 100)])
def test_window_of_ragged_rows(m, window, backend, interpreted):
    k, v, rows = ragged(lengths=(0, 1, 70, 300))
    q = randn(2, 6, m, 64)
    out, lse = decode_attention(q, k, v, scale=0.2, causal=True, window=window, **rows, _backend=backend)
    for r, (s, n) in enumerate(zip(rows["start"].tolist(), rows["length"].tolist(), strict=True)):
        b, heads = r // 2, slice(r % 2 * 3, r % 2 * 3 + 3)
        flat = (x[None, None, s : s + n] for x in (k, v))
        true = naive(q[b : b + 1, heads], *flat, 0.2, causal_mask(m, n, window))
        assert not mismatch((out[b : b + 1, heads], lse[b : b + 1, heads]), true)


@BACKENDS
def test_window_and_holes(backend, interpreted):
    q, k, v = sample(2, 2, 2, 4, 80, 32)
    valid = torch.rand(2, 80) > 0.4
    k, v = poisoned(k, valid[:, None]), poisoned(v, valid[:, None])
    seen = causal_mask(4, 80, 9) & valid[:, None, None]
    ours = decode_attention(q, k, v, scale=0.2, causal=True, window=9, valid=valid, _backend=backend)
    assert not mismatch(ours, naive(q, k.nan_to_num(0), v.nan_to_num(0), 0.2, seen))


@BACKENDS
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("holes", [None, "row", "head"])
def test_visible(rows, m, causal, holes, backend, interpreted):
    q, k, v = sample(2, 2, 3, m, 70, 32)
    visible = torch.rand(rows, m, 70) > 0.4
    visible[:, 0] = False  # a query that sees nothing
    seen = visible[:, None] & causal_mask(m, 70) if causal else visible[:, None]
    valid = {None: None, "row": torch.rand(2, 70) > 0.4, "head": torch.rand(2, 2, 70) > 0.4}[holes]
    if valid is not None:
        per_head = valid if holes == "head" else valid[:, None].expand(2, 2, 70)
        k, v = poisoned(k, per_head), poisoned(v, per_head)
        seen = seen & per_head.repeat_interleave(3, 1)[:, :, None]
    out, lse = decode_attention(q, k, v, scale=0.2, causal=causal, visible=visible, valid=valid, _backend=backend)
    assert not mismatch((out, lse), naive(q, k.nan_to_num(0), v.nan_to_num(0), 0.2, seen))
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -torch.inf).all()


@BACKENDS
def test_everything_at_once(backend, interpreted):
    q, k, v = sample(1, 2, 2, 20, 90, 32)
    valid, visible = torch.rand(1, 2, 90) > 0.3, torch.rand(1, 20, 90) > 0.3
    softcap = None if backend == "fused" else 3.0
    seen = causal_mask(20, 90, 30) & visible[:, None] & valid.repeat_interleave(2, 1)[:, :, None]
    options = {"causal": True, "window": 30, "valid": valid, "visible": visible, "softcap": softcap}
    assert not mismatch(
        decode_attention(q, k, v, scale=0.5, **options, _backend=backend), naive(q, k, v, 0.5, seen, softcap), 3e-5
    )


@BACKENDS
def test_heads_of_512_channels(backend, dtype, interpreted):
    q, k, v = sample(1, 1, 8, 3, 40, 512, dtype)
    ours = decode_attention(q, k, v, scale=0.05, causal=True, _backend=backend)
    assert not mismatch(ours, naive(q, k, v, 0.05, causal_mask(3, 40)), TOLERANCE[dtype])
    halves = [decode_attention(q, k[:, :, a:b], v[:, :, a:b], scale=0.05) for a, b in ((0, 9), (9, 40))]
    merged = merge(*zip(*halves, strict=True), _backend=backend)
    assert not mismatch(merged, naive(q, k, v, 0.05, torch.ones(3, 40, dtype=torch.bool)), 2 * TOLERANCE[dtype])


Q, K, FLAT = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16), torch.zeros(9, 16)
ROWS = {"start": torch.zeros(4, dtype=torch.int64), "length": torch.ones(4, dtype=torch.int32)}


@pytest.mark.parametrize(
    "k, options, message",
    [
        (K, {"softcap": 0.0}, "softcap=0.0 must be above 0; None leaves the scores as they are"),
        (K, {"window": 3}, "window=3 counts back from each query's own token; it needs causal=True"),
        (K, {"window": 0, "causal": True}, "window=0 must be at least 1"),
        (K, {"visible": torch.ones(2, 3, 4) > 0}, r"visible has shape \[2, 3, 4\]; it must be \[2, 3, 5\]"),
        (K, {"visible": torch.ones(1, 2, 5) > 0}, r"visible has shape \[1, 2, 5\]; it must be \[1, 3, 5\]"),
        (K, {"visible": torch.ones(2, 3, 5)}, "visible is float32; it must be bool"),
        (FLAT, ROWS | {"visible": torch.ones(2, 3, 9) > 0}, "visible has no meaning for ragged rows"),
        (FLAT, ROWS | {"window": 2}, "window=2 counts back"),
        (K, {"softcap": 1.0, "_backend": "fused"}, r"_backend='fused' needs a CPU .* softcap=None \(it is 1.0\)"),
    ],
)
def test_errors_name_the_argument(k, options, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(Q, k, k, scale=1.0, **options)
