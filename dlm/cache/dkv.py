"""dKV-Cache-Decode (arXiv 2505.15781): a token is frozen one step after it was decoded.

A token's keys and values change most when its mask becomes a token, so it is computed once more as a token before it
is frozen. Queries are the slots that were masked before the last commit: today's masks and the tokens just committed.
The whole canvas is computed in the first two steps of a block and at every `refresh`-th.

For models whose row j predicts slot j + 1 both rows of a slot are computed, its own and the one that predicts it: the
variant with the best accuracy in the paper. The authors' concatenated and reordered cache is an indexed write here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlm.cache.base import Policy, Run, check_interval, register
from dlm.cache.plan import Plan, index_plan, window_plan
from dlm.cache.slots import SlotCache
from dlm.canvas import Canvas


@register("dkv")
@dataclass(frozen=True)
class DKVCache(Policy):
    """Query tokens for P=1000, G=S=256, B=32: 77,984.

    Attributes:
        refresh: R, compute the whole canvas at every such step of a block (the authors: 8 for LLaDA, 4 for Dream);
            None = only in the first two.
        reset_each_block: steps count from each block's start, as the authors' code does; False = from the first step.

    Raises:
        ValueError: refresh < 1.
    """

    refresh: int | None = 8
    reset_each_block: bool = True

    def __post_init__(self) -> None:
        check_interval("refresh", self.refresh)

    @property
    def whole_blocks(self) -> bool:
        """No: what was written is computed once more and then read."""
        return False

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run with every row before its first step."""
        return _Run(canvas, self)


class _Run(Run):
    per_row = ("block", "step", "recent")

    def __init__(self, canvas: Canvas, policy: DKVCache) -> None:
        super().__init__(canvas, SlotCache(canvas.length))
        self.policy = policy
        self.block = torch.full((canvas.batch,), -1)
        self.step = torch.full((canvas.batch,), -1)
        self.recent = torch.zeros_like(canvas.masked())

    def logit_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From the active block to the end of the canvas: the masks of both lie among the queries."""
        return self.from_block()

    def plan(self, wanted: torch.Tensor) -> Plan:
        """The whole canvas at refreshes; else each row's masks and what its last forward committed."""
        active = self.canvas.active_cpu
        # Rows reach a new block at different forwards, so every row counts its own steps.
        self.step += 1
        if self.policy.reset_each_block:
            self.step.masked_fill_(self.block != active, 0)
        self.block = active.clone()
        self.forwards += 1
        # Twice: in the block's first forward nothing is decoded yet, in the second its first tokens are still fresh.
        whole = self.step <= 1
        if self.policy.refresh is not None:
            whole = whole | (self.step % self.policy.refresh == 0)
        if bool(whole.all()):
            low = torch.zeros_like(active)
            return window_plan(self.canvas, low, torch.full_like(low, self.canvas.length), self.kept())
        # A row that is due computes all its slots, the others only theirs: `|` with True selects every slot.
        return index_plan(self.canvas, self._queries() | whole.to(self.recent.device)[:, None], self.kept())

    def after(self, committed: torch.Tensor) -> None:
        """Keeps what was committed: those slots are computed once more as tokens."""
        self.recent = committed

    def _queries(self) -> torch.Tensor:
        """bool [batch, L], masks and the tokens of the last commit; with a shift also the slots that predict them."""
        # The paper's delay of one step: a token is computed once more after it was decoded, then it is read.
        queries = self.canvas.masked() | self.recent
        if self.canvas.shift:
            # Row j predicts slot j + 1, so the row before each query is needed too. A clone: both sides overlap.
            queries[:, :-1] |= queries[:, 1:].clone()
        return queries
