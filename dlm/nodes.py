"""Several canvases of every row in one forward: the one that stands, and those that drafts would lead to.

A node is a canvas with some of the drafts written, node 0 the one that stands. All nodes of a row read what the cache
holds of that row; the slots that the plan computes each node has for itself (`SlotLayer.verify`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from dlm.cache.plan import Packing, Plan
from dlm.canvas import Canvas


@cache
def lattice(drafts: int, early: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sets of drafts are worth a canvas: the first i of them, and the first i with one that comes early.

    Drafts are mostly right and their order is not: one overtakes its neighbour. Both ways around meet again in a set
    of the first i + 2, so one more set for each of them keeps the walk going.

    Args:
        drafts: n, in the order in which they are expected.
        early: how many places a draft may come before its turn; 0 = the order is as expected or the walk ends.

    Returns:
        bool [nodes, n], what each set holds, the empty one first; int64 [nodes, n], the set with one draft more, -1 =
        none. Both on the CPU.
    """
    sets = [frozenset(range(i)) for i in range(drafts + 1)]
    sets += [frozenset({*range(i), i + by}) for by in range(1, early + 1) for i in range(drafts - by)]
    number = {held: at for at, held in enumerate(sets)}
    holds = torch.tensor([[draft in held for draft in range(drafts)] for held in sets])
    more = [
        [-1 if draft in held else number.get(held | {draft}, -1) for draft in range(drafts)] for held in sets
    ]  # fmt: skip
    return holds, torch.tensor(more)


class Nodes:
    """The canvases that one forward verifies.

    Args:
        slots, tokens: int64 [batch, n], the drafts in the order in which they are expected; -1 = none.
        early: of `lattice`.
        finish: what happens to a canvas after tokens were written: ends of text.

    Attributes:
        canvas: of all nodes, [batch * count, L], those of a row behind one another.
        count: nodes of a row.
        slots, tokens: the drafts.
        more: int64 [count, n], the node that has one draft more, -1 = none.
        present: bool [batch, count], nodes that are worth a forward: drafts are there, and the row is still in the
            same block.
    """

    def __init__(
        self, canvas: Canvas, slots: torch.Tensor, tokens: torch.Tensor, early: int, finish: Callable[[Canvas], None]
    ) -> None:
        batch, drafts = slots.shape
        holds, self.more = (x.to(slots.device) for x in lattice(drafts, early))
        self.slots, self.tokens, self.count = slots, tokens, len(holds)
        self.canvas = canvas.repeated(self.count)
        there = slots >= 0
        written = (holds & there[:, None]).view(batch * self.count, drafts)
        self.canvas.commit(*(x.repeat_interleave(self.count, 0) for x in (slots, tokens)), written)
        finish(self.canvas)
        same = self.canvas.active.view(batch, self.count) == canvas.active[:, None]
        self.present = same & (there[:, None] | ~holds).all(2)

    def plan(self, plan: Plan) -> Plan:
        """The plan of the canvas for all nodes that are present."""
        canvas = self.canvas
        batch = len(self.present)
        wanted = plan.wanted(batch, canvas.length, canvas.ids.device)[:, None] & self.present[..., None]
        visible = None if plan.visible is None else plan.visible.repeat_interleave(self.count, 0)
        return Plan(Packing.of(wanted.flatten(0, 1)), visible, nodes=self.count, stop=plan.stop)

    def walk(self, slot: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From node 0 on along what the nodes themselves would write next.

        Args:
            slot, token: int64 [batch, count], each node's own next token and where it goes.

        Returns:
            bool [batch, count], nodes that were met; int64 [batch], the last of them.
        """
        # [batch, count, n]: the node that follows if the node's own choice is that draft, -1 = it is another.
        chosen = (slot[..., None] == self.slots[:, None]) & (token[..., None] == self.tokens[:, None])
        follows = torch.where(chosen, self.more, -1).amax(2)
        follows = torch.where(self.present.gather(1, follows.clamp(min=0)), follows, -1)
        at = torch.zeros_like(slot[:, :1])
        met = torch.zeros_like(self.present).scatter_(1, at, True)
        for _ in range(self.slots.shape[1]):
            onward = follows.gather(1, at)
            at = torch.where(onward >= 0, onward, at)
            met = met.scatter(1, at, True)
        return met, at[:, 0]
