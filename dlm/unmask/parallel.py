"""Fast-dLLM's two rules (arXiv 2505.22618): as many tokens per forward as the model is sure of.

At least the even quota is written, so that `steps` bounds the forwards; with one step per token that is the single most
confident token, as the authors have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlm.unmask.base import check_number, register
from dlm.unmask.blocks import BlockUnmasker, ProbabilityRule
from dlm.unmask.pacing import Pace, even_quota, ordered, ranks


@register("threshold")
@dataclass(frozen=True)
class Threshold(ProbabilityRule):
    """Writes every token of at least this probability; above 1 = one token per step, 0 = all.

    Raises:
        ValueError: tau below 0 or no number.
    """

    tau: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0, 1e9, "use a probability, the authors' is 0.9")

    def accept(self, score: torch.Tensor, free: torch.Tensor, pace: Pace, unmasker: BlockUnmasker) -> torch.Tensor:
        return (score >= self.tau) | (ranks(score, free) < even_quota(pace)[:, None])


@register("factor")
@dataclass(frozen=True)
class Factor(ProbabilityRule):
    """Writes the n most confident tokens, n the largest number for which every rank r <= n has (r + 1)(1 - c) < f.

    If n tokens have a probability above 1 - e each and (n + 1) e <= 1, the most probable text is the one of the most
    probable tokens; that holds for f = 1. A rank that fails ends the count, as in the theorem and NVlabs' code; of the
    other codes one counts all passing ranks and one writes a failing last rank too.

    Raises:
        ValueError: f not above 0 or no number.
    """

    f: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("f", self.f, 1e-12, 1e9, "use a factor above 0, the authors' is 1.0")

    def accept(self, score: torch.Tensor, free: torch.Tensor, pace: Pace, unmasker: BlockUnmasker) -> torch.Tensor:
        best = ordered(score, free).values
        rank = torch.arange(1, best.shape[1] + 1, device=best.device)
        passing = (rank + 1) * (1 - best) < self.f  # a closed slot has -inf and fails
        count = torch.maximum(passing.long().cumprod(1).sum(1), even_quota(pace))
        return ranks(score, free) < count[:, None]
