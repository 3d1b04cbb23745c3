"""LLaDA's two rules (arXiv 2502.09992, "remasking"): a block's masks spread evenly over its steps.

The authors' name means that low-confidence predictions stay masked; a written token is never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dlm.unmask.base import register
from dlm.unmask.blocks import BlockRule, BlockUnmasker, ProbabilityRule
from dlm.unmask.sampling import Draw, Sampler
from dlm.unmask.schedule import ScheduleStep, best, even_quota


@dataclass(frozen=True)
class QuotaRule(BlockRule):
    """Writes the best of each block, as many as its schedule says."""

    narrow: ClassVar[bool] = True

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """The best by score, as many in each row as its schedule says: bool [batch, r]."""
        # LLaDA's num_transfer_tokens: the quota of each row, and the rows' best by rank.
        return best(score, masked, even_quota(step))


@register("confidence")
@dataclass(frozen=True)
class Confidence(QuotaRule, ProbabilityRule):
    """The tokens of the highest probability first, measured without temperature or noise."""


@register("random")
@dataclass(frozen=True)
class Random(QuotaRule):
    """In random order."""

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """Uniform numbers, fp32 [batch, r]."""
        # A random score is a random order.
        return sampler.uniform()
