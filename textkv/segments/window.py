"""The window segment: what a layer with a sliding window, or with chunked attention, can still see.

Such a layer is not governed by a method: the model itself forgets. What no later token can see is let go of after each
step; the live tokens move to the front of their buffer only when its end is reached, so that decoding copies rarely.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from textkv.kernels import decode_attention, merge
from textkv.segments.base import Segment, Step, block_attention, register_segment, shown
from textkv.segments.dense import DenseSegment

Rule = Literal["sliding", "chunked"]


@register_segment("window")
class WindowSegment(DenseSegment):
    """Keeps the tokens that a later one can see.

    Args:
        window: a token sees the last `window` ones, itself included ("sliding"), or those of its own chunk of `window`
            tokens ("chunked"). Tokens are counted without padding.
        rule: which of the two.
    """

    def __init__(self, window: int, rule: Rule = "sliding") -> None:
        super().__init__()
        self.window, self.rule = window, rule
        self.seen = 0

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a token at position `query` may see one at `key`, which lies before it."""
        if self.rule == "chunked":
            return query // self.window == key // self.window
        return query - key < self.window

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass for a single token that pushes none out of the window; else `read`, then `append`."""
        # A single token that pushes nothing out of the window can be stored first and attended to in one pass.
        one = step.q.shape[2] == 1 and not step.padded and not self.holes
        if not one or self.used - self.first >= self.window or self.is_empty():
            result = self.read(step, need_lse)
            self.append(step)
            return result
        # The first token of a chunk sees nothing of the chunk before.
        if self.rule == "chunked" and self.seen % self.window == 0:
            self.first = self.used
        self.append(step)
        return self.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden)

    def read(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries see what is stored and their block as far as the window reaches; all if `step.local` is False."""
        # The model's mask knows no window: whatever its cache still holds is seen.
        if not step.local:
            return super().read(step, need_lse)
        within = self._narrowed(step)
        # Nothing is stored yet, or all of it has left: only the block itself is seen.
        if self.used == self.first:
            return block_attention(within, need_lse)
        at = self._positions()
        near = shown(at, step.hidden)[:, 0, None] & self.sees(
            step.positions[:, -step.q.shape[2] :, None], at[:, 0, None]
        )
        before = decode_attention(step.q, self._k(), self._v(), scale=step.scale, visible=near, softcap=step.softcap)
        own = block_attention(within, need_lse=True)
        return merge([before[0], own[0]], [before[1], own[1]])

    def _narrowed(self, step: Step) -> Step:
        """The step whose tokens see each other only as far as the window reaches."""
        m = step.k.shape[2]
        # A block that fits in the window needs no mask: plain causality is the faster path.
        if self.rule == "sliding" and m <= self.window:
            return step
        near = self.sees(step.positions[:, :, None], step.positions[:, None])
        if step.visible is None:
            return replace(step, visible=near & near.new_ones(m, m).tril())
        # What the model lets see each other both ways (the tokens of one image) may lie farther apart than the window.
        return step

    def append(self, step: Step) -> None:
        """Counts the columns in `seen`; when the buffer ends, moves the live tokens to its front before it grows."""
        super().append(step)
        self.seen += step.k.shape[2]

    def settle(self) -> bool:
        """Lets go of slots that the next token does not see in any row; gives the buffer back if most of it is idle."""
        if self.is_empty():
            return False
        before = self.first
        if self.holes:
            # With holes a slot tells no position: the next token of each row says which slots it still needs.
            newest = self._positions().amax(-1, keepdim=True) + 1
            needed = (self.sees(newest, self._positions()) & (self._positions() >= 0)).any(0)[0]
            self.first += int(needed.to(torch.uint8).argmax()) if bool(needed.any()) else self.used - self.first
        elif self.rule == "chunked":
            self.first = max(self.first, self.used - self.seen % self.window)
        else:
            # The next token sees itself and window - 1 older ones.
            self.first = max(self.first, self.used - self.window + 1)
        gone = self.first > before
        # A long prompt leaves a buffer many times the window behind: that is given back at once.
        if self.k.shape[2] > 2 * (self.used - self.first) + 64:
            self._move_to_front()
        return gone

    def keep(self, index: torch.Tensor) -> None:
        """From then on the window is measured by positions: slots are no longer neighbours in time."""
        self._move_to_front()
        super().keep(index)
        # Positions are no longer those of neighbours: what the window reaches is asked of them from now on.
        self.holes = True

    def keep_mask(self, mask: torch.Tensor) -> Segment:
        """Raises ValueError, always."""
        raise ValueError("a layer with a window of its own is not governed by a method: its heads keep the same tokens")

    def can_crop(self, tokens: int) -> bool:
        """Whether what is left reaches a window back from the new end; with holes only if nothing has left."""
        held = self.used - self.first
        # Nothing has left yet, so that everything can be given back.
        if held == self.seen:
            return True
        if self.holes:
            return not tokens
        seen = self.seen - tokens
        # What comes in place of the cropped tokens would see further back than what is still here.
        return held - tokens >= (seen % self.window if self.rule == "chunked" else min(seen, self.window - 1))

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Moves the end back and counts `seen` down, padding included; what left the window does not return."""
        self.used -= tokens
        self.seen -= tokens

    def _move_to_front(self) -> None:
        # Tight: a window lets go of more than comes, and what it has given back is not wanted again.
        self.k, self.v, self.positions = self._k().clone(), self._v().clone(), self._positions().clone()
        self.used, self.first = self.used - self.first, 0
