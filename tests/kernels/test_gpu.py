"""The numerics once more on a real GPU: compiled kernels, bf16, sizes that the interpreter cannot reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.compare import mismatch
from textkv.kernels import (
    coded_attention,
    compact,
    confidence,
    decode_attention,
    merge,
    pack,
    packed_attention,
    rotate,
    subspace_residual,
    window_mass,
)
from textkv.kernels.codebook import encode
from textkv.kernels.pack import LowRank, Sparse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def differs(function, *args, tolerance, **kwargs):
    """What the kernel gives otherwise than the reference, "" = nothing."""
    ours, truth = function(*args, **kwargs), function(*args, **kwargs, _backend="reference")
    pairs = zip(ours, truth, strict=True) if isinstance(ours, tuple) else [(ours, truth)]
    return "\n".join(filter(None, (mismatch(x.float(), y.float(), rtol=tolerance, atol=tolerance) for x, y in pairs)))


@DTYPES
@pytest.mark.parametrize("group, m, n, D", [(1, 1, 1, 64), (7, 1, 32768, 128), (4, 3, 5000, 80), (8, 2000, 3000, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention(group, m, n, D, causal, dtype, poison):
    q, k, v = (randn(2, h, t, D, dtype=dtype) for h, t in ((2 * group, m), (2, n), (2, n)))
    valid = torch.rand(2, n, device="cuda") > 0.3
    options = {"scale": D**-0.5, "causal": causal, "tolerance": TOLERANCE[dtype]}
    assert not differs(decode_attention, q, k, v, **options)
    k[~valid[:, None].expand(2, 2, n)] = v[~valid[:, None].expand(2, 2, n)] = float("nan")
    assert not differs(decode_attention, q, k, v, valid=valid, **options)


@DTYPES
@pytest.mark.parametrize("m", [1, 5, 300])
def test_ragged_attention_waits_for_nothing(m, dtype, poison):
    lengths = [0, 1, 20_000, 257]
    k, v = randn(25_000, 128, dtype=dtype), randn(25_000, 128, dtype=dtype)
    start = torch.tensor([0, 10, 20, 24_000], device="cuda")
    length = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    q = randn(2, 14, m, 128, dtype=dtype)
    options = {"scale": 128**-0.5, "causal": True, "start": start, "length": length}
    assert not differs(decode_attention, q, k, v, **options, tolerance=TOLERANCE[dtype])
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q, k, v, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits():
    n = 2**31 // 128 + 1000
    k = torch.zeros(n, 128, dtype=torch.float16, device="cuda")
    k[-300:] = torch.randn(300, 128, device="cuda")
    start, length = torch.tensor([n - 300], device="cuda"), torch.tensor([300], dtype=torch.int32, device="cuda")
    options = {"scale": 0.1, "start": start, "length": length, "tolerance": 2e-3}
    assert not differs(decode_attention, torch.randn(1, 4, 1, 128, device="cuda").half(), k, k, **options)


@DTYPES
def test_merge(dtype, poison):
    outs, lses = [randn(2, 28, 5, 128, dtype=dtype) for _ in range(6)], [randn(2, 28, 5) for _ in range(6)]
    lses[2][0] = -torch.inf
    assert not differs(merge, outs, lses, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("group, w, n", [(7, 64, 32768), (4, 8, 5000), (8, 3000, 3000)])
def test_window_mass(group, w, n, dtype, poison):
    q, k = randn(1, 2 * group, w, 128, dtype=dtype), randn(1, 2, n, 128, dtype=dtype)
    valid = torch.rand(1, 2, n, device="cuda") > 0.3
    tolerance = 1e-3
    assert not differs(window_mass, q, k, scale=128**-0.5, tolerance=tolerance)
    assert not differs(window_mass, q, k, scale=128**-0.5, valid=valid, squares=True, tolerance=tolerance)


@DTYPES
def test_subspace_residual(dtype, poison):
    basis = torch.linalg.qr(randn(2, 4, 128, 32))[0]
    assert not differs(subspace_residual, randn(2, 4, 5000, 128, dtype=dtype), basis, tolerance=1e-3)


@DTYPES
@pytest.mark.parametrize("n, V", [(1, 126_464), (32, 152_064), (600, 5001)])
def test_confidence(n, V, dtype, poison):
    logits, suppress = 3 * randn(n, V, dtype=dtype), torch.tensor([7, V - 1], device="cuda")
    logits[0, :50] = -torch.inf
    assert not differs(confidence, logits, suppress=suppress, tolerance=1e-4)
    assert torch.equal(confidence(logits).token, confidence(logits, _backend="reference").token)


@DTYPES
@pytest.mark.parametrize(
    "bits, layout, D, m",
    [(2, "channel", 128, 1), ("fp8", "channel", 128, 1), (4, "channel", 80, 1), (8, "token", 256, 300)],
)
@pytest.mark.parametrize("corrected", [False, True])
def test_packed_attention(bits, layout, D, m, corrected, dtype, poison):
    k, v = pack(randn(600, 64, D), bits, layout=layout), pack(randn(600, 64, D), bits, layout="token")
    if corrected:
        a, p, chunk = randn(600, 64, 4).half() / 4, randn(3, D, 4).half(), torch.arange(600, device="cuda").int() % 3
        count = torch.full((600,), 100, device="cuda", dtype=torch.int32)
        at = torch.rand(600, 64 * D, device="cuda").argsort(1)[:, :100].flatten().short()
        sparse = Sparse(torch.arange(600, device="cuda").int() * 100, count, at, randn(60_000).half())
        k, v = (replace(x, lowrank=LowRank(a, p, chunk), sparse=sparse) for x in (k, v))
    rows = {
        "start": torch.tensor([0, 0, 10, 500], device="cuda"), "longest": 30_000,
        "length": torch.tensor([0, 1, 30_000, 1000], device="cuda", dtype=torch.int32),
    }  # fmt: skip
    q = randn(2, 14, m, D, dtype=dtype)
    assert not differs(packed_attention, q, k, v, scale=D**-0.5, **rows, tolerance=TOLERANCE[dtype])
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(q, k, v, scale=D**-0.5, **rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
@pytest.mark.parametrize("D, half", [(128, 64), (80, 20), (256, 128)])
@pytest.mark.parametrize("axes", [1, 3])
def test_packed_attention_with_a_turning_centre(D, half, axes, dtype, poison):
    k, v = pack(randn(600, 64, D), 4, layout="channel"), pack(randn(600, 64, D), 4, layout="token")
    inv_freq = 1e4 ** -(torch.arange(half, device="cuda") / half)
    rows = {
        "start": torch.tensor([0, 500], device="cuda"), "longest": 30_000,
        "length": torch.tensor([30_000, 1000], device="cuda", dtype=torch.int32),
        "centre": 20 * randn(2, D), "inv_freq": inv_freq.expand(2, -1),
        "positions": torch.arange(30_000, device="cuda", dtype=torch.int32).expand(1, 1, -1),
    }  # fmt: skip
    if axes == 3:
        rows["positions"] = rows["positions"] + 50 * torch.arange(3, device="cuda", dtype=torch.int32).view(3, 1, 1, 1)
        rows["axes"] = torch.arange(half, device="cuda", dtype=torch.int32) % 3
    q = randn(1, 14, 1, D, dtype=dtype) / 20
    assert not differs(packed_attention, q, k, v, scale=1.0, **rows, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2, 8)])
@pytest.mark.parametrize("D, half, m", [(128, 0, 1), (128, 64, 1), (80, 20, 5), (256, 128, 300)])
def test_coded_attention(D, half, m, bits, dtype, poison):
    signs = torch.randint(0, 2, (2, D), device="cuda") * 2.0 - 1
    marked = torch.rand(1, 2, 30_000, device="cuda") < 0.1
    k, v = (encode(randn(1, 2, 30_000, D), signs[i], bits[i], marked=marked) for i in range(2))
    options = {"centre": randn(1, 2, D), "valid": torch.rand(1, 1, 30_000, device="cuda") > 0.3}
    if half:
        inv_freq = 1e4 ** -(torch.arange(half, device="cuda") / half)
        options["inv_freq"] = inv_freq.expand(1, 2, -1).contiguous()
        options["positions"] = torch.arange(30_000, device="cuda", dtype=torch.int32).expand(1, 1, -1)
    options |= {"bits": bits, "signs": signs, "scale": D**-0.5}
    assert not differs(coded_attention, randn(1, 14, m, D, dtype=dtype), k, v, **options, tolerance=TOLERANCE[dtype])


@DTYPES
def test_compact(dtype, poison):
    k, v = randn(2, 4, 5000, 128, dtype=dtype), randn(2, 4, 5000, 128, dtype=dtype)
    mask = torch.rand(2, 4, 5000, device="cuda") > 0.9
    index = torch.rand(2, 4, 5000, device="cuda").topk(500).indices.sort().values
    for keep in (mask, index):
        ours, truth = compact(k, v, keep), compact(k, v, keep, _backend="reference")
        assert torch.equal(ours.k, truth.k) and torch.equal(ours.v, truth.v)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(interleaved, dtype, poison):
    x, inv_freq = randn(2, 4, 3000, 128, dtype=dtype), 1e-6 ** (torch.arange(64, device="cuda") / 64)
    delta = torch.randint(-100_000, 100_000, (3, 2, 3000), device="cuda")
    tolerance = TOLERANCE[dtype]
    assert not differs(rotate, x, delta, inv_freq, sections=[16, 24, 24], interleaved=interleaved, tolerance=tolerance)
    assert not differs(rotate, x, delta[0], inv_freq[:20], tolerance=tolerance)
    assert torch.equal(rotate(x, torch.tensor(0, device="cuda"), inv_freq), x)
