"""Reading drafts with a guider of the diffusion model's own vocabulary: ids go over as they are.

A round feeds what the guider has not read of the text, its last token included, and then the drafts but the last; the
logits of the i-th of these inputs judge draft i. Afterwards the cache holds the text but for its last token. One number
per row says how far the guider has read, and it follows from the canvas: the authors' code keeps a second one, which
goes wrong when several chunks are accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dlm.unmask.accept import Acceptance, Seen
from dlm.unmask.guider import Guider
from dlm.unmask.lane import Lane

if TYPE_CHECKING:
    from dlm.canvas import Canvas
    from dlm.models.card import Card


class SameIds:
    """Args:
    chunk: drafts that one forward of the guider judges; the next chunk is read only if all of one was accepted.
    """

    def __init__(
        self, guide: Guider, canvas: Canvas, card: Card, accept: Acceptance, chunk: int,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        self.guide, self.accept, self.chunk, self.generator = guide, accept, chunk, generator
        device = canvas.ids.device
        own, width = guide.ends(), guide.vocabulary
        ends = sorted({*own, *(i for i in card.eos_ids if i < width)})
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.dlm_ends = torch.tensor(card.eos_ids, dtype=torch.int64, device=device)
        batch = canvas.batch
        alone = guide.method is not None
        rows = [slice(i, i + 1) for i in range(batch)] if alone else [slice(0, batch)]
        self.lanes = [Lane(guide, r, device) for r in rows]
        self.have = canvas.real_start.tolist()
        """Per row the first slot that the guider has not read."""
        self.asked: dict[int, tuple[list[int], int]] = {}
        """Per lane of the last round: where each row's text ended (-1 = it was not asked), and the columns asked."""

    def agree(self, canvas: Canvas, drafts: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """int64 [batch], how many drafts of each row the guider accepts from the left.

        Args:
            drafts: int64 [batch, r], for slots from the row's first mask on.
            free: bool [batch, r], those that are there: a prefix of each row.
        """
        if drafts.shape[1] == 0:
            return drafts.new_zeros(len(drafts))
        self.settle(canvas)
        return torch.cat([self._agree(lane, canvas, drafts, free) for lane in self.lanes])

    def settle(self, canvas: Canvas) -> None:
        """Takes back what was read of drafts that did not become text; the caches hold x[:p-1] then."""
        ends = _text_ends(canvas)
        for index, (before, columns) in self.asked.items():
            lane = self.lanes[index]
            counts = []
            for row, old in zip(range(lane.rows.start, lane.rows.stop), before, strict=True):
                counts.append(0 if old < 0 else min(ends[row] - old, columns))
                if old >= 0:
                    self.have[row] = old - 1 + counts[-1]
            lane.keep(counts, columns)
        self.asked = {}

    def _agree(self, lane: Lane, canvas: Canvas, drafts: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        rows, width = lane.rows, drafts.shape[1]
        ids, drafts, free = canvas.ids[rows], drafts[rows], free[rows]
        ends = _text_ends(canvas)[rows]
        alive = [end < canvas.length for end in ends]
        count = drafts.new_zeros(lane.size)
        if not any(alive):
            return count
        text, real = self._unread(lane, ids, ends, alive)
        if self.guide.method is not None and not lane.columns:
            lane.read_prompt(text)
            text, real = text[:, :0], real[:, :0]
        last = ids.gather(1, torch.tensor(ends, device=ids.device)[:, None] - 1)
        asked = self._known(torch.cat([last, drafts[:, :-1]], 1))
        judged = torch.where(torch.isin(drafts, self.dlm_ends), self.ends[0], drafts) if len(self.ends) else drafts
        going, fed = free[:, 0], 0
        while True:
            part = slice(fed, min(fed + self.chunk, width))
            tokens, there = torch.cat([text, asked[:, part]], 1), torch.cat([real, free[:, part]], 1)
            logits = lane.forward(tokens, there, part.stop - part.start)
            seen = Seen(logits.flatten(0, 1), judged[:, part].flatten(), self.ends)
            agreed = (self.accept(seen, self.generator).view(lane.size, -1) & free[:, part]).long().cumprod(1)
            count = count + agreed.sum(1) * going
            going = going & (agreed[:, -1] > 0)
            fed, text, real = part.stop, text[:, :0], real[:, :0]
            if fed == width or not bool(going.any()):
                break
        self.asked[self.lanes.index(lane)] = [e if a else -1 for e, a in zip(ends, alive, strict=True)], fed
        return count

    def _unread(
        self, lane: Lane, ids: torch.Tensor, ends: list[int], alive: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text that the guider has not read, without its last token: [rows, t], aligned on the right, and bool of what
        is there."""
        have = [self.have[row] for row in range(lane.rows.start, lane.rows.stop)]
        stop = [end - 1 if a else have[i] for i, (end, a) in enumerate(zip(ends, alive, strict=True))]
        longest = max(s - h for s, h in zip(stop, have, strict=True))
        bounds = torch.tensor([have, stop], device=ids.device)[..., None]
        slots = bounds[1] - longest + torch.arange(longest, device=ids.device)
        return self._known(ids.gather(1, slots.clamp(min=0))), slots >= bounds[0]

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that the guider can read: an id it does not have becomes its end of text."""
        stand_in = int(self.guide.ends()[0]) if self.guide.ends() else 0
        return tokens.masked_fill(tokens >= self.guide.vocabulary, stand_in)

    @property
    def cache_columns(self) -> list[int]:
        """Columns held in each lane's cache."""
        return [lane.columns for lane in self.lanes]


def _text_ends(canvas: Canvas) -> list[int]:
    """Per row the first slot with a mask: guided text grows from the left, so its masks are the end of the row."""
    return (canvas.length - canvas.left_cpu).tolist()
