"""Turn keys or queries that already carry RoPE to other positions: rotate by the difference of the positions.

    angle[b,j,f] = delta[axis(f),b,j] * inv_freq[f],   x1 = x[.., f],   x2 = x[.., f + R/2],   R = rotary dims
    out[.., f] = x1 cos - x2 sin,   out[.., f + R/2] = x2 cos + x1 sin

NeoX layout (halves), as Llama and Qwen use it; dims from R on pass through (partial rotary). M-RoPE gives every
frequency one of three axes (t, h, w): in contiguous `sections` (Qwen2.5-VL) or interleaved (Qwen3-VL). A scaled RoPE's
attention factor is already in x and is not applied again. Angles are formed in fp64: at position 100,000 an fp32
product is off by up to 4e-3 rad. A bf16 key is rounded once more by each call, so rotate once per eviction.

Floor in bytes: x read and written once, 2 * D * itemsize per token and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._backend import FLOATS, check_head_dim, check_tensor, dense_rows, jit, tl, triton, use_triton

_DELTAS = (torch.int32, torch.int64, torch.float32, torch.float64)


def frequency_axes(sections: Sequence[int], interleaved: bool) -> list[int]:
    """The axis (0 t, 1 h, 2 w) of each of the sum(sections) frequencies of an M-RoPE model."""
    if interleaved:
        return [f % 3 if f < 3 * sections[f % 3] else 0 for f in range(sum(sections))]
    return [axis for axis, size in enumerate(sections) for _ in range(size)]


def reference(x, delta, inv_freq, sections=None, interleaved=False):
    """Plain torch, fp64 angles: the truth, and the path off CUDA. `delta` is [1 or 3, B, n]."""
    half = inv_freq.numel()
    axes = [0] * half if delta.shape[0] == 1 else frequency_axes(sections, interleaved)
    angle = delta.double()[axes].movedim(0, -1) * inv_freq.double()  # [B, n, R / 2]
    angle = angle[:, None]
    cos, sin, still = angle.cos().float(), angle.sin().float(), angle == 0
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    out = x.clone(memory_format=torch.contiguous_format)
    # where, not a product with one: -0.0 and inf must survive a rotation by nothing bit for bit
    out[..., :half] = torch.where(still, x1, x1 * cos - x2 * sin)
    out[..., half : 2 * half] = torch.where(still, x2, x2 * cos + x1 * sin)
    return out


@jit(do_not_specialize=["n"])
def _rotate_kernel(
    p_x, p_delta, p_freq, p_out, s_xb, s_xg, s_xn, s_da, s_db, s_dn, n, groups,
    D: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one batch row; the angles are formed once and serve every head."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.arange(0, BLOCK_F)
    axis = tl.zeros([BLOCK_F], tl.int32)
    if AXES == 3:
        if INTERLEAVED:
            axis = f % 3
            axis = tl.where(f < 3 * tl.where(axis == 0, S_T, tl.where(axis == 1, S_H, S_W)), axis, 0)
        else:
            axis = (f >= S_T).to(tl.int32) + (f >= S_T + S_H).to(tl.int32)
    mask = (j < n)[:, None] & (f < HALF)[None, :]
    o_delta = b * s_db + j[:, None] * s_dn + axis[None, :] * s_da
    freq = tl.load(p_freq + f, mask=f < HALF, other=0.0).to(tl.float64)
    turns = tl.load(p_delta + o_delta, mask=mask, other=0).to(tl.float64) * freq[None, :] * 0.15915494309189535
    still = turns == 0.0
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)  # whole turns leave in fp64
    cos, sin = tl.cos(angle), tl.sin(angle)
    p_row = p_x + b * s_xb
    o_out = (b * groups * n + j) * D
    for _ in range(groups):
        x_1 = tl.load(p_row + j[:, None] * s_xn + f[None, :], mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(p_row + j[:, None] * s_xn + f[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_out + o_out[:, None] + f[None, :], tl.where(still, x_1, x_1 * cos - x_2 * sin), mask=mask)
        tl.store(p_out + o_out[:, None] + f[None, :] + HALF, tl.where(still, x_2, x_2 * cos + x_1 * sin), mask=mask)
        if BLOCK_REST > 0:
            d = 2 * HALF + tl.arange(0, BLOCK_REST)
            m_rest = (j < n)[:, None] & (d < D)[None, :]
            rest = tl.load(p_row + j[:, None] * s_xn + d[None, :], mask=m_rest)
            tl.store(p_out + o_out[:, None] + d[None, :], rest, mask=m_rest)
        p_row += s_xg
        o_out += n * D


def _launch(x, delta, inv_freq, sections, interleaved):
    B, G, n, D = x.shape
    x, half = dense_rows(x), inv_freq.numel()
    out = x.new_empty((B, G, n, D))
    _rotate_kernel[(B, triton.cdiv(n, 32))](
        x, delta, inv_freq.contiguous(), out, *x.stride()[:3], *delta.stride(), n, G,
        D=D, HALF=half, AXES=delta.shape[0], **dict(zip(("S_T", "S_H", "S_W"), sections or (0, 0, 0), strict=True)),
        INTERLEAVED=interleaved, BLOCK_N=32, BLOCK_F=triton.next_power_of_2(half),
        BLOCK_REST=0 if D == 2 * half else triton.next_power_of_2(D - 2 * half), num_warps=4,
    )  # fmt: skip
    return out


def rotate(
    x: torch.Tensor,
    delta: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    _backend: str | None = None,
) -> torch.Tensor:
    """Rotate post-RoPE keys or queries by a position difference.

    Args:
        x: [B, G, n, D], float16, bfloat16 or float32, already rotated to its old position.
        delta: new position minus old, int or float: a scalar, [n], [B, n], or with `sections` [3, B, n] (t, h, w).
        inv_freq: [R / 2] with R <= D, the model's inverse frequencies.
        sections: `mrope_section` of an M-RoPE model, summing to R / 2; None for 1-D RoPE.
        interleaved: the sections alternate (Qwen3-VL) instead of following each other (Qwen2.5-VL).

    Returns:
        A new tensor of x's shape and dtype. Where delta is 0 it equals x bit for bit.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or sections do not sum to R / 2.
    """
    check_tensor("x", x, ("B", "G", "n", "D"), FLOATS)
    check_head_dim("x", x)
    check_tensor("inv_freq", inv_freq, ("R/2",), (torch.float32, torch.float64), x)
    if not 1 <= inv_freq.numel() <= x.shape[-1] // 2:
        raise ValueError(f"inv_freq has shape {list(inv_freq.shape)}; the limit is D / 2 = {x.shape[-1] // 2} of them")
    if sections is not None and (len(sections) != 3 or sum(sections) != inv_freq.numel()):
        raise ValueError(f"sections={list(sections)} must be three sizes (t, h, w) with the sum {inv_freq.numel()}")
    delta = _three_axes(delta, x, sections)
    return (_launch if use_triton(x, _backend) else reference)(x, delta, inv_freq, sections, interleaved)


def _three_axes(delta, x, sections):
    """Check delta and return it as a view [1 or 3, B, n]."""
    B, _, n, _ = x.shape
    if not isinstance(delta, torch.Tensor) or delta.dim() > 3:
        raise ValueError(f"delta={delta!r} must be a tensor: a scalar, [n], [B, n] or [3, B, n]")
    if delta.dim() == 3 and sections is None:
        raise ValueError(f"delta has shape {list(delta.shape)}, three axes; pass the model's mrope_section as sections")
    check_tensor("delta", delta, ((), (n,), (B, n), (3, B, n))[delta.dim()], _DELTAS, x)
    return delta if delta.dim() == 3 else delta.expand(1, B, n)
