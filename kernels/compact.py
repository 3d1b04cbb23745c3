"""Move the kept tokens of K and V into new storage, once, so that the old storage can be freed.

Dense: every (batch, kv head) keeps the same number of tokens, given by index. Ragged: each keeps its own number, given
by a mask; the rows come out one behind the other (row r = b * G + g owns start[r] : start[r] + length[r]), no slack.

Floor in bytes: the kept rows of K and V read once and written once, 4 * D * itemsize per kept token and kv head. The
ragged form reads the number of kept rows back to the host once, because the new storage has exactly that size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._backend import FLOATS, check_head_dim, check_tensor, dense_rows, jit, tl, triton, use_triton


@dataclass(frozen=True)
class Rows:
    """Kept tokens. Dense: k, v [B, G, C, D] alone. Ragged: k, v [total, D], start int64 and length int32 [B * G]."""

    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor | None = None
    length: torch.Tensor | None = None


def reference(k, v, keep):
    """Plain torch: the truth, and the path off CUDA. Arguments as `compact`."""
    if keep.dtype == torch.bool:
        return Rows(k[keep], v[keep], *_row_bounds(keep))
    if k.shape == v.shape and k.stride() == v.stride() and _lies_in_rows(k):
        # Whole rows of one long table are copied as such, several times faster than channel by channel.
        b, g, t = (stride // k.shape[3] for stride in k.stride()[:3])
        heads = [[i * b + j * g] for i in range(k.shape[0]) for j in range(k.shape[1])]
        rows = (keep if t == 1 else keep * t).flatten(0, 1) + torch.tensor(heads, device=k.device)
        return Rows(*(_table(x).index_select(0, rows.view(-1)).view(*keep.shape, x.shape[3]) for x in (k, v)))
    # a view: the index is never materialised per channel
    return Rows(*(x.gather(2, keep[..., None].expand(*keep.shape, x.shape[-1])) for x in (k, v)))


def _lies_in_rows(x):
    """Whether the vectors of x [B, G, n, D] are rows of one table of D columns."""
    return bool(x.numel()) and x.stride(3) == 1 and all(stride % x.shape[3] == 0 for stride in x.stride()[:3])


def _table(x):
    """That table, from the first vector of x to its last."""
    D, last = x.shape[3], sum((size - 1) * stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return x.as_strided((last // D + 1, D), (D, 1))


def _row_bounds(keep):
    """keep bool [B, G, n] -> start int64 [B * G], length int32 [B * G]."""
    length = keep.sum(-1).flatten()
    return length.cumsum(0) - length, length.int()


@jit(do_not_specialize=["n", "kept", "total"])
def _gather_kernel(
    p_k, p_v, p_index, p_k_out, p_v_out, s_kb, s_kg, s_kn, s_vb, s_vg, s_vn, n, kept, groups, total,
    RAGGED: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of K and V in the order of the output; the index counts tokens of one head (dense) or of all (ragged)."""
    out = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m_row = out < total
    token = tl.load(p_index + out, mask=m_row, other=0)
    row = out // kept
    if RAGGED:
        row = token // n
        token = token % n
    b, g = row // groups, row % groups
    mask = m_row[:, None] & (d < D)[None, :]
    mask_v = m_row[:, None] & (d < D_V)[None, :]
    k = tl.load(p_k + (b * s_kb + g * s_kg + token * s_kn)[:, None] + d[None, :], mask=mask)
    tl.store(p_k_out + out[:, None] * D + d[None, :], k, mask=mask)
    v = tl.load(p_v + (b * s_vb + g * s_vg + token * s_vn)[:, None] + d[None, :], mask=mask_v)
    tl.store(p_v_out + out[:, None] * D_V + d[None, :], v, mask=mask_v)


def _launch(k, v, keep):
    (B, G, n, D), wide = k.shape, v.shape[-1]
    k, v = dense_rows(k), dense_rows(v)
    ragged = keep.dtype == torch.bool
    if ragged:
        index = keep.flatten().nonzero().flatten()  # the one wait for the device
        shape, kept, bounds = (index.numel(),), 1, _row_bounds(keep)
    else:
        index = keep.contiguous()
        torch._assert_async(((index >= 0) & (index < n)).all(), f"keep holds an index outside 0..{n - 1}")
        shape, kept, bounds = (B, G, keep.shape[2]), max(1, keep.shape[2]), ()
    k_out, v_out = k.new_empty(*shape, D), v.new_empty(*shape, wide)
    if index.numel():
        block_m = 64 if max(D, wide) <= 256 else 32
        _gather_kernel[(triton.cdiv(index.numel(), block_m),)](
            k, v, index, k_out, v_out, *k.stride()[:3], *v.stride()[:3], n, kept, G, index.numel(),
            RAGGED=ragged, D=D, D_V=wide, BLOCK_M=block_m, BLOCK_D=triton.next_power_of_2(max(D, wide)), num_warps=4,
        )  # fmt: skip
    return Rows(k_out, v_out, *bounds)


def compact(
    k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, check: bool = True, _backend: str | None = None
) -> Rows:
    """Copy the kept tokens into new storage, order preserved.

    Args:
        k: [B, G, n, D], float16, bfloat16, float32 or uint8 (rows of codes), any strides.
        v: as k; may be of another width.
        keep: int64 [B, G, C], indices into n sorted ascending (dense), or bool [B, G, n] (ragged).
        check: whether indices are looked at on a CPU; False for a caller that made them by arithmetic.

    Returns:
        `Rows`, dense or ragged after the kind of `keep`; new memory, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or an index is out of range (on CUDA
            that is an asynchronous device assertion instead, which needs no wait).
    """
    check_tensor("k", k, ("B", "G", "n", "D"), (*FLOATS, torch.uint8))
    check_tensor("v", v, (*k.shape[:3], "D_v"), (k.dtype,), k)
    for name, x in (("k", k), ("v", v)):
        check_head_dim(name, x)
    B, G, n, _ = k.shape
    ragged = isinstance(keep, torch.Tensor) and keep.dtype == torch.bool
    check_tensor("keep", keep, (B, G, n if ragged else "C"), (torch.int64, torch.bool), k)
    looked_at = check and not ragged and keep.device.type == "cpu" and keep.numel()
    if looked_at and not (0 <= int(keep.min()) and int(keep.max()) < n):
        raise ValueError(f"keep holds indices {int(keep.min())}..{int(keep.max())}; they must lie in 0..{n - 1}")
    return (_launch if use_triton(k, _backend) else reference)(k, v, keep)
