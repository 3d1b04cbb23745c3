"""Shadow rows (WINO, arXiv 2507.18578): what the model would write in a slot if it did not see that slot's token.

Behind the canvas stand masks at the positions of the active block, one for each slot that was not given. No slot of the
canvas sees them, so nothing else changes; the shadow of slot i sees every slot but i, and the other shadows.
"""

from __future__ import annotations

import torch

from dlm.cache.plan import Packing, Plan
from dlm.canvas import Canvas


class Shadows:
    """The shadow rows of one forward; B is the block length.

    Attributes:
        ids, positions: int64 [batch, L + B], canvas and shadows.
        plan: the queries of the canvas's plan, and the shadows.
        visible: bool [batch, q, L + B], what each query sees; q is the most that a row has.
    """

    def __init__(self, canvas: Canvas, plan: Plan) -> None:
        start = canvas.block_start(canvas.active)[:, None]
        block = start + torch.arange(canvas.block_length, device=start.device)
        self.length, self.block = canvas.length, block.clamp(max=canvas.length - 1)
        # Text that was given is never taken back, and how much of it shares the block depends on other rows' gaps.
        there = (block < canvas.block_start(canvas.active + 1)[:, None]) & ~canvas.given.gather(1, self.block)
        self.ids = torch.cat([canvas.ids, torch.full_like(block, canvas.mask_id)], 1)
        self.positions = torch.cat([canvas.position_ids, canvas.position_ids.gather(1, self.block)], 1)
        queries = Packing.of(torch.cat([plan.wanted(canvas.batch, canvas.length, start.device), there], 1))
        self.plan = Plan(queries, None)
        slots = queries.slots[queries.grid]
        shadow = slots >= canvas.length
        # The slot that a query stands for, a shadow's own slot.
        own = torch.where(shadow, self.block.gather(1, (slots - canvas.length).clamp(min=0)), slots)
        column = torch.arange(canvas.length, device=start.device)
        seen = ~(shadow[..., None] & (column == own[..., None]))
        if plan.visible is not None:
            seen = seen & plan.visible[:, None]
        if canvas.grid is not None:
            number = canvas.position_ids // canvas.grid
            seen = seen & (number[:, None] <= number.gather(1, own)[..., None])
        self.visible = torch.cat([seen, shadow[..., None] & there[:, None]], 2)

    def rows(self, slots: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Where slots int64 [batch, r] of the block are read, -1 = none: those that are `written` bool [batch, r] from
        their shadows."""
        shadow = self.length + slots - self.block[:, :1]
        return torch.where(written & (slots >= 0), shadow, slots)
