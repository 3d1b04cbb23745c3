"""Unmasking rules as diffusers schedulers: one class for each rule, its options in a config that is saved and loaded.

The classes are made of the rules: `ThresholdScheduler` of `Threshold` with its fields, and one for every rule that is
registered when this module is imported. A scheduler has no rule of its own: `step` asks the rule of `dlm.unmask` of the
same name. Inside `dlm.pipeline.MaskedDiffusionPipeline` that rule is the one of the running generation; alone, `step`
takes `sample` for a canvas and counts its steps from the call with timestep 0.

Needs the package diffusers: `pip install 'agentkv[pipeline]'`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from dlm.canvas import Canvas
from dlm.models import DecodingSpec
from dlm.unmask import Guided, Rule, Sampling, Unmasker, list_rules
from dlm.unmask.base import find

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("dlm.schedulers needs the package diffusers: pip install 'agentkv[pipeline]'") from error


@dataclass
class UnmaskSchedulerOutput(BaseOutput):
    """What a step did.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`): the tokens after the step.
        transfer_index (`torch.BoolTensor` of shape `(batch_size, length)`): which of them were written now.
        sampled_tokens (`torch.LongTensor` of shape `(batch_size, length)`): the token drawn for each position.
    """

    prev_sample: torch.LongTensor
    transfer_index: torch.BoolTensor
    sampled_tokens: torch.LongTensor


@dataclass(frozen=True)
class Running:
    """The generation that a step belongs to: its unmasker and canvas, and the slots of `sample`, -1 = none."""

    unmasker: Unmasker
    canvas: Canvas
    slots: torch.Tensor


class UnmaskScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers; a subclass names its rule and declares the rule's options."""

    order = 1
    rule_class: ClassVar[type[Rule]]

    def rule(self, sampling: Sampling | None = None, **more: Any) -> Rule:
        """The rule with this config. Raises ValueError for a config that it cannot have."""
        # A config that diffusers loaded also has entries of its own (`_class_name` ...).
        given = {f.name: self.config[f.name] for f in fields(self.rule_class) if f.name in self.config}
        given["suppress"] = tuple(given["suppress"])  # a tuple comes back from JSON as a list
        return self.rule_class(**given, **more, **({} if sampling is None else {"sampling": sampling}))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        """Sets the steps that the rule spreads a sample over; `block_length` is not needed and taken for likeness."""
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a number of steps >= 1, got {num_inference_steps!r}")
        self.num_inference_steps = num_inference_steps
        # Falling, as diffusers has noise levels: the last step is timestep 0 there. Our `step` counts up from 0.
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._alone: tuple[Unmasker, Canvas] | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        mask_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        running: Running | None = None,
        return_dict: bool = True,
    ) -> UnmaskSchedulerOutput | tuple[torch.LongTensor, torch.BoolTensor, torch.LongTensor]:
        """Draws a token for each mask and writes those that the rule chooses.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, length, vocab_size)`): logits aligned to `sample`: row i
                predicts position i.
            timestep (`int`): number of the step, counted up from 0; 0 begins a new sample.
            sample (`torch.LongTensor` of shape `(batch_size, length)`): tokens, and masks where there is none yet.
            mask_token_id (`int`): the mask; like the six that follow of no effect with `running`.
            eos_token_ids (`tuple[int]`): tokens that end a text, for the options that name them.
            temperature, top_p, top_k: how tokens are drawn.
            generator (`torch.Generator`, *optional*): of the random numbers.
            running (`Running`, *optional*): the generation of a pipeline.
            return_dict (`bool`): a tuple if False.

        Raises:
            ValueError: shapes that do not fit, no mask token, steps before `set_timesteps`.
        """
        if sample.ndim != 2 or model_output.shape[:2] != sample.shape:
            raise ValueError(
                f"`model_output` of shape {tuple(model_output.shape)} must have one row for each token of `sample`, "
                f"whose shape is {tuple(sample.shape)}"
            )
        if running is None:
            running = self._running(int(timestep), sample, mask_token_id, eos_token_ids, generator,
                                    Sampling(temperature, top_p, top_k))  # fmt: skip
        choice = running.unmasker.choose(model_output, running.slots, running.canvas)
        # Outside the canvas: the loop, or the caller of a lone scheduler, writes the tokens.
        after = torch.where(choice.commit, choice.tokens, sample)
        if not return_dict:
            return after, choice.commit, choice.tokens
        return UnmaskSchedulerOutput(after, choice.commit, choice.tokens)

    def _running(
        self, timestep: int, sample: torch.LongTensor, mask_id: int | None, ends: Sequence[int],
        generator: torch.Generator | None, sampling: Sampling,
    ) -> Running:  # fmt: skip
        """A generation whose canvas is `sample` alone, one block without a prompt."""
        if mask_id is None:
            raise ValueError("`mask_token_id` must be given: it says which tokens of `sample` are still to be written")
        # diffusers' convention: a scheduler has no timesteps until they are set, and a fresh one may not step.
        if not hasattr(self, "timesteps"):
            raise ValueError("`set_timesteps` must be called before the first step")
        if timestep == 0:
            # Padding must only differ from the mask: a lone sample has none.
            spec = DecodingSpec(mask_id, tuple(ends), int(mask_id == 0), 0, None, self.rule_class.name)
            length = sample.shape[1]
            canvas = Canvas(sample[:, :0], gen_length=length, block_length=length, mask_id=mask_id, shift=0)
            steps = self.num_inference_steps
            self._alone = self.rule(sampling).begin(canvas, spec, generator, steps), canvas
        if self._alone is None or self._alone[1].ids.shape != sample.shape:
            raise ValueError(f"`timestep` is {timestep} for a sample that was not begun; its first step has timestep 0")
        unmasker, canvas = self._alone
        slots = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
        # The caller may have changed the sample between two steps; the canvas follows it.
        canvas.commit(slots, sample, torch.ones_like(sample, dtype=torch.bool))
        return Running(unmasker, canvas, slots.masked_fill(sample != mask_id, -1))


def _scheduler_of(rule: type[Rule]) -> type[UnmaskScheduler]:
    """The scheduler class of a rule: its options are the rule's fields, with their defaults."""
    options = [f for f in fields(rule) if f.name not in ("sampling", "guide")]

    def __init__(self: UnmaskScheduler, **given: Any) -> None:
        # Builds the rule once, so that a config that cannot be is refused here.
        self.rule()

    # diffusers reads the names and defaults of a config from the signature.
    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature(
        [own, *(inspect.Parameter(f.name, kind, default=f.default) for f in options)]
    )
    about = f"The rule {rule.name!r} as a scheduler, see `{rule.__module__}.{rule.__name__}`."
    made = {"__init__": register_to_config(__init__), "__doc__": about, "__module__": __name__, "rule_class": rule}
    return type(f"{rule.__name__}Scheduler", (_Inside if rule is Guided else UnmaskScheduler,), made)


class _Inside(UnmaskScheduler):
    """A scheduler whose rule reads the text from its prompt on: `sample` alone does not hold it."""

    def _running(self, *args: Any) -> Running:
        raise ValueError(
            f"{type(self).__name__} steps only inside a pipeline: `running` has the text that the guider reads"
        )


SCHEDULERS: dict[str, type[UnmaskScheduler]] = {name: _scheduler_of(find(name)) for name in list_rules()}
"""The scheduler of each registered rule, by the rule's name; `ConfidenceScheduler` and so on are names of this module.

Alone, an `SSDScheduler` writes one token at each step: it sees one canvas. Inside a pipeline it verifies its guesses.
"""
# diffusers finds the class of a saved scheduler by its name in this module.
globals().update({cls.__name__: cls for cls in SCHEDULERS.values()})
__all__ = [
    "SCHEDULERS",
    "Running",
    "UnmaskScheduler",
    "UnmaskSchedulerOutput",
    *(c.__name__ for c in SCHEDULERS.values()),
]
