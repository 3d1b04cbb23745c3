"""Turn keys or queries that already carry RoPE to other positions: rotate by the difference of the positions.

    angle[b,j,f] = delta[axis(f),b,j] * inv_freq[f]
    out[.., f] = x1 cos - x2 sin,   out[.., f + R/2] = x2 cos + x1 sin,   x1 = x[.., f], x2 = x[.., f + R/2],   R = rotary dims

NeoX layout (halves), as Llama and Qwen use it; dims from R on pass through (partial rotary). M-RoPE gives every frequency
one of three axes (t, h, w): in contiguous `sections` (Qwen2.5-VL) or interleaved (Qwen3-VL). A scaled RoPE's attention
factor is already in x and is not applied again. Angles are formed in fp64: at position 100,000 an fp32 product is off by
6e-3 rad. A bf16 key is rounded once more by each call, so rotate once per eviction.

Floor in bytes: x read and written once, 2 * D * itemsize per token and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels._backend import FLOATS, check_head_dim, check_tensor, use_triton

_DELTAS = (torch.int32, torch.int64, torch.float32, torch.float64)


def frequency_axes(sections: Sequence[int], interleaved: bool) -> list[int]:
    """The axis (0 t, 1 h, 2 w) of each of the sum(sections) frequencies of an M-RoPE model."""
    if not interleaved:
        return [axis % 3 for axis, size in enumerate(sections) for _ in range(size)]
    return [f % 3 if f < 3 * sections[f % 3] else 0 for f in range(sum(sections))]


def reference(x, delta, inv_freq, axes=None):
    """Plain torch: the truth, and the path off CUDA. `delta` [1 or 3, B or 1, n or 1]; `axes` int64 [R / 2] or None."""
    half = inv_freq.numel()
    delta = delta.double()
    per_frequency = delta[0, ..., None] if axes is None else delta[axes].movedim(0, -1)  # [B, n, 1 or R / 2]
    angle = (per_frequency * inv_freq.double())[:, None]  # [B, 1, n, R / 2]
    cos, sin, still = angle.cos().float(), angle.sin().float(), angle == 0
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    out = x.clone(memory_format=torch.contiguous_format)
    # where, not multiply by one: -0.0 and inf must survive a rotation by nothing bit for bit
    out[..., :half] = torch.where(still, x1, x1 * cos - x2 * sin)
    out[..., half : 2 * half] = torch.where(still, x2, x2 * cos + x1 * sin)
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
        raise ValueError(f"inv_freq has shape {list(inv_freq.shape)}; the limit is D / 2 = {x.shape[-1] // 2} frequencies")
    delta = _check_delta(delta, x, sections)
    axes = _check_sections(sections, interleaved, inv_freq) if delta.shape[0] == 3 else None
    if use_triton(x, _backend):
        raise NotImplementedError
    return reference(x, delta, inv_freq, axes)


def _check_delta(delta, x, sections):
    """Return delta as a view [1 or 3, B, n]."""
    B, _, n, _ = x.shape
    if not isinstance(delta, torch.Tensor) or delta.dim() > 3:
        raise ValueError(f"delta must be a tensor: a scalar, [n], [B, n] or [3, B, n]; got {getattr(delta, 'shape', delta)}")
    if delta.dim() == 3 and sections is None:
        raise ValueError(f"delta has shape {list(delta.shape)}, three axes; name the model's mrope_section as sections=")
    check_tensor("delta", delta, ((), (n,), (B, n), (3, B, n))[delta.dim()], _DELTAS, x)
    return delta if delta.dim() == 3 else delta.expand(1, B, n)


def _check_sections(sections, interleaved, inv_freq):
    """Return the axis of each frequency as int64 [R / 2]."""
    if sum(sections) != inv_freq.numel() or (interleaved and len(sections) != 3):
        raise ValueError(f"sections={list(sections)} sums to {sum(sections)}; it must split the {inv_freq.numel()} frequencies")
    return torch.tensor(frequency_axes(sections, interleaved), device=inv_freq.device)
