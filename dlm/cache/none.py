"""No cache: every forward computes the whole canvas. The truth that all other policies are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlm.cache.base import Policy, Run, WindowRun, register
from dlm.canvas import Canvas


@register("none")
@dataclass(frozen=True)
class NoCache(Policy):
    """Query tokens with one token per step: S * (P + G)."""

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run without any storage."""
        return _Run(canvas, None)


class _Run(WindowRun):
    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Always the whole canvas."""
        return self.whole()
