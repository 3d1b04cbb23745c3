from __future__ import annotations

import math

import pytest
import torch

from textkv.kernels.codebook import (
    FITS,
    Room,
    decode,
    encode,
    from_bytes,
    lloyd_max,
    row_bytes,
    to_bytes,
    turn,
    turn_back,
    vectors,
)

POSITIVE = {  # the positive half, for variance 1
    1: [0.797885],
    2: [0.452780, 1.510418],
    3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}
MSE = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501}


def signs_of(dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def restored(rows: torch.Tensor, signs: torch.Tensor, bits: int) -> torch.Tensor:
    c, size = decode(rows, bits, len(signs))
    return turn_back(c * size.abs()[..., None], signs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_centroids_are_those_of_the_tables_and_of_lloyds_own_iteration(bits):
    c = torch.tensor(lloyd_max(bits), dtype=torch.float64)
    torch.testing.assert_close(c[len(c) // 2 :], torch.tensor(POSITIVE[bits]).double(), rtol=0, atol=1e-6)
    # Lloyd: cells by midpoints, centroids by means, from a bad start
    x = torch.linspace(-3, 3, 2**bits, dtype=torch.float64)
    for _ in range(4000):
        edges = torch.cat([x.new_tensor([-40.0]), (x[1:] + x[:-1]) / 2, x.new_tensor([40.0])])
        x = -((-edges.square() / 2).exp() / math.sqrt(2 * math.pi)).diff() / torch.special.ndtr(edges).diff()
    torch.testing.assert_close(c, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_centroids_are_symmetric_and_their_error_keeps_the_papers_bounds(bits):
    c = torch.tensor(lloyd_max(bits), dtype=torch.float64)
    x = torch.linspace(-8, 8, 400001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    nearest = c[torch.bucketize(x, (c[1:] + c[:-1]) / 2)]
    error = float(((x - nearest).square() * density).sum())
    assert torch.equal(c, -c.flip(0)) and bool((c.diff() > 0).all())
    assert 4.0**-bits <= error <= math.sqrt(3) * math.pi / 2 * 4.0**-bits
    assert bits not in MSE or error == pytest.approx(MSE[bits], abs=2e-6)


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 128, 1])
def test_the_rotation_keeps_lengths_and_products_and_is_undone(dim):
    x, signs = torch.randn(3, 5, dim), signs_of(dim)
    y = turn(x, signs)
    torch.testing.assert_close(y @ y.mT, x @ x.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turn_back(y, signs), x, rtol=1e-4, atol=1e-5)
    spread = turn(torch.eye(dim), signs).abs().max()  # no coordinate of a spike stands out
    assert float(spread) <= math.sqrt(2 / dim) + 1e-6 if dim > 1 else float(spread) == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_their_bytes_and_bytes_from_their_codes(bits):
    codes = torch.randint(0, 2**bits, (5, 24))
    packed = to_bytes(codes, bits)
    assert packed.shape == (5, 3 * bits) and torch.equal(from_bytes(packed, bits), codes)
    patterns = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, bits)
    assert torch.equal(to_bytes(from_bytes(patterns, bits), bits), patterns)
    # code j lies at bit j * bits, lowest first
    number = sum(int(code) << (j * bits) for j, code in enumerate(codes[0]))
    assert packed[0].tolist() == list(number.to_bytes(3 * bits, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [8, 20, 96])
def test_decode_looks_up_the_centroids_of_the_codes(bits, dim):
    rows = encode(torch.randn(4, 6, dim), signs_of(dim), bits)
    assert rows.dtype == torch.uint8 and rows.shape == (4, 6, row_bytes(bits, dim))
    c, size = decode(rows, bits, dim)
    table = torch.tensor(lloyd_max(bits))
    assert torch.equal(c, table[from_bytes(rows[..., :-2], bits)[..., :dim]]) and size.shape == (4, 6)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_on_normal_vectors_is_the_tables(dim, bits):
    torch.manual_seed(0)
    x, signs = torch.randn(4000, dim), signs_of(dim)
    gap = restored(encode(x, signs, bits, "plain"), signs, bits) - x
    assert float(gap.square().sum() / x.square().sum()) == pytest.approx(MSE[bits], rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_each_fit_promises(bits):
    torch.manual_seed(0)
    x, signs, error = torch.randn(2000, 128), signs_of(128), {}
    found = {fit: restored(encode(x, signs, bits, fit), signs, bits) for fit in FITS}
    torch.testing.assert_close(found["norm"].norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    torch.testing.assert_close((found["unbiased"] * x).sum(-1), x.square().sum(-1), rtol=1e-3, atol=0)
    slope = float(((found["plain"] * x).sum(-1) / x.square().sum(-1)).mean())
    assert slope == pytest.approx(1 - MSE[bits], abs=0.01)  # the shrinkage of a centroid is its error
    for fit in FITS:
        error[fit] = float((found[fit] - x).square().sum())
    assert error["least"] == min(error.values()) and max(error.values()) < 1.2 * error["least"]


@pytest.mark.parametrize(("bits", "most", "without"), [(3, 0.05, 0.7), (4, 0.01, 0.2)])
def test_signs_save_what_a_plain_hadamard_matrix_loses_of_a_constant_vector(bits, most, without):
    x, gaps = torch.ones(1, 128), []
    for signs in (torch.ones(128), *(signs_of(128, seed) for seed in range(20))):
        gaps.append(float((restored(encode(x, signs, bits), signs, bits) - x).square().mean()))
    assert gaps[0] > without and sum(gaps[1:]) / 20 < most


def test_a_vector_alone_is_coded_as_in_a_batch_and_whatever_the_dtype():
    x, signs = torch.randn(2, 3, 9000, 16), signs_of(16)
    rows = encode(x, signs, 4)
    assert torch.equal(encode(x[1:, 2:, 5000:5001], signs, 4), rows[1:, 2:, 5000:5001])
    half = x[0, 0, :50].bfloat16()
    assert torch.equal(encode(half, signs, 4), encode(half.float(), signs, 4))


def test_nothing_stays_nothing_and_what_is_not_finite_shows():
    x, signs = torch.randn(4, 32), signs_of(32)
    x[0], x[1, 3], x[2, 3], x[3] = 0, torch.nan, torch.inf, 1e6
    found = restored(encode(x, signs, 3), signs, 3)
    assert torch.equal(found[0], torch.zeros(32)) and not bool(found[1:].isfinite().any())


def test_a_mark_changes_nothing_but_the_sign_of_the_scale():
    x, signs, marked = torch.randn(2, 50, 32), signs_of(32), torch.rand(2, 50) > 0.5
    x[0, 0] = 0
    plain, rows = encode(x, signs, 3), encode(x, signs, 3, marked=marked)
    assert torch.equal(restored(rows, signs, 3), restored(plain, signs, 3))
    assert torch.equal(decode(rows, 3, 32)[1].signbit(), marked) and not bool(decode(plain, 3, 32)[1].signbit().any())


@pytest.mark.parametrize("bits", range(1, 9))
def test_tiles_looked_up_in_the_same_room_are_as_in_room_of_their_own(bits):
    rows, room = encode(torch.randn(2, 9, 20), signs_of(20), bits), Room(2 * 4 * 24)
    for tile in rows.split(4, 1):  # the last one is shorter
        assert torch.equal(vectors(tile, bits, 20, room), vectors(tile, bits, 20))


@pytest.mark.parametrize(
    ("x", "signs", "bits", "fit", "message"),
    [
        (torch.zeros(1, 8), 8, 9, "norm", "bits=9 cannot be coded; use a number from 1 to 8"),
        (torch.zeros(1, 8), 8, 0, "norm", "bits=0 cannot be coded"),
        (torch.zeros(1, 8), 4, 4, "norm", r"x is torch.float32 \[1, 8\] and signs are \[4\]; encode needs"),
        (torch.zeros(1, 8, dtype=torch.int64), 8, 4, "norm", "x is torch.int64"),
        (torch.zeros(1, 8), 8, 4, "best", "fit='best' is not known; use 'norm', 'plain', 'least' or 'unbiased'"),
    ],
)
def test_errors_name_what_is_wrong(x, signs, bits, fit, message):
    with pytest.raises(ValueError, match=message):
        encode(x, signs_of(signs), bits, fit)
