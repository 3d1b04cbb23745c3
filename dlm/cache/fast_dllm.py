"""Fast-dLLM's prefix and dual caches (arXiv 2505.22618): the whole canvas once per block, then only a part of it.

Within a block, `prefix` computes the block and every later mask anew and reads what lies before; `dual` computes the
block alone and reads the later masks as they were at the block's start too. The authors store keys before the rotary
embedding and turn them at every step, which gives the same result at more work.

For models whose row j predicts slot j + 1 the row of a block's first slot lies before the block. The authors commit
that slot at the block's start whatever its confidence ("commit_first"); the default starts the window one slot early
instead ("careful"), for one more query token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dlm.cache.base import Policy, Run, WindowRun, check_interval, register
from dlm.cache.plan import Plan
from dlm.cache.slots import SlotCache
from dlm.canvas import Canvas


@dataclass(frozen=True)
class _FastDLLM(Policy):
    """What both caches of Fast-dLLM have in common.

    Attributes:
        shift_mode: how the first slot of a block gets its logits; no effect on models without shift.
        refresh: compute the whole canvas at every such forward besides; None = at block starts only.

    Raises:
        ValueError: another shift_mode, or refresh < 1.
    """

    shift_mode: Literal["careful", "commit_first"] = "careful"
    refresh: int | None = None

    suffix_frozen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.shift_mode not in ("careful", "commit_first"):
            raise ValueError(f"shift_mode={self.shift_mode!r}: use 'careful' or 'commit_first'")
        check_interval("refresh", self.refresh)

    @property
    def still(self) -> bool:
        """Without refreshes in the middle of a block."""
        return self.refresh is None

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run in which no block has been computed yet."""
        return _Run(canvas, self)


@register("prefix")
@dataclass(frozen=True)
class PrefixCache(_FastDLLM):
    """Query tokens with one token per step: N (P + G) + (s - 1) N (G + B) / 2."""


@register("dual")
@dataclass(frozen=True)
class DualCache(_FastDLLM):
    """Query tokens with one token per step: N (P + G) + (S - N) B."""

    suffix_frozen: ClassVar[bool] = True


class _Run(WindowRun):
    per_row = ("primed",)

    def __init__(self, canvas: Canvas, policy: _FastDLLM) -> None:
        super().__init__(canvas, SlotCache(canvas.length))
        self.policy = policy
        self.early = canvas.shift if policy.shift_mode == "careful" else 0
        # The block for which each row last computed its whole canvas.
        self.primed = [-1] * canvas.batch

    def window(self) -> tuple[list[int], list[int]]:
        """The whole canvas in a block's first forward; then from the block on, or (dual) the block alone."""
        low, high = self.whole()
        if self.policy.refresh is not None and self.forwards % self.policy.refresh == 0:
            return low, high
        # Per row: in a batch one row may start a block while another is in the middle of one.
        for row, (block, primed) in enumerate(zip(self.canvas.active_rows, self.primed, strict=True)):
            if block == primed:
                start, stop = self.canvas.span_of(row, block)
                # One slot early on a shifted model: that slot's row predicts the first of the block.
                low[row] = max(0, start - self.early)
                # dual: what lies behind the block is read as it was at the block's start, too.
                high[row] = stop if self.policy.suffix_frozen else high[row]
        return low, high

    def plan(self, wanted: torch.Tensor) -> Plan:
        """The window, after which the rows' active blocks count as begun."""
        plan = super().plan(wanted)
        self.primed = self.canvas.active_rows
        return plan

    def forced(self) -> torch.Tensor | None:
        """The first slot of a block that begins, in a shifted model with shift_mode="commit_first"; -1 = none."""
        # Only commit_first on a shifted model: its later windows cannot give the first slot's logits.
        if not self.canvas.shift or self.early or self.canvas.grid is not None:
            return super().forced()
        # Of the window, which begins with a row's first mask where text stands in front of that in the block.
        starts = [self.canvas.span_of(*each)[0] for each in enumerate(self.canvas.active_rows)]
        # A rule that crosses blocks (guided) may have written the slot in the forward before.
        pairs = zip(starts, self.canvas.active_rows, self.primed, strict=True)
        return self.open_of([start if now != then else -1 for start, now, then in pairs])
