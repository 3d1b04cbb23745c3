"""Guided diffusion (FlashDLM, arXiv 2505.21467): the model drafts every mask, a causal model says how far to keep it.

Tokens are written strictly from the left: the drafts up to the first that the guider rejects, and the first one in any
case, so that the text is always the diffusion model's own. The number of forwards is the number of rounds; `steps` has
no meaning here. Official defaults: exact acceptance, chunks of 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dlm.unmask.accept import Acceptance
from dlm.unmask.base import Choice, Reach, Rule, Unmasker, register
from dlm.unmask.guider import Guider
from dlm.unmask.offsets import ByOffsets
from dlm.unmask.same_ids import SameIds
from dlm.unmask.sampling import Sampler

if TYPE_CHECKING:
    from dlm.canvas import Canvas
    from dlm.models.card import Card


@register("guided")
@dataclass(frozen=True)
class Guided(Rule):
    """Writes the drafts that the guider accepts, from the left.

    Attributes:
        accept: "exact", "topk", "relative", "threshold", "aggressive" or "sample", see `dlm.unmask.accept`.
        k, ratio, tau, mass: of the acceptance rule; None = its own default.
        chunk: tokens that one forward of the guider judges.
        window: masks that are drafted in a round, at most; None = as far as the cache policy reaches.
        guide: the causal model.

    Raises:
        ValueError: an unknown acceptance rule or a parameter that it does not take, chunk or window below 1.
    """

    accept: str = "exact"
    k: int | None = None
    ratio: float | None = None
    tau: float | None = None
    mass: float | None = None
    chunk: int = 32
    window: int | None = 128
    guide: Guider | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk", "window"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name == "chunk" or value is not None):
                raise ValueError(f"{name}={value!r} is no number of tokens >= 1")
        self.acceptance()

    def acceptance(self) -> Acceptance:
        """The acceptance rule with its parameters."""
        return Acceptance(self.accept, self.k, self.ratio, self.tau, self.mass)

    def begin(self, canvas: Canvas, card: Card, generator: torch.Generator | None, steps: int) -> GuidedUnmasker:
        if self.guide is None:
            raise ValueError("the rule guided needs a guide: a Guider around a causal language model")
        self.guide.check(canvas, card)
        return GuidedUnmasker(self, canvas, card, self.sampler(canvas, card, generator))


class GuidedUnmasker(Unmasker):
    """One guided generation."""

    def __init__(self, rule: Guided, canvas: Canvas, card: Card, sampler: Sampler) -> None:
        self.rule, self.sampler = rule, sampler
        reader = SameIds if rule.guide.same_ids else ByOffsets
        self.reader = reader(rule.guide, canvas, card, rule.acceptance(), rule.chunk, sampler.generator)
        self.lengths = torch.zeros(canvas.length + 1, dtype=torch.int64, device=canvas.ids.device)

    def candidates(self, canvas: Canvas, reach: Reach) -> torch.Tensor:
        width = int(canvas.left_cpu.max())
        width = width if self.rule.window is None else min(self.rule.window, width)
        masked = canvas.masked()
        slots = masked.int().argmax(1, keepdim=True) + torch.arange(width, device=masked.device)
        wanted = masked.gather(1, slots.clamp(max=canvas.length - 1)) & (slots < canvas.length)
        wanted = wanted & (slots >= reach[0][:, None]) & (slots < reach[1][:, None])
        return slots.masked_fill(~wanted.long().cumprod(1).bool(), -1)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        self.rule.guide.check_vocabulary(logits.shape[2])  # of a model whose card does not say it
        free = slots >= 0
        drafts = self.sampler.draw(logits).tokens
        agreed = self.reader.agree(canvas, drafts, free)
        written = agreed.clamp(min=1).masked_fill(~free.any(1), 0)
        self.lengths.scatter_add_(0, written, torch.ones_like(written))
        return Choice(drafts, free & (torch.arange(free.shape[1], device=free.device) < written[:, None]))

    @property
    def stats(self) -> dict[str, Any]:
        """guider_forwards, guider_tokens (fed, all rows), and accepted: how many rounds wrote 1, 2, ... tokens of a
        row, as {tokens: rounds}."""
        lengths = self.lengths.tolist()
        return {
            "guider_forwards": sum(lane.forwards for lane in self.reader.lanes),
            "guider_tokens": sum(lane.tokens for lane in self.reader.lanes),
            "accepted": {n: rounds for n, rounds in enumerate(lengths) if n and rounds},
        }
