"""Confidence-aware parallel decoding: as many tokens per forward as the model is sure of.

Fast-dLLM's threshold and factor (arXiv 2505.22618), diffusers' entropy bound, dInfer's hierarchy (arXiv 2510.08666). At
least the even quota is written, so that `steps` bounds the forwards; with one step per token that is the single most
confident token, as the authors have it. Only what writes for good is here: dInfer's variant that masks tokens again,
and its credit rule, are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dlm.unmask.base import number, register
from dlm.unmask.blocks import BlockRule, BlockUnmasker, ProbabilityRule
from dlm.unmask.sampling import Draw, Sampler
from dlm.unmask.schedule import ScheduleStep, at_least, best, even_quota, ordered, ranks


@register("threshold")
@dataclass(frozen=True)
class Threshold(ProbabilityRule):
    """Writes every token of at least this probability; 1 = one token per step unless it is certain, 0 = all.

    Raises:
        ValueError: tau outside 0 to 1 or no number.
    """

    narrow: ClassVar[bool] = True

    tau: float = number(0.9, 0, 1, "use a probability, the authors' is 0.9")

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """Probability >= tau, or among the best of the even quota: bool [batch, r]."""
        # Or the quota: where no token is sure enough, progress must be made all the same.
        return (score >= self.tau) | best(score, masked, even_quota(step))


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

    narrow: ClassVar[bool] = True

    f: float = number(1.0, 1e-12, 1e9, "use a factor above 0, the authors' is 1.0")

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """The first n by probability, all ranks r of them with (r + 1)(1 - c) < f, or the quota: bool [batch, r]."""
        order = ordered(score, masked).values
        rank = torch.arange(1, order.shape[1] + 1, device=order.device)
        # Fast-dLLM's factor strategy, with the confidences c in descending order and ranks from 1 on.
        passing = (rank + 1) * (1 - order) < self.f  # a closed slot has -inf and fails
        return best(score, masked, at_least(passing.long().cumprod(1).sum(1), step))


@register("entropy_bound")
@dataclass(frozen=True)
class EntropyBound(BlockRule):
    """Writes in the order of rising entropy while the entropies of those before sum to at most `bound`.

    That sum bounds how far the written tokens may depend on each other (diffusers' EntropyBoundScheduler).

    Raises:
        ValueError: bound below 0 or no number.
    """

    narrow: ClassVar[bool] = True
    spread: ClassVar[bool] = True

    bound: float = number(0.1, 0, 1e9, "use an entropy, diffusers has 0.1")

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """The negative entropy, fp32 [batch, r]."""
        return -draw.entropy

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """While the entropies before sum to at most `bound`, or the even quota: bool [batch, r]."""
        # [batch, r], the entropies of those that come before: rolled by one, the first has none in front.
        before = (-ordered(score, masked).values).cumsum(1).roll(1, dims=1)
        before[:, 0] = 0
        return best(score, masked, at_least((before <= self.bound).sum(1), step))


@register("hierarchical")
@dataclass(frozen=True)
class Hierarchical(ProbabilityRule):
    """Writes every token of at least `tau`, and the surest of each run of masks if it has at least `low` (arXiv
    2510.08666): tokens that stand apart depend less on each other than neighbours do.

    Raises:
        ValueError: tau or low outside 0 to 1 or no number.
    """

    tau: float = number(0.9, 0, 1, "use a probability, the authors' are tau=0.9 and low=0.4")
    low: float = number(0.4, 0, 1, "use a probability, the authors' are tau=0.9 and low=0.4")

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """Probability >= tau, the surest of each run of masks if >= low, or the even quota: bool [batch, r]."""
        rank = ranks(score, masked)
        run = (~masked).long().cumsum(1)  # the same number for masks that nothing stands between
        # The smallest rank of each run, by its number 0..r; twice as wide because there may be r + 1 numbers.
        first = torch.full_like(rank, rank.shape[1]).repeat(1, 2).scatter_reduce(1, run, rank, "amin")
        head = (rank == first.gather(1, run)) & (score >= self.low)
        return head | (score >= self.tau) | best(score, masked, even_quota(step))
