"""KLASS (arXiv 2511.05664): writes what is probable and has stopped changing.

A mask is ready when its distribution moved by less than `kl` (KL divergence to the forward before, in nats) in each of
the last `history` forwards and its token is more probable than `conf`. All ready ones are written; where there is none,
the schedule's quota by confidence. The authors follow masks of later blocks too; here the history of a block starts at
its first forward, so that every cache can serve it. With a cache the divergence also holds the cache's own drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlm.canvas import Canvas
from dlm.unmask.base import Choice, number, register
from dlm.unmask.blocks import BlockUnmasker, ProbabilityRule
from dlm.unmask.schedule import ScheduleStep, best, even_quota

_TINY = 1e-12  # what the authors add to a probability before its logarithm


class _Unmasker(BlockUnmasker):
    """What is known of the last forward.

    Attributes:
        history_block: int64 [batch], the block that it belongs to.
        last: fp64 [batch, r, V], its distributions; seen: bool [batch, r], which of them are a mask's.
        calm: int64 [batch, r], in how many forwards each mask held still.
    """

    per_row = ("history_block", "last", "seen", "calm")

    def __init__(self, rule: KLASS, canvas: Canvas, *rest: Any) -> None:
        super().__init__(rule, canvas, *rest)
        shape = (canvas.batch, canvas.block_length)
        self.history_block = torch.full((canvas.batch,), -1, device=canvas.ids.device)
        self.calm = torch.zeros(shape, dtype=torch.int64, device=canvas.ids.device)
        self.seen = self.calm.bool()
        # Empty until the first forward, which has nothing to compare with.
        self.last = torch.zeros(canvas.batch, 0, 0, device=canvas.ids.device)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """As every block rule, after the divergences were taken."""
        p = logits.double().index_fill(2, self.sampler.suppressed, -torch.inf).softmax(2)
        known = (self.history_block == canvas.active)[:, None]
        if self.last.shape != p.shape:
            still = torch.zeros_like(self.calm, dtype=torch.bool)
        else:
            moved = (p * ((p + _TINY).log() - (self.last + _TINY).log())).sum(2)
            # A cache with a window did not give every mask's logits: what stood in their place is not this mask's.
            still = known & self.seen & (moved < self.rule.kl)
        self.calm = torch.where(still, self.calm + 1, 0)
        self.last, self.seen, self.history_block = p, slots >= 0, canvas.active
        return super().choose(logits, slots, canvas)


@register("klass")
@dataclass(frozen=True)
class KLASS(ProbabilityRule):
    """Writes all masks that are sure and stable, else the quota.

    Attributes:
        conf, kl: limits of probability and of divergence (the authors: 0.6 to 0.9, and 0.001 to 0.015).
        history: forwards that a mask must have held still, the one that is looked at included; 2 = one divergence.

    Raises:
        ValueError: conf or kl below 0, history below 2.
    """

    conf: float = number(0.9, 0, 1, "use a probability, the authors' is 0.9")
    kl: float = number(0.01, 0, float("inf"), "use a divergence in nats, the authors' is 0.01")
    history: int = number(2, 2, 1e6, "use a number of forwards, the authors' is 2")

    unmasker = _Unmasker

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: _Unmasker
    ) -> torch.Tensor:
        """Probability > conf and still for long enough; in rows without any such the even quota: bool [batch, r]."""
        ready = masked & (score > self.conf) & (unmasker.calm >= self.history - 1)
        quota = best(score, masked, even_quota(step))
        return torch.where(ready.any(1, keepdim=True), ready, quota)
