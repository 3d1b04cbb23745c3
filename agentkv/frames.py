"""What this wing's methods ask about screenshots: whose tokens stand out, and where numbers of a frame belong.

Three measures of salience of a token in its frame: how long its hidden state is among the frame's (`saliency`), the
same smoothed over neighbours (`smoothed`), and how far its hidden state points away from its neighbours'
(`singularity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F

from textkv.eviction import NEVER
from textkv.evidence import Evidence
from textkv.screens import Grid, Span


def check_fields(method: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for a window or kernel that cannot be, a temperature that is none, or an unknown choice."""
    for name in ("window", "kernel", *(("rank",) if hasattr(method, "rank") else ())):
        value = getattr(method, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if method.kernel % 2 == 0:
        raise ValueError(f"kernel={method.kernel}: pooling needs an odd width")
    if not getattr(method, "tau", 1) > 0:
        raise ValueError(f"tau={method.tau}: the temperature must be positive")
    for name, known in choices.items():
        if getattr(method, name) not in known:
            raise ValueError(f"{name}={getattr(method, name)!r}: use one of {', '.join(known)}")


def saliency(norms: torch.Tensor, tau: float) -> torch.Tensor:
    """Softmax over one screenshot of the standardised hidden-state norms: [n] -> fp32 [n], sums to 1."""
    norms = norms.float()
    if len(norms) == 1:
        return torch.ones_like(norms)
    return torch.softmax((norms - norms.mean()) / (norms.std() + 1e-8) / tau, dim=0)


def smoothed(norms: torch.Tensor) -> torch.Tensor:
    """Norms plus their mean over 3 x 3 neighbours, zeros beyond the border counted, if n is a square: [n] -> [n].

    As ST-Lite is released: only then does it know how the tokens lie.
    """
    side = isqrt(len(norms))
    if side * side != len(norms):
        return norms
    return norms + F.avg_pool2d(norms.view(1, side, side), 3, stride=1, padding=1).flatten()


def singularity(states: torch.Tensor, grid: Grid) -> torch.Tensor:
    """1 - mean cosine with the neighbours that exist (3, 5 or 8): states [n, d] in a grid -> fp32 [n] in [0, 2].

    A token without neighbours has 0: it stands out of nothing. (ST-Lite prints 1/8 everywhere, under which the plainest
    corner of a uniform frame has 0.75.)
    """
    high, wide = grid
    unit = F.normalize(states.float(), dim=-1).view(high, wide, -1)
    padded = F.pad(unit, (0, 0, 1, 1, 1, 1))
    there = F.pad(unit.new_ones(high, wide), (1, 1, 1, 1))
    total, count = unit.new_zeros(high, wide), unit.new_zeros(high, wide)
    for down in range(3):
        for right in range(3):
            if (down, right) != (1, 1):
                rows, columns = slice(down, down + high), slice(right, right + wide)
                total += (unit * padded[rows, columns]).sum(-1)
                count += there[rows, columns]
    return torch.where(count > 0, 1 - total / count.clamp(min=1), 0).flatten().clamp(min=0)


def at_slots(values: torch.Tensor, span: Span, positions: torch.Tensor) -> torch.Tensor:
    """Numbers of a frame's tokens, [end - start] in order, at the slots of these: positions [heads, n] -> [heads, n],
    0 elsewhere."""
    offset = positions.long() - span[0]
    here = (offset >= 0) & (offset < len(values))
    return values[offset.clamp(0, len(values) - 1)] * here


def norms_in(evidence: Evidence, row: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the hidden states of a frame's tokens that the block brought, and their offsets in the frame: [k]."""
    seen = evidence.norm_positions[row]
    here = (seen >= span[0]) & (seen < span[1])
    return evidence.norms[row, here], (seen[here] - span[0]).long()


def bonus(evidence: Evidence, row: int, span: Span, positions: torch.Tensor, tau: float) -> torch.Tensor:
    """Saliency of a screenshot's tokens at their slots: positions [heads, n] -> fp32 [heads, n], sums to 1 over the
    frame; nothing for a frame that came before this block."""
    norms, offsets = norms_in(evidence, row, span)
    if not len(norms):
        return torch.zeros_like(positions, dtype=torch.float32)
    of_frame = norms.new_zeros(span[1] - span[0])
    of_frame[offsets] = saliency(norms, tau)
    return at_slots(of_frame, span, positions)


def without(scores: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Scores with NEVER where `gone`, but for what is protected."""
    return scores.masked_fill(gone & scores.isfinite(), NEVER)
