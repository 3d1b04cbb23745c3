"""What several kernel test files need: tolerances and a comparison that also compares the places of NaN and inf."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests import compare

Tensors = torch.Tensor | Sequence[torch.Tensor]
# The interpreter truncates where hardware rounds when it stores bf16, so one unit in the last place (2^-7) is allowed.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def mismatch(ours: Tensors, truth: Tensors, tolerance: float | None = None) -> str:
    """What differs between two tensors, or two sequences of as many: dtype, shape, or a number by more than `tolerance`
    (of ours' dtype unless given), relative and absolute. "" = nothing."""
    if not isinstance(ours, torch.Tensor):
        return "\n".join(filter(None, (mismatch(*pair, tolerance) for pair in zip(ours, truth, strict=True))))
    if ours.dtype != truth.dtype or ours.shape != truth.shape:
        return f"{ours.dtype} {list(ours.shape)} is not {truth.dtype} {list(truth.shape)}"
    tolerance = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    return compare.mismatch(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def poisoned(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`x` with NaN wherever `keep` (its shape but for the last axis) is False."""
    return x.masked_fill(~keep.expand(x.shape[:-1])[..., None], float("nan"))


def naive(q, k, v, scale, seen, softcap=None):
    """Attention in float64 with one copy of k and v per query head; `seen` bool broadcastable to [B, H, m, n]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("bhmd,bhnd->bhmn", q.double(), k) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhmn,bhnd->bhmd", weights, v).to(q.dtype), scores.logsumexp(-1).float()


def causal_mask(m, n, window=None):
    """bool [m, n]: which of n stored tokens each of the last m sees, of the last `window` alone if given."""
    j, last = torch.arange(n), n - m + torch.arange(m)[:, None]
    return (j <= last) if window is None else (j <= last) & (j > last - window)


def ragged(dtype=torch.float32, lengths=(0, 1, 70, 130), slack=3, D=64):
    """Flat rows with NaN in the slack: k, v [total, D], start, length."""
    length = torch.tensor(lengths, dtype=torch.int32)
    start = (length + slack).cumsum(0) - length - slack
    k, v = (torch.full((int((length + slack).sum()), D), float("nan"), dtype=dtype) for _ in range(2))
    for s, n in zip(start.tolist(), lengths, strict=True):
        k[s : s + n], v[s : s + n] = randn(n, D, dtype=dtype), randn(n, D, dtype=dtype)
    return k, v, {"start": start, "length": length}
