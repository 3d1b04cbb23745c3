"""What several kernel test files need: tolerances and a comparison that also compares the places of NaN and inf."""

from __future__ import annotations

import torch

# The interpreter truncates where hardware rounds when it stores bf16, so one unit in the last place (2^-7) is allowed.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float | None = None) -> None:
    assert ours.dtype == truth.dtype and ours.shape == truth.shape
    tolerance = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def poisoned(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`x` with NaN wherever `keep` (its shape but for the last axis) is False."""
    return x.masked_fill(~keep.expand(x.shape[:-1])[..., None], float("nan"))
