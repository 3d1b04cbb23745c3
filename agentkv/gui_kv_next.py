"""GUI-KV (arXiv 2510.00536) with three tokens for one: what a budget costs at 16 bits is spent on four-bit codes.

At 5 or 10 % of a screenshot history, what is wrong with an answer is mostly that its evidence was dropped, hardly ever
that it was stored coarsely. A code of 4 bits (TurboQuant, arXiv 2504.19874) takes less than a third of a 16-bit
token, places included (D + 8 bytes a head against 4 D + 4, at head_dim D >= 32), so three tokens are kept for each that
the budget counts, by GUI-KV's own choice. The pairing is ours; `docs/results.md` has it beside the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from agentkv.gui_kv import GuiKV
from textkv.budgets import Budget
from textkv.centring import Centring
from textkv.method import Method, register
from textkv.methods.turboquant import TurboQuant


@register("gui-kv-next")
@dataclass(frozen=True)
class GuiKVNext(TurboQuant):
    """A budget of 0.05 holds no more bytes than 5 % of the tokens at 16 bits, and three times as many tokens.

    Alone it wraps `gui-kv`; behind any other scorer ("snapkv+gui-kv-next") that one chooses the tokens. From a budget
    of 1 / stretch on nothing is dropped, and it is "turboquant(4,centre='fixed')".

    Attributes:
        stretch: tokens that are kept for each that the budget counts; 3 is right for codes of 4 bits.

    Raises:
        ValueError: a stretch below 1, and what `turboquant` refuses.
    """

    centre: Centring = "fixed"  # keys of M-RoPE turn by three positions, which no centre here can follow
    stretch: float = 3.0

    wraps: ClassVar = "scorer"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.stretch) and self.stretch >= 1):
            raise ValueError(f"stretch={self.stretch}: each token of the budget keeps at least one; use 1 or more")
        inner = GuiKV(budget=self.budget) if self.inner is None else self.inner
        object.__setattr__(self, "inner", self._stretched(inner))
        super().__post_init__()

    def _stretched(self, method: Method) -> Method:
        inner = None if method.inner is None else self._stretched(method.inner)
        return replace(method, budget=self.allowance, inner=inner)

    @property
    def allowance(self) -> Budget:
        """The budget, stretched."""
        if self.budget.tokens is not None:
            return Budget(tokens=int(self.stretch * self.budget.tokens))
        return Budget(fraction=min(1.0, self.stretch * self.budget.fraction))
