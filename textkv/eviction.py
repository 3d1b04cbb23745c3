"""Score and keep: the base of every method that gives tokens an importance and drops the rest at a prompt's end.

A method says how important each stored token is (`score`) and how many each head keeps (`counts`); this file does the
rest: it hands `score` clean blocks without padding, breaks ties by the lower index, keeps slots in order, and chooses
dense or ragged storage by whether the heads keep the same number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import Capabilities, Method
from textkv.segments.base import Stored
from textkv.segments.dense import fills_rectangle

PROTECTED = float("inf")
"""Score of a token that must be kept. One number for all of them, so that it can be told from every other score; which
of them stay where a head keeps fewer, `keep_best` decides by their age."""
NEVER = float("-inf")
"""Score of a hole or of a token that must go first."""
HIDDEN = torch.finfo(torch.float32).min / 4
"""Score of a token that the call's mask hid from those that judge: it goes before all that they saw. Two add up."""


@dataclass(frozen=True)
class Eviction(Method):
    """Base of scorers: keeps the highest scores of each KV head at the end of every prompt block."""

    capabilities: ClassVar[Capabilities] = Capabilities(scores=True)

    @abstractmethod
    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Importance of the stored tokens, fp32 [batch, kv_heads, n]; larger = keep.

        Args:
            held: tokens without holes, ascending positions.
            evidence: of the same rows and heads.
            keep: how many tokens each head will keep (a window must fit in it).
        """

    def counts(self, layer: Layer, scores: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        """Tokens to keep, int64 [batch, 1 or kv_heads] on the CPU. Default: the budget, the same in every head."""
        return torch.tensor([[self.budget.count(int(seen))] for seen in evidence.remaining])

    def scores(self, layer: Layer, evidence: Evidence, keep: list[int] | None = None) -> torch.Tensor:
        """`score` over a whole layer, fp32 [batch, kv_heads, n of layer.stored()], NEVER at holes.

        Args:
            keep: how many tokens each row's heads keep in this layer, where that is known before the scores are, so
                that a window is fitted to the layer's own number; None = the budget.
        """
        held, tokens = layer.stored(), evidence.remaining.tolist()
        keep = [self.budget.count(seen) for seen in tokens] if keep is None else keep
        asked = [None] * len(tokens) if evidence.asked is None else evidence.asked.tolist()
        if bool(evidence.visible(held.positions).all()) and len(set(zip(tokens, keep, asked, strict=True))) == 1:
            return self.score(layer, held, evidence, keep[0])
        out = torch.full(held.positions.shape, NEVER, device=held.keys.device).masked_fill(held.positions >= 0, HIDDEN)
        for row, heads, slots, part, seen in blocks(held, evidence):
            out[row, heads, slots] = self.score(layer, part, seen, keep[row])
        return out

    def learn(self, layer: Layer, evidence: Evidence) -> None:
        """Hears of every prompt block before anything of it is scored, also where all of it fits: what a method learns
        from an agent's steps (`Layer.trajectory`) goes on here. By default only what it wraps may learn."""
        if isinstance(self.inner, Eviction):
            self.inner.learn(layer, evidence)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Keep the best `counts` by `scores`, unless all fit."""
        self.learn(layer, evidence)
        if not self.fits(layer, evidence):
            scores = self.scores(layer, evidence)
            keep_best(layer, scores, self.counts(layer, scores, evidence))

    def fits(self, layer: Layer, evidence: Evidence) -> bool:
        """Whether no head of the layer holds more than it may, so that nothing has to be scored."""
        return bool((layer.lengths().amax(1) <= self._least(evidence)).all())

    def _least(self, evidence: Evidence) -> torch.Tensor:
        return torch.tensor([self.budget.count(int(seen)) for seen in evidence.remaining])


def keep_best(layer: Layer, scores: torch.Tensor, counts: torch.Tensor, rectangle: bool = False) -> None:
    """Keeps the `counts` highest scores of each head: counts int64 [batch, 1 or kv_heads] on the CPU. A row to which
    nothing came (`Layer.came`) keeps what it has.

    Args:
        rectangle: what is kept stays in slots of one number, for a method that moves it on by slots.

    A head that keeps fewer tokens than are PROTECTED in it (layers and heads that share a budget may get less than a
    window that was fitted before) keeps the newest count - 1 of these and its best other token, as `fit_window` does.

    Raises:
        ValueError: a score is NaN; the message names the layer.
    """
    if bool(scores.isnan().any()):
        raise ValueError(f"layer {layer.index}: the importance scores contain NaN; are keys and queries finite?")
    n = scores.shape[-1]
    counts = torch.minimum(layer.resting(counts), layer.lengths())
    limit = counts.to(scores.device)
    # A stable sort breaks ties by the lower index, on every device; topk does not.
    order = _fit_protection(scores, limit).sort(dim=-1, descending=True, stable=True).indices
    if rectangle or fills_rectangle(counts):
        longest = int(counts.max())
        index = order[..., :longest]
        rank = torch.arange(longest, device=scores.device)
        index = index.masked_fill(rank >= limit[..., None], n).sort(dim=-1).values
        layer.keep(index.masked_fill(index == n, -1))
        return
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=order.device).expand_as(order))
    layer.keep_mask(rank < limit[..., None])


def _fit_protection(scores: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Scores [batch, kv_heads, n] in which no head has more PROTECTED tokens than it keeps: limit int64 [batch, 1 or
    kv_heads]. Slots ascend by position, so the last ones are the newest.

    What loses its protection was never scored: the newest of it comes behind every scored token, for heads that hold
    no other but HIDDEN ones, and the rest goes first.
    """
    guarded = scores == PROTECTED
    over = guarded.sum(-1) > limit
    if not bool(over.any()):
        return scores
    place = guarded.flip(-1).cumsum(-1).flip(-1)  # 1 = the newest protected token
    late = guarded & over[..., None] & (place >= limit[..., None])
    scores = scores.masked_fill(late, NEVER)
    return scores.masked_fill(late & (place == limit[..., None]), HIDDEN / 2)


def blocks(held: Stored, evidence: Evidence) -> Iterator[tuple[int, slice, torch.Tensor, Stored, Evidence]]:
    """Cuts what a padded batch or a ragged layer holds into blocks without holes, or tokens that the evidence's queries
    did not see: whole rows, else single heads.

    Yields row, heads, slots int64 [k], and of these what is stored [1, heads, k, ..] and the evidence.
    """
    batch, heads = held.positions.shape[:2]
    real = evidence.visible(held.positions)
    for row in range(batch):
        same = bool((real[row] == real[row, :1]).all())
        for head in [None] if same else range(heads):
            which = slice(0, heads) if head is None else slice(head, head + 1)
            slots = real[row, 0 if head is None else head].nonzero()[:, 0]
            if not len(slots):
                continue  # a row that holds nothing yet, beside others that do
            part = Stored(
                held.keys[row : row + 1, which][:, :, slots],
                held.values[row : row + 1, which][:, :, slots],
                held.positions[row : row + 1, which][:, :, slots],
            )
            # Advanced indexing with `slots` below needs one shape for row, heads and slots: scores [1, h, n] fit it.
            yield row, which, slots, part, evidence.part(row, head, heads, slots)
