"""Join attention over disjoint parts of a cache into attention over their union.

    lse = log sum_p exp(lse_p),   out = sum_p exp(lse_p - lse) out_p

Exact, associative up to rounding, and independent of the order of the parts. A part whose lse is -inf saw nothing and
is ignored whatever its `out` holds.

Floor in bytes: each part is read once and the result written once, (k + 1) * B * H * m * (D * itemsize + 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._backend import FLOATS, MAX_HEAD_DIM, check_head_dim, check_tensor, jit, tl, triton, use_triton

_PARTS = 4  # parts that one launch takes
_SMALL = 1 << 16  # numbers of a part up to which operations cost more than what they do


def reference(outs, lses):
    """Plain torch, fp32 accumulation: the truth, and the path off CUDA of many or large parts. Arguments as `merge`."""
    parts = torch.stack(tuple(lses))  # [k, B, H, m]
    lse = torch.logsumexp(parts, dim=0)
    weights = (parts - lse.masked_fill(lse == -torch.inf, 0)).exp()
    total = torch.zeros(outs[0].shape, dtype=torch.float32, device=lse.device)
    for out, part, weight in zip(outs, parts, weights, strict=True):
        total += (out.float() * weight[..., None]).masked_fill((part == -torch.inf)[..., None], 0)
    return total.to(outs[0].dtype), lse


def joined(out_1, out_2, lse_1, lse_2):
    """Two parts of which none is empty: the weight of the first is 1 / (1 + exp(lse_2 - lse_1)). -> out, lse"""
    weight = torch.sigmoid(lse_1 - lse_2).unsqueeze(-1)
    if out_1.dtype == torch.float32:
        return torch.lerp(out_2, out_1, weight), torch.logaddexp(lse_1, lse_2)
    return torch.lerp(out_2.float(), out_1.float(), weight).to(out_1.dtype), torch.logaddexp(lse_1, lse_2)


def _pair(outs, lses):
    """`reference` for two parts in a few operations, which ask nothing of the host."""
    out, lse = joined(*outs, *lses)
    # what an empty part holds must not count, not even as 0 * NaN: then the other one is the result
    first, second = (x == -torch.inf for x in lses)
    out = torch.where(first.unsqueeze(-1), outs[1], torch.where(second.unsqueeze(-1), outs[0], out))
    return out.masked_fill_((first & second).unsqueeze(-1), 0), lse


def _stacked(outs, lses):
    """`reference` for small parts in a third of the operations: all of them side by side, and no part by itself."""
    parts = torch.stack(tuple(lses))
    lse = torch.logsumexp(parts, dim=0)
    weights = (parts - lse.masked_fill(lse == -torch.inf, 0)).exp().unsqueeze(-1)
    shares = (torch.stack(tuple(outs)) * weights).masked_fill_((parts == -torch.inf).unsqueeze(-1), 0)
    return shares.sum(0).to(outs[0].dtype), lse


@jit
def _add(p_out, p_lse, offsets, row, m_row, mask, lse, total):
    """Add one part, weighted against the merged `lse`."""
    part = tl.load(p_lse + row, mask=m_row, other=float("-inf"))
    # an empty part is not read: whatever its memory holds stays out
    out = tl.load(p_out + offsets, mask=mask & (part != float("-inf"))[:, None], other=0.0).to(tl.float32)
    return total + out * tl.exp(part - lse)[:, None]


@jit(do_not_specialize=["rows"])
def _merge_kernel(
    o_0, o_1, o_2, o_3, l_0, l_1, l_2, l_3, p_out, p_lse, rows,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m_row = row < rows
    mask = m_row[:, None] & (d < D)[None, :]
    offsets = row[:, None] * D + d[None, :]
    nothing = float("-inf")
    a_0 = tl.load(l_0 + row, mask=m_row, other=nothing)
    a_1 = tl.load(l_1 + row, mask=m_row & (PARTS > 1), other=nothing)
    a_2 = tl.load(l_2 + row, mask=m_row & (PARTS > 2), other=nothing)
    a_3 = tl.load(l_3 + row, mask=m_row & (PARTS > 3), other=nothing)
    top = tl.maximum(tl.maximum(a_0, a_1), tl.maximum(a_2, a_3))
    safe = tl.where(top == nothing, 0.0, top)
    lse = top + tl.log(tl.exp(a_0 - safe) + tl.exp(a_1 - safe) + tl.exp(a_2 - safe) + tl.exp(a_3 - safe))
    scale = tl.where(top == nothing, 0.0, lse)
    total = _add(o_0, l_0, offsets, row, m_row, mask, scale, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
    if PARTS > 1:
        total = _add(o_1, l_1, offsets, row, m_row, mask, scale, total)
    if PARTS > 2:
        total = _add(o_2, l_2, offsets, row, m_row, mask, scale, total)
    if PARTS > 3:
        total = _add(o_3, l_3, offsets, row, m_row, mask, scale, total)
    tl.store(p_out + offsets, total, mask=mask)
    tl.store(p_lse + row, lse, mask=m_row)


def _launch(outs, lses):
    """Fold the parts, four at a launch; what one launch hands to the next stays fp32."""
    dtype, D = outs[0].dtype, outs[0].shape[-1]
    outs, lses = [out.contiguous() for out in outs], [lse.contiguous() for lse in lses]
    while True:
        now, now_lse, outs, lses = outs[:_PARTS], lses[:_PARTS], outs[_PARTS:], lses[_PARTS:]
        out = torch.empty_like(now[0], dtype=torch.float32 if outs else dtype)
        lse = torch.empty_like(now_lse[0])
        pad = _PARTS - len(now)
        _merge_kernel[(triton.cdiv(lse.numel(), 16),)](
            *now, *now[:1] * pad, *now_lse, *now_lse[:1] * pad, out, lse, lse.numel(),
            PARTS=len(now), D=D, BLOCK_M=16, BLOCK_D=triton.next_power_of_2(D), num_warps=4,
        )  # fmt: skip
        if not outs:
            return out, lse
        outs, lses = [out, *outs], [lse, *lses]


def merge(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, _backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge k partial attentions; return `(out, lse)`.

    Args:
        outs: k tensors [B, H, m, D] of one dtype, each normalised over its own part.
        lses: k tensors [B, H, m], float32: the log-sum-exp (natural log) of each part, -inf for an empty one.

    Returns:
        out [B, H, m, D] in the dtype of the parts and lse [B, H, m] in float32; 0 and -inf where all parts are empty.

    Raises:
        ValueError: no part, not as many outs as lses, or shapes, dtypes, devices that differ.
    """
    if not len(outs) or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts and lses has {len(lses)}; give the same number, at least one")
    first = outs[0]
    if not _fit(outs, lses):
        _check(outs, lses)
    if use_triton(first, _backend):
        return _launch(outs, lses)
    if not first.is_cpu or _backend is not None:
        return reference(outs, lses)
    if len(outs) == 2:
        return _pair(outs, lses)
    return (_stacked if first.numel() <= _SMALL else reference)(outs, lses)


def _fit(outs, lses):
    """Whether the parts are as they must be, by plain comparisons: `_check` says what is wrong where not."""
    shape, dtype, device = outs[0].shape, outs[0].dtype, outs[0].device
    return (
        len(shape) == 4 and 0 < shape[3] <= MAX_HEAD_DIM and dtype in FLOATS
        and all(out.shape == shape and out.dtype == dtype and out.device == device for out in outs)
        and all(lse.shape == shape[:3] and lse.dtype == torch.float32 and lse.device == device for lse in lses)
    )  # fmt: skip


def _check(outs, lses):
    """Raise ValueError on bad arguments."""
    first = outs[0]
    check_tensor("outs[0]", first, ("B", "H", "m", "D"), FLOATS)
    check_head_dim("outs[0]", first)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(f"outs[{i}]", out, tuple(first.shape), (first.dtype,), first)
        check_tensor(f"lses[{i}]", lse, tuple(first.shape[:3]), (torch.float32,), first)
