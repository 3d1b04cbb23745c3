"""No cache: every forward computes the whole canvas. The truth that all other policies are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlm.cache.base import Policy, Run, WindowRun, register
from dlm.cache.plan import Plan
from dlm.cache.slots import PassingCache
from dlm.canvas import Canvas
from dlm.models.attention import ATTENTION


@register("none")
@dataclass(frozen=True)
class NoCache(Policy):
    """Query tokens with one token per step: S * (P + G)."""

    still = True

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run without any storage."""
        return _Run(canvas, PassingCache(canvas.length) if reads_slots(model) else None)


class _Run(WindowRun):
    def window(self) -> tuple[list[int], list[int]]:
        """Always the whole canvas."""
        return self.whole()

    def plan(self, wanted: torch.Tensor) -> Plan:
        """The whole canvas; its padding too for a model whose attention is transformers' own."""
        if self.cache is None:
            self.forwards += 1
            return Plan(slice(0, self.canvas.length), self.canvas.valid)
        return super().plan(wanted)


def reads_slots(model: Any) -> bool:
    """Whether the model's attention function can take a packed forward apart."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == ATTENTION
