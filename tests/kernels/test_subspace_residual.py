from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import mismatch, randn
from textkv.kernels import subspace_residual


def orthonormal(B, G, D, r):
    return torch.linalg.qr(torch.randn(B, G, D, r, dtype=torch.float64))[0].float()


def naive(keys, basis):
    """The projector as a matrix, in float64."""
    basis = basis.double()
    outside = torch.eye(basis.shape[2], dtype=torch.float64) - basis @ basis.mT
    return (keys.double() @ outside).square().sum(-1).float()


SHAPES = [
    (1, 1, 1, 64, 1),
    (2, 2, 33, 80, 32),
    (1, 2, 70, 128, 40),
    (1, 1, 5, 256, 20),
    (1, 1, 20, 512, 20),
    (1, 1, 40, 64, 64),
]


@pytest.mark.parametrize("B, G, N, D, r", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equals_the_formula(B, G, N, D, r, backend, dtype, interpreted):
    keys, basis = randn(B, G, N, D, dtype=dtype), orthonormal(B, G, D, r)
    energy = subspace_residual(keys, basis, _backend=backend)
    assert energy.dtype == torch.float32 and (energy >= 0).all()
    assert not mismatch(energy, naive(keys, basis), 1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_keys_inside_the_span_have_no_energy_and_those_outside_keep_theirs(backend, interpreted):
    basis = orthonormal(1, 1, 64, 16)
    inside = 100 * (torch.randn(1, 1, 20, 16) @ basis[..., :16].mT)
    assert (subspace_residual(inside, basis, _backend=backend) < 1e-6).all()  # |k|^2 is about 160,000
    keys = torch.randn(1, 1, 20, 64)
    outside = keys - keys @ basis @ basis.mT
    assert not mismatch(subspace_residual(outside, basis, _backend=backend), outside.square().sum(-1), 1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_any_basis_of_the_span_gives_the_same(backend, interpreted):
    keys, basis = randn(1, 2, 20, 64), orthonormal(1, 2, 64, 8)
    turned = basis @ torch.linalg.qr(torch.randn(8, 8))[0]
    ours = subspace_residual(keys, turned, _backend=backend)
    assert not mismatch(ours, subspace_residual(keys, basis, _backend=backend), 1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_columns_no_keys_and_strides(backend, interpreted):
    keys = randn(2, 10, 3, 64).transpose(1, 2)
    assert not mismatch(
        subspace_residual(keys, torch.zeros(2, 3, 64, 0), _backend=backend), keys.square().sum(-1), 1e-5
    )
    assert subspace_residual(keys[:, :, :0], orthonormal(2, 3, 64, 4), _backend=backend).shape == (2, 3, 0)
    basis = orthonormal(2, 3, 64, 4).mT.contiguous().mT
    assert not mismatch(subspace_residual(keys, basis, _backend=backend), naive(keys, basis), 1e-4)


KEYS, BASIS = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 16, 4)


@pytest.mark.parametrize(
    "keys, basis, message",
    [
        (KEYS[0], BASIS, r"keys has shape \[2, 5, 16\]; it must be \[B, G, N, D\]"),
        (KEYS.long(), BASIS, "keys is int64; it must be float16 or bfloat16 or float32"),
        (KEYS, BASIS[:, :1], r"basis has shape \[1, 1, 16, 4\]; it must be \[1, 2, 16, r\]"),
        (KEYS, torch.zeros(1, 2, 16, 17), r"basis has shape \[1, 2, 16, 17\]; r must be <= D = 16"),
    ],
)
def test_errors_name_the_argument(keys, basis, message):
    with pytest.raises(ValueError, match=message):
        subspace_residual(keys, basis)
