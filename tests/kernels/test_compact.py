from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import randn
from textkv.kernels import compact
from textkv.kernels.compact import Rows


def kept_indices(B, G, n, C):
    return torch.stack([torch.randperm(n)[:C].sort().values for _ in range(B * G)]).view(B, G, C)


@pytest.mark.parametrize(
    "B, G, n, C, D", [(1, 1, 1, 1, 64), (2, 3, 70, 33, 80), (1, 2, 200, 65, 128), (1, 2, 9, 0, 64), (1, 1, 40, 33, 512)]
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dense(B, G, n, C, D, backend, dtype, interpreted):
    k, v, keep = randn(B, G, n, D, dtype=dtype), randn(B, G, n, D, dtype=dtype), kept_indices(B, G, n, C)
    rows = compact(k, v, keep, _backend=backend)
    for b in range(B):
        for g in range(G):
            assert torch.equal(rows.k[b, g], k[b, g][keep[b, g]]) and torch.equal(rows.v[b, g], v[b, g][keep[b, g]])
    assert rows.k.shape == rows.v.shape == (B, G, C, D) and rows.start is None and rows.length is None


@pytest.mark.parametrize("B, G, n, D", [(1, 1, 1, 64), (2, 3, 70, 80), (1, 2, 200, 128)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ragged(B, G, n, D, backend, dtype, interpreted):
    k, v, keep = randn(B, G, n, D, dtype=dtype), randn(B, G, n, D, dtype=dtype), torch.rand(B, G, n) > 0.6
    keep[-1, -1] = B * G == 1  # a head that keeps nothing, or the only one keeping all
    rows = compact(k, v, keep, _backend=backend)
    assert rows.start.dtype == torch.int64 and rows.length.dtype == torch.int32
    end = 0
    for r, (s, length) in enumerate(zip(rows.start.tolist(), rows.length.tolist(), strict=True)):
        b, g = divmod(r, G)
        assert s == end and length == int(keep[b, g].sum())
        assert torch.equal(rows.k[s : s + length], k[b, g][keep[b, g]])
        assert torch.equal(rows.v[s : s + length], v[b, g][keep[b, g]])
        end = s + length
    assert rows.k.shape == rows.v.shape == (end, D)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_storage_is_new_and_inputs_may_be_strided(backend, interpreted):
    k, v = randn(1, 30, 2, 64).transpose(1, 2), randn(1, 2, 64, 30).mT
    keep = torch.arange(30).expand(1, 2, 30)  # itself a view without memory of its own
    for rows in (compact(k, v, keep, _backend=backend), compact(k, v, keep >= 0, _backend=backend)):
        assert torch.equal(rows.k.view_as(k.contiguous()), k) and torch.equal(rows.v.view_as(v.contiguous()), v)
        assert rows.k.is_contiguous() and rows.k.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        assert rows.k.untyped_storage().nbytes() == rows.k.numel() * 4


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_codes_may_be_of_different_width(backend, interpreted):
    k, v = (torch.randint(0, 256, (2, 2, 30, width), dtype=torch.uint8) for width in (50, 68))
    keep = kept_indices(2, 2, 30, 11)
    mask = torch.zeros(2, 2, 30, dtype=torch.bool).scatter_(-1, keep, True)
    dense, ragged = compact(k, v, keep, _backend=backend), compact(k, v, mask, _backend=backend)
    assert torch.equal(dense.k, k.gather(2, keep[..., None].expand(2, 2, 11, 50)))
    assert torch.equal(dense.v, v.gather(2, keep[..., None].expand(2, 2, 11, 68)))
    assert torch.equal(ragged.k, k[mask]) and torch.equal(ragged.v, v[mask])


def test_rows_are_frozen():
    with pytest.raises(AttributeError):
        Rows(torch.zeros(1), torch.zeros(1)).k = None


K, KEEP = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "k, v, keep, message",
    [
        (K[0], K, KEEP, r"k has shape \[2, 5, 16\]; it must be \[B, G, n, D\]"),
        (K, K[:, :, :4], KEEP, r"v has shape \[1, 2, 4, 16\]; it must be \[1, 2, 5, D_v\]"),
        (K, K.half(), KEEP, "v is float16; it must be float32"),
        (K, K, KEEP[0], r"keep has shape \[2, 3\]; it must be \[1, 2, C\]"),
        (K, K, KEEP.int(), "keep is int32; it must be int64 or bool"),
        (K, K, KEEP.bool(), r"keep has shape \[1, 2, 3\]; it must be \[1, 2, 5\]"),
        (K, K, KEEP + 5, r"keep holds indices 5..5; they must lie in 0..4"),
        (K, K, KEEP - 1, r"keep holds indices -1..-1; they must lie in 0..4"),
        (K, K, [0, 1], "keep is list; it must be a tensor"),
    ],
)
def test_errors_name_the_argument(k, v, keep, message):
    with pytest.raises(ValueError, match=message):
        compact(k, v, keep)
