"""Self-speculative decoding (SSD, arXiv 2510.04147): the tokens of one-token-a-forward decoding in fewer forwards.

The logits of a forward give a token for every mask of the block. All but the most confident are guesses of what the
next forwards will write, in the order of their confidence. The next forward computes, beside the canvas itself, the
canvases that the first 1, 2 .. n guesses would lead to; as long as each canvas's own choice is a guess that leads to a
canvas which was computed, that one was right and its choice is written too. So a forward writes one token more than it
confirms, and every token is the one that `confidence` with one token per forward writes. Guesses are nearly always
right, and come in another order: so there is also a canvas for each guess that comes `early` places before its turn
(ours; the authors have the chain alone, and spend a forward on confirming the first guess, which is right by
construction).

The guarantee holds where rows of a batch give the same numbers as alone: in fp32. In bf16 near ties may fall otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlm.canvas import Canvas
from dlm.unmask.base import Choice, Drafter, register
from dlm.unmask.blocks import BlockUnmasker
from dlm.unmask.confidence import Confidence
from dlm.unmask.schedule import ordered


class _Unmasker(BlockUnmasker, Drafter):
    """The guesses of the last forward, int64 [batch, n], and the block that they belong to."""

    per_row = ("slots", "tokens", "block")

    def __init__(self, rule: SSD, canvas: Canvas, *rest: Any) -> None:
        super().__init__(rule, canvas, *rest)
        self.slots = torch.full((canvas.batch, rule.n), -1, device=canvas.ids.device)
        self.tokens, self.block = self.slots.clone(), self.slots[:, 0].clone()
        self.early, self.drafted, self.accepted = rule.early, 0, 0

    def drafts(self, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The guesses that still fit: of this block, up to the first whose slot is written already."""
        free = canvas.masked().gather(1, self.slots.clamp(min=0)) & (self.slots >= 0)
        free = (free & (self.block == canvas.active)[:, None]).long().cumprod(1).bool()
        width = int(free.sum(1).max())
        if width == 0:
            return None
        return self.slots.masked_fill(~free, -1)[:, :width], self.tokens[:, :width]

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """The most confident token; the others are the guesses."""
        order, tokens = self._ranked(logits, slots)
        self._guess(order, tokens, slots, canvas.active)
        return Choice(tokens, (slots >= 0) & (torch.arange(slots.shape[1], device=slots.device) == order[:, :1]))

    def verify(self, logits: torch.Tensor, slots: torch.Tensor, nodes: Any) -> tuple[Choice, torch.Tensor]:
        """What every node on the way chose for itself."""
        batch, count, width, _ = logits.shape
        # Candidates of a node are those that its guesses left.
        open_ = (
            nodes.canvas.masked().view(batch, count, -1).gather(2, slots.clamp(min=0)[:, None].expand(-1, count, -1))
        )
        wide = slots[:, None].expand(-1, count, -1).masked_fill(~open_, -1)
        order, tokens = (x.view(batch, count, width) for x in self._ranked(logits.flatten(0, 1), wide.flatten(0, 1)))
        best = order[:, :, :1]
        slot, token = wide.gather(2, best)[..., 0], tokens.gather(2, best)[..., 0]
        met, last = nodes.walk(slot, token)
        self.drafted += int((nodes.slots >= 0).sum())
        self.accepted += int(met.sum()) - batch
        at = torch.arange(batch, device=last.device)
        self._guess(order[at, last], tokens[at, last], wide[at, last], nodes.canvas.active.view(batch, count)[:, 0])
        # What every node on the way chose, at the candidates' places.
        written = slot.masked_fill(~met, -2)
        hit = slots[:, :, None] == written[:, None]
        return Choice((hit * token[:, None]).sum(2), hit.any(2) & (slots >= 0)), last

    def _ranked(self, logits: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidates' columns by falling confidence, and their tokens: int64 [batch, r] each."""
        masked = slots >= 0
        draw = self.sampler.draw(logits, masked, excluded=self.excluded, spread=False)
        return ordered(self.rule.score(draw, self.sampler), masked).indices, draw.tokens

    def _guess(self, order: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor, block: torch.Tensor) -> None:
        rest = order[:, 1 : 1 + self.rule.n]
        missing = self.rule.n - rest.shape[1]
        pad = torch.nn.functional.pad
        self.slots = pad(slots.gather(1, rest), (0, missing), value=-1)
        self.tokens, self.block = pad(tokens.gather(1, rest), (0, missing), value=-1), block

    @property
    def stats(self) -> dict[str, Any]:
        """drafted and accepted: guesses that were verified, and those that were right."""
        return {"drafted": self.drafted, "accepted": self.accepted}


@register("ssd")
@dataclass(frozen=True)
class SSD(Confidence):
    """`confidence` with one token per forward, in fewer forwards.

    Attributes:
        n: guesses that a forward verifies: it writes 1 to n + 1 tokens.
        early: places that a guess may come before its turn. A forward computes n + 1 canvases of each row for the order
            that is expected, and for each place at most n - 1 more.

    Raises:
        ValueError: n below 1, or early below 0.
    """

    n: int = 4
    early: int = 1

    unmasker = _Unmasker

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n={self.n!r} is no number of guesses; use 1 or more, for example 4")
        if isinstance(self.early, bool) or not isinstance(self.early, int) or self.early < 0:
            raise ValueError(f"early={self.early!r} is no number of places; use 0 (none) or more, for example 1")

    def check(self, config: Any, policy: Any, hooked: bool) -> None:
        """Raises ValueError for what the guarantee does not cover."""
        wrong = ""
        if config.sampling.temperature or self.sampling.temperature:
            wrong = f"temperature={config.temperature}: only the most probable tokens can be guessed; use 0"
        elif config.cfg_scale:
            wrong = f"cfg_scale={config.cfg_scale}: guided logits are not verified; use 0"
        elif hooked:
            wrong = "logits_hook sees one canvas and the rule verifies several; leave it out"
        elif config.forwards is not None and (config.infill or config.forwards < config.gen_length):
            wrong = f"steps={config.steps}: the rule writes what one token per forward writes; leave steps out"
        elif not policy.still:
            wrong = (
                f"cache {policy.expression} changes what is stored within a block; use none, prefix, dual, freecache"
            )
        if wrong:
            raise ValueError(f"{self.expression} with {wrong}")
