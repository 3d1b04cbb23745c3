"""Base of the rules that finish one block after the other: draw, score, and write the best of the active block."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from dlm.unmask.base import Choice, Reach, Rule, Unmasker
from dlm.unmask.pacing import Pace, Pacer
from dlm.unmask.sampling import Draw, Sampler

if TYPE_CHECKING:
    from dlm.canvas import Canvas
    from dlm.models.card import Card


class BlockUnmasker(Unmasker):
    """One generation under a block rule."""

    def __init__(
        self, rule: BlockRule, canvas: Canvas, sampler: Sampler, steps: int, apart: torch.Tensor | None
    ) -> None:
        self.rule, self.sampler, self.steps, self.apart = rule, sampler, steps, apart
        self.pacer = Pacer(canvas, steps)

    def candidates(self, canvas: Canvas, reach: Reach) -> torch.Tensor:
        start, end = canvas.block_start(canvas.active), canvas.block_start(canvas.active + 1)
        low, high = torch.maximum(start, reach[0]), torch.minimum(end, reach[1])
        # Always as wide as a block: the number of masks left would have to be waited for.
        slots = start[:, None] + torch.arange(canvas.block_length, device=start.device)
        masked = canvas.masked().gather(1, slots.clamp(max=canvas.length - 1))
        return slots.masked_fill(~masked | (slots < low[:, None]) | (slots >= high[:, None]), -1)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        free = slots >= 0
        draw = self.sampler.draw(logits, shaped=self.rule.shaped, apart=self.apart)
        pace = self.pacer.tick(canvas, free)
        score = self.rule.score(draw, self.sampler)
        return Choice(draw.tokens, free & self.rule.accept(score, free, pace, self))


@dataclass(frozen=True)
class BlockRule(Rule):
    """Candidates are the masks of each row's active block; a block as long as the answer is pure diffusion."""

    shaped: ClassVar[bool] = False
    """Whether confidence is measured after temperature, top-p and top-k, as Dream does, or before, as LLaDA."""
    unmasker: ClassVar[type[BlockUnmasker]] = BlockUnmasker
    """What `begin` makes."""

    def begin(self, canvas: Canvas, card: Card, generator: torch.Generator | None, steps: int) -> BlockUnmasker:
        apart = torch.tensor(self.apart(card), device=canvas.ids.device) if self.apart(card) else None
        return self.unmasker(self, canvas, self.sampler(canvas, card, generator), steps, apart)

    def apart(self, card: Card) -> tuple[int, ...]:
        """Token ids that may be written but count as impossible where probabilities are measured."""
        return ()

    @abstractmethod
    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """How eagerly each candidate shall be written, fp32 [batch, r]; larger = sooner."""

    @abstractmethod
    def accept(self, score: torch.Tensor, free: torch.Tensor, pace: Pace, unmasker: BlockUnmasker) -> torch.Tensor:
        """Which candidates to write, bool [batch, r]; `free` bool [batch, r] are those that are there."""


@dataclass(frozen=True)
class ProbabilityRule(BlockRule):
    """Ranks by the probability of the drawn token.

    Attributes:
        confidence_eos_eot_inf: end tokens have probability 0 where confidence is measured, so that they are written
            last (LLaDA's option of that name; the authors' code does it to the wrong copy of the logits).
    """

    confidence_eos_eot_inf: bool = field(default=False, kw_only=True)

    def apart(self, card: Card) -> tuple[int, ...]:
        return card.eos_ids if self.confidence_eos_eot_inf else ()

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        return draw.probability
