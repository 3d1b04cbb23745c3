"""Dream's four rules (arXiv 2508.15487, `alg`): confidence is that of the distribution which tokens are drawn from.

By default a block's masks are spread evenly over its steps. `compat=True` gives the authors' timestep schedule, whose
first steps may write nothing. On a canvas of several blocks the last step of a block writes all that it has left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dlm.canvas import Canvas
from dlm.unmask.base import number, register
from dlm.unmask.blocks import BlockRule, BlockUnmasker, ProbabilityRule
from dlm.unmask.sampling import Draw, Sampler
from dlm.unmask.schedule import ScheduleStep, best, even_quota, timestep_quota, timestep_share, timestep_shares


class _Unmasker(BlockUnmasker):
    """`shares` is the timestep schedule of each row, fp32 [batch, steps]; empty where the rule has the even one."""

    per_row = ("shares",)

    def __init__(self, rule: DreamRule, canvas: Canvas, *rest: Any) -> None:
        super().__init__(rule, canvas, *rest)
        # Made once a generation: it is the same for every step, and a linspace on the CPU.
        steps = self.schedule.steps
        self.shares = timestep_shares(steps, rule.eps) if rule.compat else steps.new_zeros(len(steps), 0)


@dataclass(frozen=True)
class DreamRule(BlockRule):
    """Base of Dream's rules: their two schedules.

    Attributes:
        compat: the authors' timestep schedule instead of the even one.
        eps: where that schedule ends.

    Raises:
        ValueError: eps outside (0, 1).
    """

    compat: bool = field(default=False, kw_only=True)
    eps: float = number(1e-3, 1e-12, 1 - 1e-6, "use the authors' 1e-3", kw_only=True)

    narrow: ClassVar[bool] = True
    warped: ClassVar[bool] = True
    unmasker: ClassVar[type[BlockUnmasker]] = _Unmasker


@register("origin")
@dataclass(frozen=True)
class Origin(DreamRule):
    """Every mask is written by chance, on its own: with probability 1 - t[i+1] / t[i], or one over the steps left."""

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """Uniform numbers, fp32 [batch, r]: what `accept` compares with the chance."""
        return sampler.uniform()

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: _Unmasker
    ) -> torch.Tensor:
        """Each mask on its own with the step's chance; in a block's last step all: bool [batch, r]."""
        # Equation of the reverse process: a mask survives a step from t to s with probability s / t.
        left = step.put(step.steps_left)
        chance = timestep_share(step, unmasker.shares) if self.compat else 1 / left
        # The last step of a block writes all that is left; a uniform number is always below 1.
        return score < torch.where(left == 1, torch.ones_like(chance), chance)[:, None]


@dataclass(frozen=True)
class _Ranked(DreamRule):
    """Base of the rules that write the best by a score, as many as the quota says.

    Attributes:
        alg_temp: 0 = strictly by confidence; else slots are drawn without replacement from softmax(confidence /
            alg_temp).

    Raises:
        ValueError: alg_temp below 0.
    """

    alg_temp: float = number(0.0, 0, 1e9, "use 0 for the strict order")

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: _Unmasker
    ) -> torch.Tensor:
        """The best by score, or with alg_temp a draw among them, as many as the schedule says: bool [batch, r]."""
        if self.alg_temp:
            # The largest of score + Gumbel noise are such a draw without replacement.
            score = score / self.alg_temp + unmasker.sampler.gumbel().float()
        quota = timestep_quota(step, unmasker.shares).tolist() if self.compat else even_quota(step)
        return best(score, masked, quota)


@register("maskgit_plus")
@dataclass(frozen=True)
class MaskGitPlus(_Ranked, ProbabilityRule):
    """The most probable tokens first."""


@register("topk_margin")
@dataclass(frozen=True)
class TopKMargin(_Ranked):
    """First where the most probable token leads the second by most."""

    spread: ClassVar[bool] = True

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """Largest probability minus the second, fp32 [batch, r]."""
        return draw.best - draw.second


@register("entropy")
@dataclass(frozen=True)
class Entropy(_Ranked):
    """First where the distribution has the least entropy."""

    spread: ClassVar[bool] = True

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """The negative entropy, fp32 [batch, r]."""
        return -draw.entropy
