"""Several canvases of every row in one forward: the one that stands, and those that drafts would lead to.

Node 0 of a row is its canvas, node i the same with the first i drafts written. All nodes of a row read what the cache
holds of that row; the slots that the plan computes each node has for itself (`SlotLayer.verify`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dlm.cache.plan import Packing, Plan
from dlm.canvas import Canvas


class Nodes:
    """The canvases that one forward verifies.

    Args:
        slots, tokens: int64 [batch, n], the drafts in their order; -1 = none.
        finish: what happens to a canvas after tokens were written: ends of text.

    Attributes:
        canvas: of all nodes, [batch * (n + 1), L], those of a row behind one another.
        count: n + 1.
        slots, tokens: the drafts.
        present: bool [batch, n + 1], nodes that are worth a forward: drafts are there, and the row is still in the
            same block.
    """

    def __init__(
        self, canvas: Canvas, slots: torch.Tensor, tokens: torch.Tensor, finish: Callable[[Canvas], None]
    ) -> None:
        batch, drafts = slots.shape
        self.slots, self.tokens, self.count = slots, tokens, drafts + 1
        self.canvas = canvas.repeated(self.count)
        # [batch, nodes, drafts]: node i has draft j for all j < i.
        number = torch.arange(self.count, device=slots.device)
        written = (number[:drafts][None] < number[:, None])[None] & (slots >= 0)[:, None]
        shape = (batch * self.count, drafts)
        self.canvas.commit(*(x.repeat_interleave(self.count, 0) for x in (slots, tokens)), written.reshape(shape))
        finish(self.canvas)
        same = self.canvas.active.view(batch, self.count) == canvas.active[:, None]
        there = torch.cat([torch.ones_like(slots[:, :1], dtype=torch.bool), slots >= 0], 1)
        self.present = (same & there).long().cumprod(1).bool()

    def plan(self, plan: Plan) -> Plan:
        """The plan of the canvas for all nodes that are present."""
        canvas = self.canvas
        batch = len(self.present)
        wanted = plan.wanted(batch, canvas.length, canvas.ids.device)[:, None] & self.present[..., None]
        visible = None if plan.visible is None else plan.visible.repeat_interleave(self.count, 0)
        return Plan(Packing.of(wanted.flatten(0, 1)), visible, nodes=self.count, stop=plan.stop)
