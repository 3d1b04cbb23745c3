"""A diffusers scheduler as an unmasking rule: what its `step` transfers is what the rule chooses.

Needs the package diffusers: `pip install 'agentkv[pipeline]'`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from dlm.cache import Policy
from dlm.canvas import Canvas
from dlm.config import DecodingConfig
from dlm.models import DecodingSpec
from dlm.nodes import Nodes
from dlm.schedulers import Running, UnmaskScheduler
from dlm.unmask import Choice, Guider, Rule, Unmasker
from dlm.unmask.base import Drafter, LogitWindow
from dlm.unmask.blocks import BlockUnmasker
from dlm.unmask.noise import Generators

try:
    from diffusers import SchedulerMixin
except ImportError as error:
    raise ImportError("dlm.scheduled needs the package diffusers: pip install 'agentkv[pipeline]'") from error


@dataclass(frozen=True)
class ScheduledRule(Rule):
    """A scheduler as `decode` sees it: a rule that chooses what the scheduler's `step` transfers.

    Attributes:
        last: what the last step did, "transfer_index", "sampled_tokens" and "slots".
    """

    scheduler: SchedulerMixin
    guide: Guider | None = None
    last: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None) -> Unmasker:
        """Starts a generation: the rule of one of our schedulers, or steps through a foreign one."""
        if not isinstance(self.scheduler, UnmaskScheduler):
            return _ForeignSteps(self, canvas, spec, generator, steps)
        more = {} if self.guide is None else {"guide": self.guide}
        unmasker = self.scheduler.rule(self.sampling, **more).begin(canvas, spec, generator, steps)
        return (_OwnDrafts if isinstance(unmasker, Drafter) else _OwnSteps)(self, unmasker)

    def check(self, config: DecodingConfig, policy: Policy, hooked: bool) -> None:
        """As the rule of the scheduler, if it is one of ours."""
        if isinstance(self.scheduler, UnmaskScheduler):
            self.scheduler.rule(self.sampling).check(config, policy, hooked)

    @property
    def idle(self) -> int:
        """As the rule of the scheduler, if it is one of ours."""
        return self.scheduler.rule(self.sampling).idle if isinstance(self.scheduler, UnmaskScheduler) else 0

    @property
    def expression(self) -> str:
        """The name of the scheduler's class."""
        return type(self.scheduler).__name__


class _OwnSteps(Unmasker):
    """A scheduler of `dlm.schedulers`: the unmasker of its rule, asked through `step`."""

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        self.unmasker.take_rows(rows)

    def __init__(self, rule: ScheduledRule, unmasker: Unmasker) -> None:
        self.rule, self.unmasker, self.steps = rule, unmasker, 0
        self.shadows, self.revises = unmasker.shadows, unmasker.revises

    def candidates(self, canvas: Canvas, logit_window: LogitWindow) -> torch.Tensor:
        """Those of the scheduler's rule."""
        return self.unmasker.candidates(canvas, logit_window)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """What the scheduler's `step` transfers; it is remembered for callbacks."""
        sample = canvas.ids.gather(1, slots.clamp(min=0))
        out = self.rule.scheduler.step(logits, self.steps, sample, running=Running(self.unmasker, canvas, slots))
        self.steps += 1
        self.rule.last.update(transfer_index=out.transfer_index, sampled_tokens=out.sampled_tokens, slots=slots)
        return Choice(out.sampled_tokens, out.transfer_index)

    @property
    def stats(self) -> dict[str, Any]:
        """What the scheduler's rule counted."""
        return self.unmasker.stats


class _OwnDrafts(_OwnSteps, Drafter):
    """The same of a rule that guesses."""

    def drafts(self, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of the scheduler's rule."""
        return self.unmasker.drafts(canvas)

    def verify(self, logits: torch.Tensor, slots: torch.Tensor, nodes: Nodes) -> tuple[Choice, torch.Tensor]:
        """The rule's own: a scheduler's `step` sees one canvas, and these are several."""
        choice, last = self.unmasker.verify(logits, slots, nodes)
        self.steps += 1
        self.rule.last.update(transfer_index=choice.commit, sampled_tokens=choice.tokens, slots=slots)
        return choice, last


class _ForeignSteps(BlockUnmasker):
    """Any scheduler that steps through one block: what it takes of our arguments is read from its `step`.

    Rows go on at their own pace, and such a scheduler has one step number for all, so rows are asked in groups.
    """

    per_row = ("block", "used")

    def __init__(
        self, rule: ScheduledRule, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None
    ) -> None:
        super().__init__(rule, canvas, rule.sampler(canvas, spec, generator), steps, None)
        self.spec = spec
        # On the CPU beside `active_cpu`: the groups below are formed without waiting for the device again.
        self.block = torch.full((canvas.batch,), -1)
        self.used = torch.zeros_like(self.block)
        # Schedulers of different diffusers releases take different arguments; one that is unknown would be a TypeError.
        takes = inspect.signature(rule.scheduler.step).parameters
        wanted = {"mask_token_id": spec.mask_id, "generator": generator}
        wanted |= {name: getattr(rule.sampling, name) for name in ("temperature", "top_p", "top_k")}
        self.options = {name: value for name, value in wanted.items() if name in takes}

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """What the scheduler's `step` transfers, asked once per group of rows at the same step of their block."""
        # Finite instead of -inf: what a foreign scheduler does with it is not known here, and 0 * -inf is NaN.
        logits = logits.float().index_fill(2, self.sampler.suppressed, torch.finfo(torch.float32).min)
        # What is no candidate shows padding, lest the scheduler take the token of slot 0 for a mask to be written.
        sample = canvas.ids.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, self.spec.pad_id)
        active = canvas.active_cpu
        self.used = torch.where(active == self.block, self.used, 0)
        self.block = active.clone()
        tokens, commit = sample.clone(), torch.zeros_like(sample, dtype=torch.bool)
        for number in self.used[canvas.unfinished].unique().tolist():
            rows = ((self.used == number) & canvas.unfinished).nonzero()[:, 0].to(sample.device)
            out = self.rule.scheduler.step(logits[rows], number, sample[rows], **self.options)
            tokens[rows], commit[rows] = out.sampled_tokens, out.transfer_index
        self.used = self.used + 1
        commit = commit & (slots >= 0)
        self.rule.last.update(transfer_index=commit, sampled_tokens=tokens, slots=slots)
        return Choice(tokens, commit)
