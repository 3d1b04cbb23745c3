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

from textkv.eviction import NEVER, PROTECTED, Eviction, keep_best
from textkv.kernels import window_mass
from textkv.layer import Layer
from textkv.method import Capabilities
from textkv.segments.base import shown
from textkv.softmax import Softmax


@dataclass(frozen=True)
class DecodeEviction(Eviction):
    """Base of scorers that drop the lowest score whenever a decoded token exceeds the budget.

    Attributes:
        any_order: whether `decode_score` asks for no order of slots but that of the newest tokens, as long as `keep` is
            one number, and looks at no others than `layer.rectangle`: then next to nothing is moved for a token.
    """

    any_order: ClassVar[bool] = False
    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, decode_eviction=True, crop=False)

    @abstractmethod
    def decode_score(self, layer: Layer, row: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """Importance of the stored tokens after one decoded token, fp32 [batch, kv_heads, n], NEVER at holes.

        Args:
            row: fp32 [batch, heads, n], what the decoded token looked at (itself included).
            keep: how many tokens each row will keep: one number for all, or int64 [batch] on the CPU.
        """

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """One token leaves for the one that came, once the layer is full: the lowest by `decode_score`."""
        if self.budget.is_full or self._drop_one(layer, query):
            return
        lengths = layer.lengths().amax(1, keepdim=True)
        counts = lengths - 1 if self.budget.tokens is None else lengths.clamp(max=self.budget.tokens)
        self.drop(layer, attention_row(layer, query), counts)

    def _drop_one(self, layer: Layer, query: torch.Tensor) -> bool:
        """The common case, in which the host knows all lengths: nothing is asked of the device. Returns whether it is
        that."""
        n = layer.whole
        if n is None or layer.came is not None:
            return False
        keep = n - 1 if self.budget.tokens is None else min(n, self.budget.tokens)
        if keep < n - 1:
            return False
        scores = self.decode_score(layer, attention_row(layer, query), keep)
        if keep < n:
            (layer.drop_one if self.any_order else layer.drop_lowest)(scores)
        return True

    def drop(self, layer: Layer, row: torch.Tensor, counts: torch.Tensor) -> None:
        """Takes note of what one decoded token looked at and keeps the `counts` best tokens.

        Args:
            row: fp32 [batch, heads, n of layer.stored()].
            counts: int64 [batch, 1] on the CPU, at most what each row holds.
        """
        scores = self.decode_score(layer, row, counts[:, 0])
        if bool((layer.resting(counts) < layer.lengths().amax(1, keepdim=True)).any()):
            keep_best(layer, scores, counts)


def attention_row(layer: Layer, query: torch.Tensor, sinks: bool = True) -> torch.Tensor:
    """What a decoded token looked at: fp32 [batch, heads, n of layer.stored()], 0 at holes and at tokens that the
    caller's mask hid from it. Each row sums to 1, less what the model's sinks took.

    A row of the batch to which the step brought padding has 0 everywhere.

    Args:
        query: [batch, heads, 1, head_dim] of the token stored last.
        sinks: False leaves them out: the row sums to 1.
    """
    softmax = layer.softmax if sinks else layer.softmax._replace(sinks=None)
    if layer.whole is not None and layer.hidden is None and layer.came is None:
        return last_row(query, layer.rectangle.keys, softmax)
    # In the order of `stored` or of `rectangle`, whichever the scores will be laid beside.
    held, how = layer.stored() if layer.whole is None else layer.rectangle, softmax.options
    real = shown(held.positions, layer.hidden)
    row = window_mass(query, held.keys, **how) if bool(real.all()) else _row_over_holes(query, held.keys, real, how)
    if layer.came is None:
        return row
    # Where nothing came, nothing looked.
    return row.masked_fill((layer.came == 0).to(row.device)[:, None, None], 0)


def _row_over_holes(query: torch.Tensor, keys: torch.Tensor, real: torch.Tensor, how: dict) -> torch.Tensor:
    """`window_mass` of one query over keys [batch, kv_heads, n, head_dim] of which `real` [batch, kv_heads, n] are no
    holes."""
    if bool(real[..., -1].all()):
        return window_mass(query, keys, valid=real, **how)
    # The last slot is taken for the query's own, whose mass a hole there would lose: rows that store fewer tokens than
    # others have their holes behind these, so the holes are moved in front.
    order = real.byte().argsort(stable=True, dim=-1)
    keys = keys.gather(2, order[..., None].expand_as(keys))
    row = window_mass(query, keys, valid=real.gather(-1, order), **how)
    return torch.empty_like(row).scatter_(-1, order.repeat_interleave(row.shape[1] // order.shape[1], 1), row)


def last_row(query: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """`window_mass` of one query over keys without holes: on a CPU one product, for a kernel's checks cost more."""
    if keys.is_cuda or keys.dtype != torch.float32 or softmax[1:] != (None, None):
        return window_mass(query, keys, **softmax.options)
    groups = query.view(*keys.shape[:2], -1, keys.shape[3])
    return (groups @ keys.mT).mul_(softmax.scale).softmax(-1).flatten(1, 2)


def holed(layer: Layer, keep: torch.Tensor | int) -> torch.Tensor | None:
    """Positions of `layer.stored()`, or None where one number `keep` says that there is no hole among them."""
    return None if isinstance(keep, int) else layer.held_positions()


def accumulate(layer: Layer, name: str, mass: torch.Tensor) -> torch.Tensor:
    """Adds `mass` fp32 [batch, kv_heads, n] to the layer's statistic `name` and returns the sum."""
    layer.statistics[name] = layer.statistic(name) + mass
    return layer.statistics[name]


def protect(
    scores: torch.Tensor, positions: torch.Tensor | None, first: int | torch.Tensor, last: int | torch.Tensor
) -> torch.Tensor:
    """Scores [batch, kv_heads, n] with each row's `first` oldest and `last` newest tokens (int64 [batch] or one number)
    PROTECTED and its holes NEVER.

    Args:
        positions: int32 [batch, kv_heads, n], -1 = hole; None = there are none, and `first` and `last` are numbers.
    """
    if positions is None:
        scores = scores.clone()
        scores[..., :first].fill_(PROTECTED)
        scores[..., max(0, scores.shape[-1] - last) :].fill_(PROTECTED)
        return scores
    first, last = (torch.as_tensor(x, device=scores.device).view(-1, 1, 1) for x in (first, last))
    real = positions >= 0
    age, youth = real.cumsum(-1), real.flip(-1).cumsum(-1).flip(-1)
    return scores.masked_fill((age <= first) | (youth <= last), PROTECTED).masked_fill(~real, NEVER)


def part_of(keep: int | torch.Tensor, share: float) -> int | torch.Tensor:
    """floor(share * keep) of the kept tokens, never less than 1: like `keep`, a number or int64 of its shape."""
    # The tiny addend undoes binary rounding: 0.29 * 100 is 28.999999999999996, and 29 was asked for.
    if isinstance(keep, int):
        return max(1, int(keep * share + 1e-9))
    return (torch.as_tensor(keep).double() * share + 1e-9).long().clamp(min=1)
