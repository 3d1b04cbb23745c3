from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textkv.kernels import pack
from textkv.kernels.pack import LowRank, Packed, Sparse, channel_group, entries, expand, unpack

LAYOUTS = pytest.mark.parametrize("layout", ["channel", "token"])
BITS = pytest.mark.parametrize("bits", [2, 4, 8])


def by_hand(x, bits, layout, group):
    """The formula, group by group, in loops: fp16 scale and minimum, codes rounded against them."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        if layout == "channel":
            parts = [(slice(None), slice(c, c + 1)) for c in range(x.shape[2])]
        else:
            starts = [(t, c) for t in range(x.shape[1]) for c in range(0, x.shape[2], group)]
            parts = [(slice(t, t + 1), slice(c, c + group)) for t, c in starts]
        for t, c in parts:
            values = x[n, t, c]
            low = values.min().half().float()
            scale = ((values.max() - low) / (2**bits - 1)).clamp(min=0).half().float()
            codes = ((values - low) / scale).round().clamp(0, 2**bits - 1) if scale > 0 else torch.zeros_like(values)
            out[n, t, c] = codes * scale + low
    return out


@BITS
@LAYOUTS
def test_equals_the_formula_group_by_group(bits, layout):
    x = torch.randn(2, 16, 12) * torch.linspace(0.1, 9, 12) + torch.linspace(-3, 40, 12)
    packed = pack(x, bits, layout=layout, group=4 if layout == "token" else None)
    assert packed.codes.dtype == torch.uint8 and packed.scale.dtype == packed.zero.dtype == torch.float16
    assert packed.codes.shape == (2, 16 * bits // 8, 12) and (packed.blocks, packed.block, packed.head_dim) == x.shape
    torch.testing.assert_close(unpack(packed), by_hand(x, bits, layout, 4), rtol=0, atol=1e-5)


@BITS
def test_every_code_survives_in_every_place(bits):
    # a block whose values are the codes themselves, each channel shifted by one: scale 1, minimum 0
    codes = (torch.arange(64)[:, None] + torch.arange(5)) % 2**bits
    codes[0], codes[1] = 0, 2**bits - 1
    packed = pack(codes[None].float(), bits, layout="channel")
    assert torch.equal(unpack(packed)[0], codes.float())
    planes = packed.codes[0].numpy()
    for token in (0, 1, 17, 63):  # plane p of byte row i is token p * rows + i
        rows = 64 * bits // 8
        assert (planes[token % rows] >> (token // rows * bits) & (2**bits - 1)).tolist() == codes[token].tolist()


@LAYOUTS
def test_8_bit_floats_equal_the_formula_group_by_group(layout):
    x = torch.randn(2, 16, 12) * torch.linspace(0.1, 9, 12) + torch.linspace(-3, 40, 12)
    x[0, 3, 5] = 900.0
    packed = pack(x, "fp8", layout=layout, group=4 if layout == "token" else None)
    assert packed.codes.shape == x.shape and packed.block == 16
    shape = (2, 1, 16, 12, 1) if layout == "channel" else (2, 16, 1, 3, 4)
    parts = x.view(shape)
    mean = parts.mean((2, 4), keepdim=True).half().float()
    scale = ((parts - mean).abs().amax((2, 4), keepdim=True) / 448).half().float()
    wanted = ((parts - mean) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale + mean
    torch.testing.assert_close(unpack(packed), wanted.view(x.shape), rtol=0, atol=1e-5)


def test_8_bit_floats_keep_small_numbers_beside_a_large_one():
    x = torch.randn(1, 64, 1)
    x[0, 7] = 500.0
    errors = [(unpack(pack(x, bits, layout="channel")) - x)[0, :7].abs().mean() for bits in ("fp8", 8)]
    assert errors[0] < errors[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.sampled_from(["channel", "token"]),
    st.sampled_from([0.1, 1.0, 300.0]), st.sampled_from([0.0, 3.0, -8.0]),
)  # fmt: skip
def test_error_is_within_half_a_step_and_packing_again_adds_only_the_rounding_of_the_table(
    seed, bits, layout, spread, offset
):
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed)) + offset
    x *= spread
    packed = pack(x, bits, layout=layout)
    scale = packed.scale.float()
    if layout == "token":
        scale = scale.repeat_interleave(8 // scale.shape[2], 2)
    # half a step, and what rounding the minimum and the step to float16 clips at the ends
    slack = x.abs().amax() * 2.0**-10 + 2.0**bits * scale * 2.0**-11 + 1e-6
    assert bool(((unpack(packed) - x).abs() <= 0.5 * scale + slack).all())
    once, again = unpack(packed), pack(unpack(packed), bits, layout=layout)
    assert bool(((unpack(again) - once).abs() <= slack).all())
    # Where a group uses its first and last code, the table is found again, and so is every code.
    codes = ((once - packed.zero.float().repeat_interleave(8 // packed.zero.shape[2], 2)) / scale).round()
    axes = 1 if layout == "channel" else 2
    if bool((codes.amin(axes) == 0).all() & (codes.amax(axes) == 2**bits - 1).all()):
        assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), packed.tensors().values(), strict=True))


def test_what_float16_cannot_hold_beside_a_large_offset_is_lost_within_its_precision():
    x = torch.randn(1, 16, 8) * 1e-3 - 2000
    assert bool(((unpack(pack(x, 8, layout="channel")) - x).abs() <= 2000 * 2.0**-11).all())


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_zero_and_extreme_groups_stay_finite(layout, dtype):
    x = torch.zeros(4, 16, 8, dtype=dtype)
    x[1], x[2] = 3.5, 65504 if dtype != torch.bfloat16 else 65280
    x[3, ::2] = -x[2, ::2]
    for bits in (2, 4, 8):
        back = unpack(pack(x, bits, layout=layout))
        assert bool(back.isfinite().all())
        assert torch.equal(back[:2], x[:2].float())
        # neighbours in float16 are 32 apart at its end
        torch.testing.assert_close(back[2:], x[2:].float(), rtol=0, atol=64)


@LAYOUTS
def test_ignored_entries_do_not_widen_the_range(layout):
    x = torch.rand(2, 16, 8)
    wild = x.clone()
    ignore = torch.zeros(2, 16, 8, dtype=torch.bool)
    ignore[0, 3, 5] = ignore[1, 15, :] = True
    wild[ignore] = 1000.0
    ours, plain = unpack(pack(wild, 4, layout=layout, ignore=ignore)), unpack(pack(x, 4, layout=layout))
    assert bool((ours[ignore].abs() <= 1.01).all())
    touched = ignore.any(1, keepdim=True) if layout == "channel" else ignore.any(2, keepdim=True)
    untouched = ~touched.expand_as(x)
    assert torch.equal(ours[untouched], plain[untouched])
    # a group of nothing but ignored entries unpacks to 0; entries that count stay within half a step of a unit range
    assert bool(((ours - x)[~ignore].abs() <= 0.5 / 15 + 1e-3).all())


def corrected():
    """Three blocks with both kinds of correction, the chunk of the last its own; the second has no single entries."""
    base = pack(torch.randn(3, 16, 8), 4, layout="token", group=4)
    rank = LowRank(torch.randn(3, 16, 2).half(), torch.randn(2, 8, 2).half(), torch.tensor([0, 0, 1]).int())
    sparse = Sparse(
        torch.tensor([0, 2, 2]).int(), torch.tensor([2, 0, 3]).int(),
        torch.tensor([5, 127, 0, 9, 64]).short(), torch.tensor([4.0, -8, 2, 1, 16]).half(),
    )  # fmt: skip
    return Packed(base.codes, base.scale, base.zero, 4, rank, sparse)


def test_corrections_are_added():
    packed = corrected()
    plain = expand(packed, torch.arange(3))
    expected = plain.clone()
    for n, chunk in enumerate((0, 0, 1)):
        expected[n] += packed.lowrank.a[n].float() @ packed.lowrank.p[chunk].float().T
    for n, at, delta in ((0, 5, 4), (0, 127, -8), (2, 0, 2), (2, 9, 1), (2, 64, 16)):
        expected[n, at // 8, at % 8] += delta
    torch.testing.assert_close(unpack(packed), expected)
    assert not torch.equal(unpack(packed), plain)


@pytest.mark.parametrize("blocks", [[2, 0], [1], [2, 2, 1], []])
def test_taking_blocks_takes_their_corrections_and_no_more(blocks):
    packed = corrected()
    part = packed.take(torch.tensor(blocks, dtype=torch.int64))
    assert torch.equal(unpack(part), unpack(packed)[torch.tensor(blocks, dtype=torch.int64)])
    assert len(part.sparse.at) == sum({0: 2, 1: 0, 2: 3}[n] for n in blocks)
    assert len(part.lowrank.p) == len({n // 2 for n in blocks})


def test_entries_of_blocks():
    owner, entry = entries(corrected().sparse, torch.tensor([2, 1, 0]))
    assert owner.tolist() == [0, 0, 0, 2, 2] and entry.tolist() == [2, 3, 4, 0, 1]


def test_tensors_make_the_same_again():
    packed = corrected()
    again = Packed.from_tensors(packed.tensors(), 4)
    assert torch.equal(unpack(again), unpack(packed)) and set(packed.tensors()) == set(again.tensors())


@pytest.mark.parametrize("head_dim, group", [(128, 64), (80, 40), (96, 48), (256, 64), (32, 32), (14, 14), (127, 1)])
def test_default_channel_group_divides_every_head_dim(head_dim, group):
    assert channel_group(head_dim) == group


X = torch.zeros(1, 16, 8)


@pytest.mark.parametrize(
    "x, bits, options, message",
    [
        (X[0], 4, {}, r"x has shape \[16, 8\]; it must be \[N, T, D\]"),
        (X.double(), 4, {}, "x is float64; it must be float16 or bfloat16 or float32"),
        (X, 3, {}, "bits=3 cannot be packed; use 2, 4, 8 or 'fp8'"),
        (X[:, :12], 4, {}, "a group of 12 tokens cannot be packed; use a multiple of 16 up to 128"),
        (torch.zeros(1, 144, 8), 4, {}, "a group of 144 tokens cannot be packed"),
        (X, 4, {"layout": "token", "group": 3}, "a group of 3 channels does not divide head_dim 8; use 8"),
        (X, 4, {"layout": "channel", "group": 4}, "group=4 has no meaning per channel"),
        (X, 4, {"layout": "row"}, "layout='row' is not known; use 'channel' or 'token'"),
        (X / 0, 4, {}, "x holds NaN or inf"),
        (X + torch.inf, 4, {}, "x holds NaN or inf"),
        (X + 1e5, 4, {}, r"x holds a magnitude of 1e\+05; packing needs finite values of at most 65504"),
    ],
)
def test_errors_name_the_value_and_the_limit(x, bits, options, message):
    with pytest.raises(ValueError, match=message):
        pack(x, bits, **({"layout": "token"} | options))
