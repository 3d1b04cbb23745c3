"""Guided diffusion (FlashDLM, arXiv 2505.21467): the model drafts every mask, a causal model says how far to keep it.

Tokens are written strictly from the left: the drafts up to the first that the guider rejects, and the first one in any
case, so that the text is always the diffusion model's own. The number of forwards is the number of rounds; `steps` has
no meaning here. Official defaults: exact acceptance, chunks of 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.accept import Acceptance
from dlm.unmask.base import Choice, LogitWindow, Rule, Unmasker, register
from dlm.unmask.character_alignment import AlignedVerifier
from dlm.unmask.guider import Guider
from dlm.unmask.noise import Generators
from dlm.unmask.sampling import Sampler
from dlm.unmask.shared_vocabulary import SharedVocabularyVerifier


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
        # bool is an int to Python: chunk=True would read one token at a time.
        for name in ("chunk", "window"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name == "chunk" or value is not None):
                raise ValueError(f"{name}={value!r} is no number of tokens >= 1")
        self.acceptance()

    def acceptance(self) -> Acceptance:
        """The acceptance rule with its parameters."""
        return Acceptance(self.accept, self.k, self.ratio, self.tau, self.mass)

    def begin(self, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None) -> GuidedUnmasker:
        """Starts a generation in rounds; `steps` plays no part.

        Raises:
            ValueError: no guide, or one that does not fit the model or the canvas.
        """
        if self.guide is None:
            raise ValueError("the rule guided needs a guide: a Guider around a causal language model")
        self.guide.check(canvas, spec)
        if bool((canvas.tail > canvas.masked().int().argmax(1)).any()):
            raise ValueError(
                "the rule guided writes from the left and its guide cannot see text behind a gap; fill gaps with "
                "another rule, for example confidence"
            )
        return GuidedUnmasker(self, canvas, spec, self.sampler(canvas, spec, generator))


class GuidedUnmasker(Unmasker):
    """One guided generation: draft all masks, let the guider verify, write the accepted prefix."""

    def __init__(self, rule: Guided, canvas: Canvas, spec: DecodingSpec, sampler: Sampler) -> None:
        self.rule, self.sampler = rule, sampler
        verifier = SharedVocabularyVerifier if rule.guide.shared_vocabulary else AlignedVerifier
        self.verifier = verifier(rule.guide, canvas, spec, rule.acceptance(), rule.chunk, sampler.noise)
        self.lengths = torch.zeros(canvas.length + 1, dtype=torch.int64, device=canvas.ids.device)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch, also of the guider's caches."""
        self.sampler.take_rows(rows)
        self.verifier.take_rows(rows)

    def candidates(self, canvas: Canvas, logit_window: LogitWindow) -> torch.Tensor:
        """The first masks of each row, at most `window`, as far as they touch the text: int64 [batch, r]."""
        # As wide as the row with the most masks; shorter rows are filled up with -1 below.
        width = max(canvas.left_rows)
        width = width if self.rule.window is None else min(self.rule.window, width)
        masked = canvas.masked()
        slots = masked.int().argmax(1, keepdim=True) + torch.arange(width, device=masked.device)
        wanted = masked.gather(1, slots.clamp(max=canvas.length - 1)) & (slots < canvas.length)
        wanted = wanted & (slots >= logit_window[0][:, None]) & (slots < logit_window[1][:, None])
        # A running product keeps the prefix: drafts must touch the text, or the guider could not read up to them.
        return slots.masked_fill(~wanted.long().cumprod(1).bool(), -1)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """A draft for every candidate; written are those before the guider's first refusal, and one at least."""
        self.rule.guide.check_vocabulary(logits.shape[2])  # of a model whose spec does not say it
        masked = slots >= 0
        drafts = self.sampler.draw(logits, masked, spread=False).tokens
        accepted = self.verifier.verify(canvas, drafts, masked)
        # One token in any case: it is the diffusion model's own first choice, and without it a round might write none.
        written = accepted.clamp(min=1).masked_fill(~masked.any(1), 0)
        # Counted on the device and read once at the end: a host copy per round would wait for every forward.
        self.lengths.scatter_add_(0, written, torch.ones_like(written))
        return Choice(drafts, masked & (torch.arange(masked.shape[1], device=masked.device) < written[:, None]))

    @property
    def stats(self) -> dict[str, Any]:
        """guider_forwards, guider_tokens (fed, all rows), and accepted: how many rounds wrote 1, 2, ... tokens of a
        row, as {tokens: rounds}."""
        lengths = self.lengths.tolist()
        return {
            "guider_forwards": self.verifier.counted.forwards,
            "guider_tokens": self.verifier.counted.tokens,
            "accepted": {n: rounds for n, rounds in enumerate(lengths) if n and rounds},
        }
