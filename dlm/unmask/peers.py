"""Two more rules that write several tokens per forward: diffusers' entropy bound and dInfer's hierarchy.

As with `dlm.unmask.parallel` at least the even quota is written, so that `steps` bounds the forwards. Only what writes
for good is here: dInfer's variant that masks tokens again, and its credit rule, are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlm.unmask.base import check_number, register
from dlm.unmask.blocks import BlockRule, BlockUnmasker, ProbabilityRule
from dlm.unmask.pacing import Pace, even_quota, ordered, ranks
from dlm.unmask.sampling import Draw, Sampler


@register("entropy_bound")
@dataclass(frozen=True)
class EntropyBound(BlockRule):
    """Writes in the order of rising entropy while the entropies of those before sum to at most `bound`.

    That sum bounds how far the written tokens may depend on each other (diffusers' EntropyBoundScheduler).

    Raises:
        ValueError: bound below 0 or no number.
    """

    bound: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bound", self.bound, 0, 1e9, "use an entropy, diffusers has 0.1")

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        return -draw.entropy

    def accept(self, score: torch.Tensor, free: torch.Tensor, pace: Pace, unmasker: BlockUnmasker) -> torch.Tensor:
        before = (-ordered(score, free).values).cumsum(1).roll(1, dims=1)
        before[:, 0] = 0
        count = torch.maximum((before <= self.bound).sum(1), even_quota(pace))
        return ranks(score, free) < count[:, None]


@register("hierarchical")
@dataclass(frozen=True)
class Hierarchical(ProbabilityRule):
    """Writes every token of at least `tau`, and the surest of each run of masks if it has at least `low` (arXiv
    2510.08666): tokens that stand apart depend less on each other than neighbours do.

    Raises:
        ValueError: tau or low below 0 or no number.
    """

    tau: float = 0.9
    low: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("tau", self.tau), ("low", self.low)):
            check_number(name, value, 0, 1e9, "use a probability, the authors' are tau=0.9 and low=0.4")

    def accept(self, score: torch.Tensor, free: torch.Tensor, pace: Pace, unmasker: BlockUnmasker) -> torch.Tensor:
        rank = ranks(score, free)
        run = (~free).long().cumsum(1)  # the same number for masks that nothing stands between
        first = torch.full_like(rank, rank.shape[1]).repeat(1, 2).scatter_reduce(1, run, rank, "amin")
        head = (rank == first.gather(1, run)) & (score >= self.low)
        return head | (score >= self.tau) | (rank < even_quota(pace)[:, None])
