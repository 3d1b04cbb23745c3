from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import mismatch, randn
from textkv.kernels import decode_attention, merge


def parts_of(cuts, dtype=torch.float32, heads=4, m=3, n=60):
    """Attention over the pieces of one segment between `cuts`, and over the whole of it."""
    q, k, v = (randn(1, h, t, 64, dtype=dtype) for h, t in ((heads, m), (2, n), (2, n)))
    edges = [0, *sorted(cuts), n]
    pieces = [
        decode_attention(q, k[:, :, a:b], v[:, :, a:b], scale=0.2) for a, b in zip(edges, edges[1:], strict=False)
    ]
    outs, lses = zip(*pieces, strict=True)
    return list(outs), list(lses), decode_attention(q, k, v, scale=0.2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False))
def test_merged_pieces_equal_the_whole_in_any_order(cuts, random):
    outs, lses, whole = parts_of(cuts)
    order = random.sample(range(len(outs)), len(outs))
    assert not mismatch(merge([outs[i] for i in order], [lses[i] for i in order]), whole)


@pytest.mark.parametrize("cuts", [[], [20], [20, 20, 50], [1, 7, 30, 50, 60], list(range(5, 50, 5))])
def test_kernel_equals_the_whole(cuts, interpreted):
    outs, lses, whole = parts_of(cuts)
    assert not mismatch(merge(outs, lses, _backend="triton"), whole)


@pytest.mark.parametrize("shape", [(1, 1, 1, 80), (2, 7, 3, 128)])
def test_kernel_equals_reference_in_bf16(shape, interpreted):
    outs, lses = [randn(*shape, dtype=torch.bfloat16) for _ in range(3)], [randn(*shape[:3]) for _ in range(3)]
    assert not mismatch(merge(outs, lses, _backend="triton"), merge(outs, lses))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_parts_are_ignored_whatever_they_hold(backend, interpreted):
    outs, lses, (out, lse) = parts_of([30])
    nothing, never = torch.full_like(outs[0], float("nan")), torch.full_like(lses[0], -torch.inf)
    merged, merged_lse = merge([nothing, *outs, nothing], [never, *lses, never], _backend=backend)
    assert not mismatch(merged, out)
    assert not mismatch(merged_lse, lse)
    zero, minus_inf = merge([nothing, nothing], [never, never], _backend=backend)
    assert (zero == 0).all() and (minus_inf == -torch.inf).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_part_is_the_identity_and_lse_may_be_far_from_zero(backend, interpreted):
    outs, lses, _ = parts_of([])
    out, lse = merge(outs, lses, _backend=backend)
    assert not mismatch(out, outs[0])
    assert not mismatch(lse, lses[0])
    out, lse = merge(outs * 2, [lses[0] + 1e4, lses[0] - 1e4], _backend=backend)
    assert not mismatch(out, outs[0])
    assert not mismatch(lse, lses[0] + 1e4)


def test_strided_parts(interpreted):
    outs, lses, whole = parts_of([30])
    outs = [out.transpose(1, 2).contiguous().transpose(1, 2) for out in outs]
    assert not mismatch(merge(outs, lses, _backend="triton")[0], whole[0])


OUT, LSE = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "outs, lses, message",
    [
        ([], [], "outs has 0 parts and lses has 0; give the same number, at least one"),
        ([OUT], [LSE, LSE], "outs has 1 parts and lses has 2"),
        ([OUT[0]], [LSE], r"outs\[0\] has shape \[2, 3, 16\]; it must be \[B, H, m, D\]"),
        ([OUT, OUT[:, :1]], [LSE, LSE], r"outs\[1\] has shape \[1, 1, 3, 16\]; it must be \[1, 2, 3, 16\]"),
        ([OUT, OUT.half()], [LSE, LSE], r"outs\[1\] is float16; it must be float32"),
        ([OUT], [LSE[..., :2]], r"lses\[0\] has shape \[1, 2, 2\]; it must be \[1, 2, 3\]"),
        ([OUT], [LSE.half()], r"lses\[0\] is float16; it must be float32"),
    ],
)
def test_errors_name_the_argument(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge(outs, lses)
