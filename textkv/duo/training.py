"""Training of the gates alone: distillation from the model as it is, plus an L1 price on every full head.

    loss = distillation + weight * mean |gate|       (arXiv 2410.10819, in the authors' code's normalisation)

The model's weights stay as they are. Gates are fp32 even where the model is not: near 1, bf16 would lose every step
below 0.004.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from textkv.duo.gated import distillation, gated
from textkv.duo.passkeys import Sample


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained; the defaults are the authors' scripts'.

    Attributes:
        steps: samples seen; batch 1. Small models need fewer.
        rate: highest learning rate of AdamW, without weight decay.
        weight: price of an open gate.
        initial: value of every gate at the start.
        sinks, recent: streaming window while training, in tokens.
        full_branch: "teacher" (their code) or "student" (the paper's formula).
        supervise: "tail" = all tokens of questions and answers (their code), "passkeys" = the answers (the paper).
        checkpointing: compute layers again in the backward pass instead of keeping them: less memory, a third slower.
    """

    steps: int = 2000
    rate: float = 0.02
    weight: float = 0.05
    initial: float = 1.0
    sinks: int = 128
    recent: int = 256
    full_branch: Literal["teacher", "student"] = "teacher"
    supervise: Literal["tail", "passkeys"] = "tail"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.sinks, self.recent) < 1:
            raise ValueError(f"steps={self.steps}, sinks={self.sinks}, recent={self.recent}: each must be at least 1")
        if self.rate <= 0 or self.weight < 0:
            raise ValueError(f"rate={self.rate}, weight={self.weight}: the rate is positive, the weight not negative")
        if not 0 <= self.initial <= 1:
            raise ValueError(f"initial={self.initial}: a gate lies in [0, 1]; use 1.0")
        if self.full_branch not in ("teacher", "student"):
            raise ValueError(f"full_branch={self.full_branch!r}: use 'teacher' or 'student'")
        if self.supervise not in ("tail", "passkeys"):
            raise ValueError(f"supervise={self.supervise!r}: use 'tail' or 'passkeys'")


@dataclass(frozen=True)
class Progress:
    """After a step: its number from 0, the two terms of its loss, and how many gates are above one half."""

    step: int
    distillation: float
    price: float
    open: int


def rate_at(step: int, steps: int) -> float:
    """Share of the highest learning rate: a ramp over the first fifth, another over the last, never below a tenth."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def train_gates(
    model: PreTrainedModel,
    draw: Callable[[int], Sample],
    settings: GateTraining,
    report: Callable[[Progress], None] = lambda progress: None,
) -> torch.Tensor:
    """Gates fp32 [layers, kv_heads] in 0..1, on the CPU.

    Args:
        model: is frozen (no weight asks for a gradient any more) and otherwise left as it is.
        draw: the sample of a step.
        report: called after every step.
    """
    model.requires_grad_(False)
    with gated(model) as decoder, _checkpointing(model, settings.checkpointing):
        shape = decoder.config.num_hidden_layers, decoder.config.num_key_value_heads
        gates = torch.full(shape, settings.initial, dtype=torch.float32, device=model.device, requires_grad=True)
        optimizer = torch.optim.AdamW([gates], lr=settings.rate, weight_decay=0.0)
        for step in range(settings.steps):
            optimizer.param_groups[0]["lr"] = settings.rate * rate_at(step, settings.steps)
            sample = draw(step)
            ids = torch.from_numpy(sample.ids).to(model.device)[None]
            chosen = torch.from_numpy(getattr(sample, settings.supervise)).to(model.device)
            window = settings.sinks, settings.recent
            loss = distillation(decoder, ids, chosen, gates, window, settings.full_branch == "student")
            price = gates.abs().mean()
            optimizer.zero_grad()
            (loss + settings.weight * price).backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            report(Progress(step, loss.item(), price.item(), int((gates > 0.5).sum())))
    return gates.detach().cpu()


@contextmanager
def _checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing for a while; transformers asks for training mode, which changes nothing else here."""
    before = model.training
    # transformers has renamed the switch; 5.17 knows only the old name, and the new ones warn of it.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        model.train()
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{name}_checkpointing_disable")()
            model.train(before)
