"""KVCrush: part of the budget goes to tokens that stand for the evicted crowd (arXiv 2503.00022).

Wraps any scorer ("snapkv+kvcrush"; alone it wraps snapkv). The scorer's best tokens are kept as always, but fewer of
them. Every token has a signature, one bit per KV head: is it in the upper half of that head's scores? The tokens about
to go are sorted by the Hamming distance of their signatures to one anchor, and those at equally spaced ranks stay: one
for each stretch of the list, ordinary cache entries, nothing is merged. With pages, whole pages compete and a signature
is the bits of all tokens of the page.

Built from the paper's abstract and two implementations: OpenVINO's (the authors' company) and a fork of vLLM. Where
they disagree: representatives come out of the budget (OpenVINO adds them to it), each head chooses among its own
candidates (the fork excludes head 0's important pages only, so other heads can keep a page twice), the far end of the
sorted list is always reached, ties go to the older token, a random anchor depends on seed and layer alone.
`kvcrush-official` follows OpenVINO where that is a choice and not a mistake. As behind every wrapper, the scorer only
scores, at the end of a prompt block: layers keep what its `counts` says, and decoded tokens are all kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from textkv.eviction import NEVER, PROTECTED, Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.methods.snapkv import SnapKV
from textkv.segments.base import Stored

Anchor = Literal["alternate", "mean", "inverse_mean", "zeros", "ones", "random"]
Heads = Literal["own", "shared", "summed"]


@register("kvcrush")
@dataclass(frozen=True)
class KVCrush(Eviction):
    """Important and representative tokens; cuts at the end of each prompt block, decoded tokens are all kept.

    Where the protected tokens (the scorer's, `start`, `recent`, pages that are not full) leave no room for a page in
    the budget, the scorer's own choice stands: first and last tokens alone would be no choice at all.

    Attributes:
        ratio: share of the unprotected budget that is representatives; 0 = the scorer alone, 1 = representatives only.
            0.25 in the vLLM fork; OpenVINO's measurements use 0.03 to 0.25.
        anchor: what distances are measured from: bits "zeros", "ones", "alternate" (0, 1, 0, ..., the vLLM fork),
            "mean" (what more than half of all signatures have), "inverse_mean", or "random" (OpenVINO).
        seed: of the random anchor.
        bit_quantile: a token's bit is 1 above this quantile of its head's scores; 0.5 in both implementations.
        page: tokens per page, aligned to positions; 1 = single tokens, as in the paper. Only full pages go.
        start: this many first tokens are always kept; 32 in both implementations, 0 (the scorer's choice) is ours.
        recent: this many last tokens are always kept; 128 in both implementations, 0 (the scorer's choice) is ours.
        heads: "own" lets every KV head choose; "shared" is one choice for the layer, by the mean of the heads' scores,
            as shared block tables need; "summed" takes the bits from that mean too, one per token and not per head.

    Raises:
        ValueError: an argument out of its range, tokens that are not whole pages, no room beside start and recent, or a
            shared choice over a scorer whose heads keep different numbers of tokens.
    """

    ratio: float = 0.25
    anchor: Anchor = "alternate"
    seed: int = 0
    bit_quantile: float = 0.5
    page: int = 1
    start: int = 0
    recent: int = 0
    heads: Heads = "own"

    wraps: ClassVar = "scorer"
    capabilities: ClassVar[Capabilities] = Capabilities(per_head=True)
    alone: ClassVar[dict] = {}
    """Settings of the snapkv that it wraps when it stands alone."""
    reaches_end: ClassVar[bool] = True
    """Whether the ranks run to the end of the sorted candidates; else they step by whole numbers from the nearest."""

    def __post_init__(self) -> None:
        if self.inner is None:
            object.__setattr__(self, "inner", SnapKV(budget=self.budget, **self.alone))
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: a share of the budget lies in [0, 1]; use 0.25")
        if not 0 < self.bit_quantile < 1:
            raise ValueError(f"bit_quantile={self.bit_quantile}: must lie between 0 and 1; 0.5 is the median")
        for name, known in (("anchor", get_args(Anchor)), ("heads", get_args(Heads))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.page < 1 or min(self.start, self.recent, self.seed) < 0:
            raise ValueError(
                f"page={self.page}, start={self.start}, recent={self.recent}, seed={self.seed}: a page has at least 1 "
                "token and none of the others may be negative"
            )
        if self.heads != "own" and self.inner.capabilities.per_head:
            raise ValueError(
                f"heads={self.heads!r}: {self.inner.name} gives every head its own number of tokens; use heads='own'"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        tokens = self.budget.tokens
        for name, size in (("start", self.start), ("recent", self.recent), ("budget", tokens or 0)):
            if size % self.page:
                near = -(-size // self.page) * self.page
                raise ValueError(f"{name}={size} tokens are not whole pages of {self.page}; use {near}")
        if tokens is not None and self.start + self.recent >= tokens:
            raise ValueError(
                f"budget={self.budget}: start={self.start} and recent={self.recent} leave no token to choose; use "
                f"{self.start + self.recent + self.page}t or more"
            )

    def needs(self) -> Needs:
        """What the scorer needs."""
        return self.inner.needs()

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The scorer's scores, fp32 [batch, kv_heads, n]."""
        return self.inner.score(layer, held, evidence, keep)

    def scores(self, layer: Layer, evidence: Evidence, keep: list[int] | None = None) -> torch.Tensor:
        """The scorer's over the whole layer."""
        return self.inner.scores(layer, evidence, keep)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Keep the scorer's best and the representatives, together as many as the scorer would."""
        self.learn(layer, evidence)
        if self.inner.fits(layer, evidence):
            return
        scores = self.scores(layer, evidence)
        refined = self.refine(layer, scores, self.inner.counts(layer, scores, evidence))
        keep_best(layer, *refined)

    def refine(self, layer: Layer, scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and counts under which `keep_best` keeps the important tokens and the representatives.

        Args:
            scores: fp32 [batch, kv_heads, n of layer.stored()], the scorer's.
            counts: int64 [batch, 1 or kv_heads] on the CPU, how many tokens may be kept.
        """
        if self.ratio == 0 or bool(scores.isnan().any()):  # `keep_best` tells of NaN
            return scores, counts
        positions = layer.stored().positions
        votes, scores = scores, scores if self.heads == "own" else _mean(layer, scores, positions)
        # Signatures belong to tokens, not to slots: after an eviction one slot holds different tokens in each head.
        table = _PageTable(positions, -(-int(layer.real_seen.max()) // self.page), self.page)
        full, loose = self._pages(layer, scores, table)
        # Tokens outside full pages stay in any case and are paid for first.
        room = (counts.to(scores.device) - loose.sum((-1, -2))) // self.page
        votes = table.spread(scores if self.heads == "summed" else votes, NEVER)
        distance = self._distance(votes, full, layer.index)
        worth = table.spread(scores, NEVER).masked_fill(~full[..., None], 0).sum(-1)
        kept = table.gather(loose | self._chosen(full, worth, distance, room)[..., None])
        fits = room > 0
        wanted = torch.zeros_like(scores).masked_fill(kept, PROTECTED).masked_fill(~kept, NEVER)
        return (
            torch.where(fits[..., None], wanted, scores),
            torch.where(fits, kept.sum(-1), counts.to(scores.device)).cpu(),
        )

    def _pages(self, layer: Layer, scores: torch.Tensor, table: _PageTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages that may go, bool [batch, kv_heads, pages], and stored tokens that stay for being in no such page."""
        positions = table.positions
        latest = layer.real_seen.to(positions.device)[:, None, None] - self.recent
        held = scores.eq(PROTECTED) | (positions < self.start) | (positions >= latest)
        full = table.spread(~held, False).all(-1)
        return full, table.spread(positions >= 0, False) & ~full[..., None]

    def _chosen(
        self, full: torch.Tensor, worth: torch.Tensor, distance: torch.Tensor, room: torch.Tensor
    ) -> torch.Tensor:
        """Important pages and representatives: bool [batch, kv_heads, pages].

        Args:
            full, worth: [batch, kv_heads, pages], which pages may go and the sum of their scores.
            distance: int64 [batch, pages] of their signatures to the anchor.
            room: int64 [batch, kv_heads], pages that may stay.
        """
        # The tiny addend undoes binary rounding: 0.29 * 100 is 28.999999999999996, and 29 was asked for.
        wanted = (self.ratio * room.double() + 1e-9).long().clamp(min=0)
        # Representatives come out of the budget, and out of this head's own candidates: no page is kept twice.
        important = full & (_ranks(worth, full) < (room - wanted)[..., None])
        crowd = full & ~important
        # One distance for all heads, since a signature is the vote of all; candidates are each head's own.
        nearest = _ranks(-distance[:, None].expand_as(full), crowd)
        return important | (crowd & spaced(nearest, crowd.sum(-1)[..., None], wanted[..., None], self.reaches_end))

    def _distance(self, votes: torch.Tensor, full: torch.Tensor, index: int) -> torch.Tensor:
        """Hamming distance of each page's signature to the anchor, int64 [batch, pages]; votes [.., pages, page]."""
        region = full[..., None].expand_as(votes).flatten(-2)
        above = ((1 - self.bit_quantile) * region.sum(-1).double() + 1e-9).long()
        # By rank and not by value: equal scores must not make more ones than the quantile says.
        bits = region & (_ranks(votes.flatten(-2), region) < above[..., None])
        bits = bits.unflatten(-1, votes.shape[-2:])
        if self.heads == "summed":
            bits = bits[:, :1]
        return (bits != self._anchor(bits, full, index)[:, :, None]).sum((1, 3))

    def _anchor(self, bits: torch.Tensor, full: torch.Tensor, index: int) -> torch.Tensor:
        """The anchor's bits [1 or batch, heads, page]; in a signature the heads of one token stand together."""
        heads, page = bits.shape[1], self.page
        if self.anchor.endswith("mean"):
            half = 2 * bits.sum(2) > full.any(1).sum(-1)[:, None, None]
            return half if self.anchor == "mean" else ~half
        order = torch.arange(heads * page)
        if self.anchor == "random":
            flat = torch.randint(2, order.shape, generator=torch.Generator().manual_seed(self.seed + index)).bool()
        else:
            flat = {"zeros": order < 0, "ones": order >= 0, "alternate": order % 2 == 1}[self.anchor]
        return flat.view(1, page, heads).mT.to(bits.device)


@register("kvcrush-official")
@dataclass(frozen=True)
class KVCrushOfficial(KVCrush):
    """KVCrush as OpenVINO runs it: blocks of 32 of the layer's summed scores, a random anchor, whole-numbered steps.

    First, last and partly filled blocks take 160 to 191 tokens: where a budget leaves no block of 32 beside them, the
    scorer's choice stands. The budget counts the representatives too; OpenVINO's 960 tokens + 2 blocks is "1024t" and
    ratio=0.0741 (of the 27 blocks beside start and recent) here. Its own random anchors depend on how many layers and
    steps came before.
    """

    anchor: Anchor = "random"
    page: int = 32
    start: int = 32
    recent: int = 128
    heads: Heads = "summed"

    alone: ClassVar[dict] = {"window": 8, "pooling": "max"}
    reaches_end: ClassVar[bool] = False


class _PageTable:
    """Slots of `positions` int32 [batch, kv_heads, n] (-1 = hole) <-> logical positions, page by page."""

    def __init__(self, positions: torch.Tensor, pages: int, page: int) -> None:
        self.positions, self.pages, self.page = positions, pages, page
        self._at = positions.long().masked_fill(positions < 0, pages * page)  # holes go to a column that is cut off

    def spread(self, x: torch.Tensor, empty: float | bool) -> torch.Tensor:
        """Per slot [batch, kv_heads, n] -> [batch, kv_heads, pages, page], `empty` where nothing is stored."""
        table = x.new_full((*x.shape[:2], self.pages * self.page + 1), empty)
        return table.scatter(-1, self._at, x)[..., :-1].unflatten(-1, (self.pages, self.page))

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """bool [batch, kv_heads, pages, page] -> [batch, kv_heads, n], False at holes."""
        return F.pad(table.flatten(-2), (0, 1)).gather(-1, self._at)


def _mean(layer: Layer, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The heads' mean in every head.

    Raises:
        ValueError: the heads store different tokens.
    """
    if bool((positions != positions[:, :1]).any()):
        raise ValueError(f"layer {layer.index}: its heads store different tokens and can share none; use heads='own'")
    return scores.mean(1, keepdim=True).expand_as(scores)


def _ranks(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Each entry's place along the last axis, largest first, ties to the lower index; `among` come before the rest."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, (~among.gather(-1, order)).sort(dim=-1, stable=True).indices)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return order.scatter(-1, order, place)


def spaced(rank: torch.Tensor, crowd: torch.Tensor, wanted: torch.Tensor, reaches_end: bool = True) -> torch.Tensor:
    """Whether a rank (int64, 0-based) is one of `wanted` equally spaced ones of `crowd`; the shapes broadcast.

    With the end, rank k is floor(k (crowd - 1) / (wanted - 1)); without it, k floor(crowd / wanted).
    """
    if reaches_end:
        last, steps = (crowd - 1).clamp(min=1), (wanted - 1).clamp(min=0)
        k = (rank * steps + last - 1) // last
        hit = k * last // steps.clamp(min=1) == rank
    else:
        step = (crowd // wanted.clamp(min=1)).clamp(min=1)
        hit = (rank % step == 0) & (rank // step < wanted)
    return (wanted > 0) & ((crowd <= wanted) | hit)
