"""The best shared atoms of given matrices: matrix PCA (MASA, arXiv 2508.04581, section 3).

Minimise sum_l ||W_l - sum_s c_ls D_s||^2 under <D_i, D_j> = delta_ij, without taking a mean away first. The atoms are
the first left singular vectors of [vec(W_1) .. vec(W_L)]; they come from the Gram matrix [L, L] in fp64, for the other
one would have as many rows as a weight has numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from textkv.masa.sharing import check_atoms

SMALL = 1e-12  # of the largest eigenvalue: below it a direction is rounding, not an atom


def matrix_pca(weights: Tensor, atoms: int) -> tuple[Tensor, Tensor, float]:
    """(atoms [S, out, in] orthonormal, coefficients [layers, S], residual energy) of float `weights` [layers, out, in].

    Where the layers span fewer than S directions, the atoms beyond them are zero.

    Raises:
        ValueError: S < 0, more atoms than layers, or numbers that are not finite.
    """
    if atoms < 0:
        raise ValueError(f"atoms={atoms} must not be negative; use 0 for none")
    check_atoms(atoms, len(weights))
    if not bool(weights.isfinite().all()):
        raise ValueError("weights hold numbers that are not finite; take other weights")
    rows = weights.flatten(1).double()
    energy, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    there = energy[:atoms] > SMALL * energy[0].clamp(min=torch.finfo(torch.float64).tiny)
    inverse = torch.where(there, energy[:atoms].clamp(min=1e-300).rsqrt(), 0.0)
    basis = (vectors[:, :atoms] * inverse).T @ rows
    # c_ls = <D_s, W_l>, by the eigenvectors: rows @ basis.T is the same with more work.
    coefficients = vectors[:, :atoms] * torch.where(there, energy[:atoms].sqrt(), 0.0)
    shape = (atoms, *weights.shape[1:])
    return basis.view(shape).to(weights.dtype), coefficients.to(weights.dtype), float(energy[atoms:].sum())
