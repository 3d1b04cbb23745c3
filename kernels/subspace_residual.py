"""How much of each key lies outside a subspace: the redundancy measure of GUI-KV.

    energy[b,g,j] = || k[b,g,j] - U[b,g] U[b,g]^T k[b,g,j] ||^2

The residual itself is formed, not |k|^2 - |U^T k|^2: the difference of two nearly equal numbers would lose every digit
for exactly the keys that matter, those almost inside the subspace.

Floor in bytes: keys are read once, D * itemsize per key, the basis once per kv head, 4 bytes written per key.
"""

from __future__ import annotations

import torch

from ._backend import FLOATS, check_head_dim, check_tensor, dense_rows, jit, tl, triton, use_triton


def reference(keys, basis):
    """Plain torch, fp32: the truth, and the path off CUDA. Arguments as `subspace_residual`."""
    keys, basis = keys.float(), basis.float()
    return (keys - (keys @ basis) @ basis.mT).square_().sum(-1)


@jit(do_not_specialize=["N", "r"])
def _residual_kernel(
    p_keys, p_basis, p_energy, s_kb, s_kg, s_kn, s_ub, s_ug, s_ud, N, r, groups,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, g = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    o_key = b * s_kb + g * s_kg + j.to(tl.int64) * s_kn
    mask = (j < N)[:, None] & (d < D)[None, :]
    keys = tl.load(p_keys + o_key[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = keys
    for low in range(0, r, BLOCK_R):  # the basis by blocks of columns: all of it would not fit beside the keys
        c = low + tl.arange(0, BLOCK_R)
        o_basis = b * s_ub + g * s_ug + d.to(tl.int64)[:, None] * s_ud + c[None, :]
        basis = tl.load(p_basis + o_basis, mask=(d < D)[:, None] & (c < r)[None, :], other=0.0).to(tl.float32)
        inside = tl.dot(keys, basis, input_precision="ieee")  # [BLOCK_N, BLOCK_R]
        residual -= tl.dot(inside, tl.trans(basis), input_precision="ieee")
    tl.store(p_energy + row.to(tl.int64) * N + j, tl.sum(residual * residual, 1), mask=j < N)


def _launch(keys, basis):
    B, G, N, D = keys.shape
    keys, basis = dense_rows(keys), dense_rows(basis)
    energy = keys.new_empty((B, G, N), dtype=torch.float32)
    block_d = triton.next_power_of_2(max(16, D))
    block_n = 32 if block_d <= 256 else 16
    _residual_kernel[(B * G, triton.cdiv(N, block_n))](
        keys, basis, energy, *keys.stride()[:3], *basis.stride()[:3], N, basis.shape[3], G,
        D=D, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_R=32 if block_d <= 128 else 16, num_warps=4, num_stages=1,
    )  # fmt: skip
    return energy


def subspace_residual(keys: torch.Tensor, basis: torch.Tensor, *, _backend: str | None = None) -> torch.Tensor:
    """Squared distance of every key from the span of a basis.

    Args:
        keys: [B, G, N, D], float16, bfloat16 or float32.
        basis: [B, G, D, r] with orthonormal columns, r <= D, any of these dtypes.

    Returns:
        energy [B, G, N] in float32, >= 0. r = 0 gives the squared norm of the keys.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_tensor("keys", keys, ("B", "G", "N", "D"), FLOATS)
    check_head_dim("keys", keys)
    B, G, _, D = keys.shape
    check_tensor("basis", basis, (B, G, D, "r"), FLOATS, keys)
    if basis.shape[3] > D:
        raise ValueError(f"basis has shape {list(basis.shape)}; r must be <= D = {D}")
    return (_launch if use_triton(keys, _backend) else reference)(keys, basis)
