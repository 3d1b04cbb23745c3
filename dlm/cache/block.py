"""The cache of block-causal models: finished blocks are stored once and for all, exactly.

No token sees a later block, so keys and values of a finished block never change, and the masks behind the active block
need not be computed at all. A block's last tokens were written after its last forward, so it is computed once more as
text: `fold=True` does that together with the first forward of the next block (a mask for each query keeps the finished
block from seeing the new one), `fold=False` in a forward of its own, as the published samplers do. Tokens are the same.
A method of textkv may keep the finished blocks instead, "block+snapkv(0.3)"; that is no longer exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlm.cache.base import Policy, Run, WindowRun, register
from dlm.cache.frozen import check_method, check_shape, slots_or_frozen
from dlm.cache.plan import Plan
from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from textkv.method import Method


@register("block")
@dataclass(frozen=True)
class BlockCache(Policy):
    """Query tokens with f forwards per block: P + f B a block, and B more to finish it.

    Attributes:
        fold: finish a block in the first forward of the next one.
        method: the textkv method that keeps finished blocks; None = they stay as they are.

    Raises:
        ValueError: fold that is no bool, or a method that cannot keep frozen slots.
    """

    fold: bool = True
    method: Method | None = None

    block_causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.fold, bool):
            raise ValueError(f"fold={self.fold!r}: use True or False")
        if self.method is not None:
            check_method(self.method)

    @property
    def still(self) -> bool:
        """Only a block's first forward writes what later ones read; not where a method takes blocks away."""
        return self.method is None

    def check(self, spec: DecodingSpec) -> None:
        """Raises ValueError for a model whose tokens see what comes later, or a method that does not go with it."""
        if spec.block is None:
            raise ValueError("cache block is for block-causal models; in this one every token sees all; use freecache")
        check_shape(self.method, spec)

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run in which nothing is stored."""
        return _Run(canvas, self, model)


class _Run(WindowRun):
    per_row = ("settled",)

    def __init__(self, canvas: Canvas, policy: BlockCache, model: Any) -> None:
        super().__init__(canvas, slots_or_frozen(canvas, model, policy.method))
        self.policy = policy
        # The first slot of each row whose keys and values are not final.
        self.settled: list[int] = canvas.real_start_cpu.tolist()

    def window(self) -> tuple[list[int], list[int]]:
        """From the first block that is not stored to the end of the active one; without it if it has to wait."""
        forced = self.forced()
        # The first token of a shifted model's block comes from the block before: until then the block is no use.
        waits = [not self.policy.fold] * self.canvas.batch if forced is None else (forced >= 0).tolist()
        high = []
        for row, (settled, wait) in enumerate(zip(self.settled, waits, strict=True)):
            start, stop = self.canvas.span_of(row, self.canvas.active_rows[row])
            high.append(start if (wait or not self.policy.fold) and settled < start else stop)
        return self.settled, high

    def predicted(self, low: list[int], high: list[int]) -> tuple[list[int], list[int]]:
        """As far as the canvas: the row of a block's last slot predicts the next block's first."""
        shift = self.canvas.shift
        return [first + shift for first in low], [min(end + shift, self.canvas.length) for end in high]

    def plan(self, wanted: torch.Tensor) -> Plan:
        """The window. One block alone sees everything that is stored, and needs no mask."""
        starts = [self.canvas.span_of(*each)[0] for each in enumerate(self.canvas.active_rows)]
        low, high = self.current
        plan = super().plan(wanted)
        if plan.packing is None and all(a == start < b for a, b, start in zip(low, high, starts, strict=True)):
            plan.stop = high[0]
        self.cache.freeze(low)
        self.settled = starts
        return plan
