"""FreeCache (arXiv 2505.21467): the prompt and finished blocks are frozen, everything behind them is computed anew.

Every forward computes one window per row, from the first unfinished block to the end of the canvas. Frozen slots are
read and never written again, so a method of textkv may keep them from then on: "freecache+snapkv(0.3)".

The authors' code freezes a block with the keys and values of its last step, in which the tokens committed by that very
step were still masks (`delay=0`). By default the window stays one forward longer on a finished block (`delay=1`):
B query tokens more per block, and exact on a block-causal model. They never refresh; `refresh` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dlm.cache.base import Policy, Run, WindowRun, check_interval, register
from dlm.cache.frozen import check_method, check_shape, slots_or_frozen
from dlm.cache.plan import Plan
from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from textkv.method import Method


@register("freecache")
@dataclass(frozen=True)
class FreeCache(Policy):
    """Query tokens with one token per step: P + S (G + B) / 2 with delay 0, (N - 1) B more with delay 1.

    Attributes:
        delay: forwards that a finished block is still computed.
        refresh: compute the whole canvas at every such forward; None = never, 1 = no cache at all.
        method: the textkv method that keeps frozen slots; None = they stay where they are.

    Raises:
        ValueError: another delay, refresh < 1, refresh with a method, or one that cannot keep frozen slots.
    """

    delay: Literal[0, 1] = 1
    refresh: int | None = None
    method: Method | None = None

    def __post_init__(self) -> None:
        if self.delay not in (0, 1):
            raise ValueError(f"delay={self.delay!r}: use 0 (as the authors' code) or 1")
        check_interval("refresh", self.refresh)
        if self.method is not None:
            check_method(self.method)
        if self.method is not None and self.refresh is not None:
            raise ValueError(
                f"refresh={self.refresh} with {self.method.expression}: slots that were handed to a method are not "
                "written again; leave out one of the two"
            )

    @property
    def still(self) -> bool:
        """Without refreshes, and with frozen slots in place."""
        return self.refresh is None and self.method is None

    def check(self, spec: DecodingSpec) -> None:
        """Raises ValueError for a method that the model's layers and heads do not go with."""
        check_shape(self.method, spec)

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run in which nothing is frozen; `model` tells a method its layers."""
        return _Run(canvas, self, model)


class _Run(WindowRun):
    per_row = ("before",)

    def __init__(self, canvas: Canvas, policy: FreeCache, model: Any) -> None:
        super().__init__(canvas, slots_or_frozen(canvas, model, policy.method))
        self.policy = policy
        self.before = [0] * canvas.batch

    def window(self) -> tuple[list[int], list[int]]:
        """From the active block (delay 0), or that of the forward before (delay 1), to the end; all at refreshes."""
        low, high = self.whole()
        refresh = self.policy.refresh is not None and self.forwards % self.policy.refresh == 0
        # The first forward computes everything: there is nothing to read yet.
        if self.forwards and not refresh:
            # With a delay the window starts where the last forward worked: what it committed is computed as tokens.
            blocks = self.before if self.policy.delay else self.canvas.active_rows
            low = [max(0, self.canvas.span_of(*each)[0] - self.canvas.shift) for each in enumerate(blocks)]
        return low, high

    def plan(self, wanted: torch.Tensor) -> Plan:
        """The window; slots before it are frozen, and handed to the method if there is one."""
        low, _ = self.current
        plan = super().plan(wanted)
        self.before = self.canvas.active_rows
        # After the plan is made: slots in front of its window are computed no more, so a method may take them.
        self.cache.freeze(low)
        return plan
