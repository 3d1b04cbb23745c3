"""Token editing (LLaDA2.1, arXiv 2602.08676): written tokens are replaced while their block is still being worked on.

Every forward looks at all slots of the block. Masks are written as by `threshold`; a token that the model would now
write otherwise, and is sure enough of, is replaced. A block without masks is looked at again until nothing changes, at
most `rounds` times. Text that was given, and what fills a row behind its end, stays. The authors' modes: "quality" is
edit(0.7, 0.5), "speed" is edit(0.5, 0.0).

In a shifted model with the cache `block` the first token of a block is never edited: its logits come from the block
before, which is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlm.canvas import Canvas
from dlm.unmask.base import Choice, number, register
from dlm.unmask.blocks import BlockUnmasker, ProbabilityRule
from dlm.unmask.schedule import ScheduleStep, best, even_quota


class _Unmasker(BlockUnmasker):
    """The block of each row, and the forwards that it had no mask in: int64 [batch] each."""

    per_row = ("block", "post")
    revises = True

    def __init__(self, rule: TokenEditing, canvas: Canvas, *rest: Any) -> None:
        super().__init__(rule, canvas, *rest)
        self.block = torch.full((canvas.batch,), -1, device=canvas.ids.device)
        self.post = torch.zeros_like(self.block)
        self.edited = torch.zeros((), dtype=torch.int64, device=canvas.ids.device)

    def open(self, canvas: Canvas) -> torch.Tensor:
        """Masks, and what was written for them."""
        slots = canvas.block_slots
        return (slots >= 0) & ~(canvas.given | canvas.filled).gather(1, canvas.block_index)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """Sure masks, or the surest; and the tokens that are replaced. Keeps the block active while it may change."""
        there, active = slots >= 0, canvas.active
        held = canvas.ids.gather(1, slots.clamp(min=0))
        masked = there & (held == canvas.mask_id)
        draw = self.sampler.draw(logits, there, warped=self.rule.warped, excluded=self.excluded, spread=False)
        step = self.schedule.step(canvas, self.busy(slots, masked))
        written = self.rule.accept(draw.probability, masked, step, self)
        edits = there & ~masked & (draw.probability > self.rule.edit) & (draw.tokens != held)
        self.edited += edits.sum()
        # A forward on a block without masks is one of the further rounds.
        finished = step.put(step.block_masks) == 0
        self.post = torch.where(active == self.block, self.post, 0) + finished
        self.block = active
        going = ~finished | edits.any(1)
        canvas.hold(active.masked_fill(~(going & (self.post < self.rule.rounds)), canvas.blocks))
        return Choice(draw.tokens, written | edits)

    @property
    def stats(self) -> dict[str, Any]:
        """edited: tokens that were replaced."""
        return {"edited": int(self.edited)}


@register("edit")
@dataclass(frozen=True)
class TokenEditing(ProbabilityRule):
    """Writes what is more probable than `tau`, the quota at least, and replaces tokens of the block.

    Attributes:
        tau: probability above which a mask is written.
        edit: probability above which another token replaces a written one; 1 = never.
        rounds: forwards of a block that has no mask left, at most.

    Raises:
        ValueError: tau or edit below 0, rounds that are no number of forwards.
    """

    tau: float = number(0.95, 0, 1e9, "use a probability, the authors' are 0.5 to 0.95")
    edit: float = number(0.9, 0, 1e9, "use a probability, the authors' are 0 to 0.9")
    rounds: int = number(16, 0, 1e6, "use a number of forwards, the authors' is 16")

    warped: ClassVar[bool] = True
    unmasker: ClassVar[type[BlockUnmasker]] = _Unmasker

    @property
    def idle(self) -> int:
        """Rounds in which no mask is written."""
        return self.rounds

    def check(self, config: Any, policy: Any, hooked: bool) -> None:
        """Raises ValueError for a cache that does not compute written slots."""
        if not policy.whole_blocks:
            raise ValueError(
                f"{self.expression} looks at written tokens, and cache {policy.expression} does not compute them; use "
                "block, none, prefix, dual or freecache"
            )

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """Probability > tau, or among the best of the even quota: bool [batch, r]."""
        return masked & ((score > self.tau) | best(score, masked, even_quota(step)))
