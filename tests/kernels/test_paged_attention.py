"""Attention over regions in pages against `decode_attention` over each region alone."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import mismatch, randn
from textkv.kernels import decode_attention, paged_attention
from textkv.kernels.paged_attention import HOLE, Pages

SIZE, DIM = 8, 32


def cut(lengths: list[int], tail: int, dtype: torch.dtype):
    """Regions of `lengths` tokens and `tail` more each: k, v, positions, pages, and the tokens of every region."""
    counts = torch.tensor([-(-length // SIZE) for length in lengths])
    pages = Pages.of(SIZE, counts, torch.device("cpu"))
    k, v = torch.zeros(len(pages.owner), 1, SIZE, DIM, dtype=dtype), torch.zeros(len(pages.owner), 1, SIZE, DIM)
    v, positions = v.to(dtype), torch.full((len(pages.owner), 1, 1, SIZE), HOLE, dtype=torch.int32)
    regions, first = [], 0
    for r, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        keys, values = randn(length + tail, DIM, dtype=dtype), randn(length + tail, DIM, dtype=dtype)
        slots = [*range(first * SIZE, first * SIZE + length), *range((int(counts.sum()) + r) * SIZE, 10**6)]
        slots, first = slots[: length + tail], first + count
        k.view(-1, DIM)[slots], v.view(-1, DIM)[slots] = keys, values
        positions.view(-1)[slots] = torch.arange(length + tail, dtype=torch.int32) * 1_000_003 % 2**27
        regions.append((keys, values))
    return k, v, positions.view(torch.float32), pages, regions


@pytest.mark.parametrize("lengths, tail", [((5, 8, 17, 1), 3), ((16, 40, 1, 9), 0), ((0, 3, 0, 30), 8)])
@pytest.mark.parametrize(
    "m, softcap, backend", [(1, None, None), (3, None, None), (1, 5.0, None), (2, None, "reference")]
)
def test_every_region_as_if_alone(lengths, tail, m, softcap, backend, dtype):
    k, v, positions, pages, regions = cut(list(lengths), tail, dtype)
    q = 5 * randn(2, 6, m, DIM, dtype=dtype)  # 2 rows of 2 kv heads
    how = {"scale": 0.7, "softcap": softcap}
    ours = paged_attention(q, k, v, positions, pages, **how, _backend=backend)
    truth = [
        decode_attention(q[r // 2, None, r % 2 * 3 : r % 2 * 3 + 3], *(x[None, None] for x in region), **how)
        for r, region in enumerate(regions)
    ]
    out, lse = (torch.cat(x).view(2, 6, *x[0].shape[2:]) for x in zip(*truth, strict=True))
    assert not mismatch(ours[0], out, 2e-5 if dtype == torch.float32 else 1.2e-2)
    assert not mismatch(ours[1], lse, 2e-5 if dtype == torch.float32 else 1.2e-2)
    alone = paged_attention(q, k, v, positions, pages, **how, need_lse=False, _backend=backend)
    assert torch.equal(alone[0], ours[0]) and alone[1] is None


def test_what_does_not_fit_is_refused():
    k, v, positions, pages, _ = cut([5, 8], 1, torch.float32)
    with pytest.raises(ValueError, match="k and v .* in the dtype of q"):
        paged_attention(randn(1, 2, 1, DIM).half(), k, v, positions, pages, scale=1.0)
    with pytest.raises(ValueError, match="B \\* H a multiple of 2"):
        paged_attention(randn(1, 3, 1, DIM), k, v, positions, pages, scale=1.0)
    with pytest.raises(ValueError, match="positions"):
        paged_attention(randn(1, 2, 1, DIM), k, v, positions.double(), pages, scale=1.0)
