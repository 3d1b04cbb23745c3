"""Evicting while decoding: one token out for each one in, after the new token has attended to all that is there.

A budget in tokens is a ceiling: a short prompt grows up to it first. A share is taken of the tokens seen at the end of
each prompt block and stays that number until the next block.

Behind a wrapper ("h2o+adakv") a method only scores, at the end of prompt blocks: how many tokens a head holds is then
the wrapper's, and decoded tokens all stay unless the wrapper says otherwise. So crop works there as it does behind
any scorer, and no two parts of a composition evict from the same layer.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels import window_mass
from textkv.eviction import NEVER, PROTECTED, Eviction, keep_best
from textkv.layer import Layer
from textkv.method import Capabilities


@dataclass(frozen=True)
class DecodeEviction(Eviction):
    """Base of scorers that drop the lowest score whenever a decoded token exceeds the budget."""

    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, decode_eviction=True, crop=False)

    @abstractmethod
    def decode_score(self, layer: Layer, row: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Importance of the stored tokens after one decoded token, fp32 [batch, kv_heads, n], NEVER at holes.

        Args:
            row: fp32 [batch, heads, n], what the decoded token looked at (itself included).
            keep: int64 [batch] on the CPU, how many tokens each row will keep.
        """

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        if self.budget.is_full:
            return
        lengths = layer.lengths().amax(1, keepdim=True)
        counts = lengths - 1 if self.budget.tokens is None else lengths.clamp(max=self.budget.tokens)
        self.drop(layer, attention_row(layer, query), counts)

    def drop(self, layer: Layer, row: torch.Tensor, counts: torch.Tensor) -> None:
        """Takes note of what one decoded token looked at and keeps the `counts` best tokens.

        Args:
            row: fp32 [batch, heads, n of layer.stored()].
            counts: int64 [batch, 1] on the CPU, at most what each row holds.
        """
        scores = self.decode_score(layer, row, counts[:, 0])
        if bool((counts < layer.lengths().amax(1, keepdim=True)).any()):
            keep_best(layer, scores, counts)


def attention_row(layer: Layer, query: torch.Tensor) -> torch.Tensor:
    """What a decoded token looked at: fp32 [batch, heads, n of layer.stored()], each row sums to 1, 0 at holes.

    Args:
        query: [batch, heads, 1, head_dim] of the token stored last; the layer holds the same number of slots per head.
    """
    held = layer.stored()
    real = held.positions >= 0
    return window_mass(query, held.keys, scale=layer.scale, valid=None if bool(real.all()) else real)


def accumulate(layer: Layer, name: str, mass: torch.Tensor) -> torch.Tensor:
    """Adds `mass` fp32 [batch, kv_heads, n] to the layer's mark `name` and returns the sum."""
    layer.statistics[name] = layer.statistic(name) + mass
    return layer.statistics[name]


def protect(
    scores: torch.Tensor, positions: torch.Tensor, first: int | torch.Tensor, last: int | torch.Tensor
) -> torch.Tensor:
    """Scores [batch, kv_heads, n] with each row's `first` oldest and `last` newest tokens (int64 [batch] or one number)
    PROTECTED and its holes NEVER."""
    first, last = (torch.as_tensor(x, device=scores.device).view(-1, 1, 1) for x in (first, last))
    real = positions >= 0
    age, youth = real.cumsum(-1), real.flip(-1).cumsum(-1).flip(-1)
    return scores.masked_fill((age <= first) | (youth <= last), PROTECTED).masked_fill(~real, NEVER)


def part_of(keep: int | torch.Tensor, share: float) -> torch.Tensor:
    """floor(share * keep) of the kept tokens, never less than 1: int64, shaped like `keep`."""
    # The tiny addend undoes binary rounding: 0.29 * 100 is 28.999999999999996, and 29 was asked for.
    return (torch.as_tensor(keep).double() * share + 1e-9).long().clamp(min=1)
