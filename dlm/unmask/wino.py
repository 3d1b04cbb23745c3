"""WINO (arXiv 2507.18578): drafts boldly, and takes back what does not hold once its surroundings are written.

Masks of more than `draft` are written, many at a time. In the same forward every written slot of the block is looked at
from a shadow that does not see its token (`dlm.shadows`); a token that is less probable than `check` there becomes a
mask again, but never more of them than the forward before had drafted, less one, so that a block comes to its end. Half
of the limits are the authors' code and not in the paper: at most 20 drafts, 30 for a block's first bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.base import Choice, number, register
from dlm.unmask.blocks import BlockUnmasker, ProbabilityRule
from dlm.unmask.noise import Generators
from dlm.unmask.schedule import ScheduleStep, ranks

FIRST_BOUND = 30  # of a block, before anything was drafted in it
LEAST, MOST, SHARE = 5, 20, 0.7  # drafts of a forward: at most this share of the masks, between the two


class _Unmasker(BlockUnmasker):
    """The block of each row and the drafts of its last forward: int64 [batch] each."""

    per_row = ("block", "last")
    shadows = revises = True

    def __init__(self, rule: WINO, canvas: Canvas, *rest: Any) -> None:
        super().__init__(rule, canvas, *rest)
        self.block = torch.full((canvas.batch,), -1, device=canvas.ids.device)
        self.last = torch.zeros_like(self.block)
        self.revoked = torch.zeros((), dtype=torch.int64, device=canvas.ids.device)

    def open(self, canvas: Canvas) -> torch.Tensor:
        """Masks, and what was written for them."""
        slots = canvas.block_slots
        return (slots >= 0) & ~(canvas.given | canvas.filled).gather(1, canvas.block_index)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """The drafts of masks; of written slots, whose logits are their shadows', those that are taken back."""
        there, held = slots >= 0, canvas.ids.gather(1, slots.clamp(min=0))
        masked = there & (held == canvas.mask_id)
        draw = self.sampler.draw(logits, there, excluded=self.excluded, spread=False)
        step = self.schedule.step(canvas, self.busy(slots, masked))
        drafts = self.rule.accept(draw.probability, masked, step, self)
        count = drafts.sum(1)
        z = logits.float().index_fill(2, self.sampler.suppressed, -torch.inf)
        own = z.softmax(2).gather(2, held.clamp(max=z.shape[2] - 1)[..., None])[..., 0]
        doubted = there & ~masked & (own < self.rule.check_at) & (count > 1)[:, None]
        bound = torch.where(canvas.active == self.block, self.last, FIRST_BOUND)
        # Fewer than were drafted before: the least probable first.
        taken = doubted & (ranks(-own, doubted) < (bound - 1)[:, None])
        self.block, self.last = canvas.active, count
        self.revoked += taken.sum()
        return Choice(torch.where(taken, canvas.mask_id, draw.tokens), drafts | taken)

    @property
    def stats(self) -> dict[str, Any]:
        """revoked: tokens that became masks again."""
        return {"revoked": int(self.revoked)}


@register("wino")
@dataclass(frozen=True)
class WINO(ProbabilityRule):
    """Writes what is more probable than `draft`, and takes back what is less probable than `check_at`.

    Attributes:
        draft: probability above which a mask is written, the best one in any case.
        check_at: probability below which a written token is taken back; 0 = never.

    Raises:
        ValueError: a probability below 0.
    """

    draft: float = number(0.6, 0, 1e9, "use a probability, the authors' is 0.6")
    check_at: float = number(0.9, 0, 1e9, "use a probability, the authors' is 0.9")

    unmasker: ClassVar[type[BlockUnmasker]] = _Unmasker

    @property
    def idle(self) -> int:
        """Forwards that may take back as many as they write."""
        return FIRST_BOUND

    def check(self, config: Any, policy: Any, hooked: bool) -> None:
        """Raises ValueError for a cache or guidance that shadows cannot stand beside."""
        wrong = ""
        if config.cfg_scale:
            wrong = f"cfg_scale={config.cfg_scale}: guided logits have no shadows; use 0"
        elif not (policy.still and policy.whole_blocks):
            wrong = f"cache {policy.expression}: a block's slots must be computed and read together; use none or dual"
        if wrong:
            raise ValueError(f"{self.expression} with {wrong}")

    def begin(self, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None) -> BlockUnmasker:
        """Starts a generation. Raises ValueError for a model whose row j predicts slot j + 1: a shadow has its slot's
        place, and that row is read for the next one."""
        if canvas.shift:
            raise ValueError("the rule wino needs a model whose rows predict their own slots; use threshold with this")
        return super().begin(canvas, spec, generator, steps)

    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """Probability > draft, at most a share of the masks, and the best one: bool [batch, r]."""
        rank = ranks(score, masked)
        most = (SHARE * step.put(step.block_masks)).long().clamp(LEAST, MOST)
        return masked & (((score > self.draft) & (rank < most[:, None])) | (rank == 0))
