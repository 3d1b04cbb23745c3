"""Base of the semi-autoregressive rules, which finish one block after the other: draw, score, write the best."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.base import Choice, LogitWindow, Rule, Unmasker
from dlm.unmask.noise import Generators
from dlm.unmask.sampling import Draw, Sampler
from dlm.unmask.schedule import ScheduleStep, UnmaskSchedule


class BlockUnmasker(Unmasker):
    """One generation under a block rule."""

    def __init__(
        self, rule: BlockRule, canvas: Canvas, sampler: Sampler, steps: int | None, excluded: torch.Tensor | None
    ) -> None:
        self.rule, self.sampler, self.excluded = rule, sampler, excluded
        self.schedule = UnmaskSchedule(canvas, steps)
        self._given: tuple[torch.Tensor | None, list[bool]] = (None, [])  # the last candidates, and `busy` of them
        self._reach: tuple[Any, ...] = ()  # slots, a logit window, and which slots lie in it

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        super().take_rows(rows)
        self.schedule.take_rows(rows)
        self.sampler.take_rows(rows)

    def open(self, canvas: Canvas) -> torch.Tensor | None:
        """bool [batch, B], slots of the active block that may be written; None = the masks."""
        return None

    def candidates(self, canvas: Canvas, logit_window: LogitWindow) -> torch.Tensor:
        """The slots of each row's active block that may be written and that the next forward can give: int64
        [batch, r]."""
        # On the host, where the masks are known: only their rows go through the model's head and the softmax.
        slots, masked = canvas.block_host
        # A cache policy may have computed less than the block, and a shifted model says nothing of its first row.
        given = (slots, *logit_window)
        if not self._reach or any(now is not then for now, then in zip(given, self._reach, strict=False)):
            low, high = torch.stack(logit_window).cpu().numpy()[:, :, None]
            self._reach = (*given, (slots >= low) & (slots < high))
        inside, free = self._reach[-1], self.open(canvas)
        there = masked & inside
        if free is not None:
            found = canvas.block_slots.masked_fill(~(free & torch.from_numpy(inside).to(free.device)), -1)
        else:
            table = narrowed(slots, there) if self.rule.narrow else np.where(there, slots, -1)
            found = torch.from_numpy(table).to(canvas.ids.device)
        self._given = found, there.any(1).tolist()
        return found

    def busy(self, slots: torch.Tensor, masked: torch.Tensor) -> list[bool]:
        """Rows with a candidate that holds a mask: `masked` bool [batch, r], which of `slots` do."""
        # Known for what `candidates` gave; other slots (a forced one, a scheduler's own) have to be waited for.
        return self._given[1] if slots is self._given[0] else masked.any(1).tolist()

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """Draws a token for every candidate, scores them, and writes those that the rule accepts."""
        masked = slots >= 0
        # Drawn for all candidates, written for few: confidence is that of the token drawn, so drawing comes first.
        rule = self.rule
        draw = self.sampler.draw(logits, masked, warped=rule.warped, excluded=self.excluded, spread=rule.spread)
        step = self.schedule.step(canvas, self.busy(slots, masked))
        score = self.rule.score(draw, self.sampler)
        return Choice(draw.tokens, masked & self.rule.accept(score, masked, step, self))


def narrowed(slots: np.ndarray, there: np.ndarray) -> np.ndarray:
    """int64 [batch, r], those of `slots` [batch, B] that are `there` bool [batch, B], by row from the left; short rows
    are filled up with -1, and r is at least 1."""
    if there.all():
        return slots
    if len(slots) == 1 and there.any():
        return slots[:, there[0]]
    width = max(1, int(there.sum(1).max()))
    at = np.arange(len(slots))[:, None], np.argsort(~there, axis=1, kind="stable")[:, :width]
    return np.where(there[at], slots[at], -1)


@dataclass(frozen=True)
class BlockRule(Rule):
    """Candidates are the masks of each row's active block; a block as long as the answer is pure diffusion."""

    warped: ClassVar[bool] = False
    """Whether confidence is measured after temperature, top-p and top-k, as Dream does, or before, as LLaDA."""
    spread: ClassVar[bool] = False
    """Whether `score` asks for the second probability or the entropy."""
    unmasker: ClassVar[type[BlockUnmasker]] = BlockUnmasker
    """What `begin` makes."""

    def begin(self, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None) -> BlockUnmasker:
        """Starts a generation whose `steps` are spread over the blocks."""
        excluded = torch.tensor(self.excluded(spec), device=canvas.ids.device) if self.excluded(spec) else None
        return self.unmasker(self, canvas, self.sampler(canvas, spec, generator), steps, excluded)

    def excluded(self, spec: DecodingSpec) -> tuple[int, ...]:
        """Token ids that may be written but count as impossible where probabilities are measured."""
        return ()

    @abstractmethod
    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """How eagerly each candidate shall be written, fp32 [batch, r]; larger = sooner."""

    @abstractmethod
    def accept(
        self, score: torch.Tensor, masked: torch.Tensor, step: ScheduleStep, unmasker: BlockUnmasker
    ) -> torch.Tensor:
        """Which candidates to write, bool [batch, r]; `masked` bool [batch, r] are those that are there."""


@dataclass(frozen=True)
class ProbabilityRule(BlockRule):
    """Ranks by the probability of the drawn token.

    Attributes:
        confidence_eos_eot_inf: end tokens have probability 0 where confidence is measured, so that they are written
            last (LLaDA's option of that name; the authors' code does it to the wrong copy of the logits).
    """

    confidence_eos_eot_inf: bool = field(default=False, kw_only=True)

    def excluded(self, spec: DecodingSpec) -> tuple[int, ...]:
        """The end tokens, with confidence_eos_eot_inf."""
        return spec.eos_ids if self.confidence_eos_eot_inf else ()

    def score(self, draw: Draw, sampler: Sampler) -> torch.Tensor:
        """The probability of the drawn token, fp32 [batch, r]."""
        return draw.probability
