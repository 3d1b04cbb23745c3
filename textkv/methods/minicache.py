"""MiniCache: neighbouring layers share one direction per token (arXiv 2405.14366).

From the middle of the model on, layers go in pairs. Key and value of a token point much the same way in both layers of
a pair, so one direction (on the arc between theirs) is stored with two lengths; tokens whose layers point apart keep
both vectors. `minicache(4)` packs the directions too. Behind a scorer ("snapkv+minicache(4)") the scores of a pair are
summed, because both layers must keep the same tokens; as behind every wrapper, decoded tokens are all kept.

No code was released. Mended in our reading: the printed rule keeps the most similar tokens exactly instead of the least
similar (`textkv.slerp`); initial tokens do not count in its range; a decoded token alone has no range, so the newest
tokens stay exact and are merged in blocks, against the range of all tokens before them. The paper's ratio of 1.53 does
not follow from merging half of the layers (4 : 3.1 at best); what is held is in `cache.report()`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from textkv.contents import OF_HEAD
from textkv.context import Context
from textkv.eviction import PROTECTED, Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.kernels.pack import Bits, check_block
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.segments.dense import DenseSegment
from textkv.segments.paired import Merging, Pair, PairedSegment
from textkv.slerp import Retention, Rule

NAME = "minicache"
LIKENESS = OF_HEAD + "minicache.likeness"
_ALIKE = 0.8  # mean cosine from which the specification calls layers fit to be merged


@register("minicache")
@dataclass(frozen=True)
class MiniCache(Method):
    """Merges pairs of layers at the end of each prompt block and, while decoding, whenever `block` tokens wait.

    Alone it drops nothing and ignores the budget; behind a scorer the budget is the scorer's.

    Attributes:
        bits: of the stored directions: 2, 4, 8, "fp8" (8-bit floats), or 16 = unpacked.
        t: place on the arc from the earlier layer's direction (0) to the later's (1); 0.6 in the paper.
        gamma: how much stays exact, see `retention`; 0.05 in the paper. 0 = nothing, 1 = everything.
        retention: "range" (the paper) keeps the tokens whose distance lies in the uppermost `gamma` of the range of
            distances, however many they are; "topk" keeps the share `gamma` of the tokens.
        sinks: this many first tokens stay exact always.
        window: at least this many newest tokens are exact in both layers.
        block: tokens that wait beyond the window until they are merged together.
        start: first layer of the first pair; None = the middle, as in the paper.
        alike: a pair merges only the rows of the batch in which its layers' keys, and its values, have at least this
            mean cosine at the first merge, sinks left out; in others both layers keep all they have, for good. 0.8
            spares models whose layers point apart. None = all pairs merge, as in the paper, and a warning names those
            below 0.8 at a prompt's end.
        group: tokens of a packed group; prompts are packed in whole groups, the rest waits with the window.

    Raises:
        ValueError: an argument out of its range, or a scorer whose heads keep different numbers of tokens.
    """

    bits: Bits | Literal[16] = 16
    t: float = 0.6
    gamma: float = 0.05
    retention: Rule = "range"
    sinks: int = 4
    window: int = 32
    block: int = 32
    start: int | None = None
    group: int = 32
    alike: float | None = None

    wraps: ClassVar = "scorer"
    capabilities: ClassVar[Capabilities] = Capabilities(lossy=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        Retention(self.retention, self.gamma)
        if not 0 <= self.t <= 1:
            raise ValueError(f"t={self.t}: a place between two layers lies in [0, 1]; 0.6 as in the paper")
        if self.sinks < 0 or min(self.window, self.block) < 1 or (self.start is not None and self.start < 0):
            raise ValueError(
                f"sinks={self.sinks}, window={self.window}, block={self.block}, start={self.start}: window and block "
                "need at least 1 token, sinks and start may not be negative"
            )
        if self.alike is not None and not -1 <= self.alike <= 1:
            raise ValueError(f"alike={self.alike}: a mean cosine lies in [-1, 1]; use e.g. 0.8")
        if self.bits != 16:
            check_block(self.bits, self.group, self.group)
            if self.block % self.group:
                near = -(-self.block // self.group) * self.group
                raise ValueError(f"block={self.block} is not a multiple of group={self.group}; use {near}")
        if self.inner is not None and self.inner.capabilities.per_head:
            raise ValueError(
                f"{self.inner.name}+{self.name}: {self.inner.name} gives every head its own number of tokens and a "
                "pair of layers stores the same number in all; put the scorer itself before it, e.g. snapkv+minicache"
            )

    @property
    def merging(self) -> Merging:
        """How its pairs merge."""
        return Merging(self.t, Retention(self.retention, self.gamma), self.sinks, self.bits, self.group)

    @property
    def looks_across(self) -> bool:
        """Yes: layers merge in pairs."""
        return True

    @property
    def evicts(self) -> bool:
        """Only behind a scorer."""
        return self.inner is not None

    def needs(self) -> Needs:
        """What the scorer needs."""
        return self.inner.needs() if self.inner else Needs()

    def partner(self, index: int, layers: int) -> int | None:
        """The layer that layer `index` of a model of `layers` layers is paired with, or None."""
        # In a model of two layers the middle would leave no pair.
        start = max(0, min(layers // 2, layers - 2)) if self.start is None else self.start
        # Pairs are counted from `start`, which may be odd.
        other = index ^ 1 if start % 2 == 0 else ((index - 1) ^ 1) + 1
        return other if index >= start and other < layers else None

    # ---- when a layer starts -----------------------------------------------------------------------------------

    def on_build(self, context: Context) -> None:
        """Check that the model has layers for a pair, alike as far as its configuration tells; one with none to govern
        needs none.

        Raises:
            ValueError: no pair fits into the model, or the two layers of a pair differ.
        """
        super().on_build(context)
        layers = context.governed
        if layers and (self.start or 0) > layers - 2:
            told = f"start={self.start}: " if self.start is not None else ""
            raise ValueError(
                f"{told}minicache governs {layers} layers of this model and a pair needs two of them, from `start` on"
            )
        for layer in context.layers:
            self._check_pair(layer)

    def on_start(self, layer: Layer) -> None:
        """Check that the layer has a partner like itself.

        Raises:
            ValueError: the two layers of a pair differ.
        """
        self._check_pair(layer)

    def _check_pair(self, layer: Layer) -> None:
        """Raise ValueError where a layer differs from the one before it with which it is paired."""
        other = self.partner(layer.index, layer.context.governed)
        if other is not None and other < layer.index:
            first, second = _traits(layer.context.layers[other]), _traits(layer)
            for name in first:
                if first[name] != second[name]:
                    raise ValueError(
                        f"layers {other} and {layer.index} cannot be a pair: {name} {first[name]} and {second[name]}; "
                        "choose another `start`"
                    )

    # ---- at a prompt's end -------------------------------------------------------------------------------------

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Evict if there is a scorer: a pair waits for its second layer. Then merge what lies before the window."""
        wanted = self._wanted(layer, evidence)
        other = self.partner(layer.index, layer.context.governed)
        if other is None:
            if wanted is not None:
                keep_best(layer, *wanted, rectangle=True)
        elif other > layer.index:
            layer.notes[NAME] = wanted
        else:
            first = self._before(layer, other)
            self._cut(first, layer, first.notes.pop(NAME, None), wanted)
            self._merge(first, layer, waiting=0)

    def _wanted(self, layer: Layer, evidence: Evidence) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The scorer's scores and how many tokens it wants to keep; None if nothing has to go."""
        scorer = self.inner
        if not isinstance(scorer, Eviction):
            return None
        scorer.learn(layer, evidence)
        if scorer.fits(layer, evidence):
            return None
        scores = scorer.scores(layer, evidence)
        return scores, scorer.counts(layer, scores, evidence)

    def _cut(self, first: Layer, second: Layer, of_first: tuple | None, of_second: tuple | None) -> None:
        """Keeps the same tokens in both layers: the best of the summed scores, as many as both want on average."""
        if of_first is None or of_second is None:
            return
        guarded = (of_first[0] == PROTECTED) | (of_second[0] == PROTECTED)
        # What one layer guards and the other would drop first stays: inf - inf is no score.
        scores = (of_first[0] + of_second[0]).masked_fill(guarded, PROTECTED)
        # The mean: a pair then holds as much as its layers would alone.
        counts = (of_first[1] + of_second[1]) // 2
        for layer in (first, second):
            keep_best(layer, scores, counts, rectangle=True)

    # ---- while decoding ----------------------------------------------------------------------------------------

    def on_decode_begin(self, layer: Layer, query: torch.Tensor) -> None:
        """Check that a pair's first layer has taken the token in already: the second reads what both share."""
        other = self.partner(layer.index, layer.context.governed)
        if other is not None and other < layer.index:
            self._before(layer, other, ahead=query.shape[2])  # this layer counts what comes when it is in

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """When both layers of a pair have taken the token in: merge what waits, if it is enough."""
        other = self.partner(layer.index, layer.context.governed)
        if other is not None and other < layer.index:
            self._merge(layer.context.layers[other], layer, waiting=self.block)

    def _before(self, layer: Layer, other: int, ahead: int = 0) -> Layer:
        """The layer `other`, which must have seen `ahead` tokens more."""
        first = layer.context.layers[other]
        if first.seen != layer.seen + ahead:
            raise ValueError(
                f"layer {layer.index} has seen {layer.seen + ahead} tokens and layer {other}, its pair, {first.seen}: "
                "the layers of a model must run in their order"
            )
        return first

    def _merge(self, first: Layer, second: Layer, waiting: int) -> None:
        """Merges the oldest exact tokens of each row that has at least `waiting` of them before its window."""
        buffers = first.segments[-1], second.segments[-1]
        exact = buffers[0].lengths()[:, 0]
        unit = self.merging.unit
        take = ((exact - self.window).clamp(min=0) // unit * unit).masked_fill(exact < self.window + waiting, 0)
        if second.came is not None:  # a row to which nothing came waits
            take = take.masked_fill(second.came == 0, 0)
        take = self._of_alike(first, second, take, prompt=not waiting)
        if not bool(take.any()):
            return
        old, new = _divided(buffers[0], take)
        paired = isinstance(first.segments[0], PairedSegment)
        pair = first.segments[0].pair if paired else Pair((first.index, second.index), buffers[0].k)
        pair.absorb(buffers, old, self.merging)
        for side, layer in enumerate((first, second)):
            layer.segments[-1].keep(new)
            layer.segments = [PairedSegment(pair, side), layer.segments[-1]]
            # Merged tokens cannot be taken back one by one: only what is still exact may be cropped.
            layer.since_eviction = min(layer.since_eviction, int((exact - take).min()))
            layer.changes += 1
            layer.context.note_bytes(layer)

    def _of_alike(self, first: Layer, second: Layer, take: torch.Tensor, prompt: bool) -> torch.Tensor:
        """`take` int64 [batch], 0 in rows whose two layers point apart; see `alike`."""
        merged = isinstance(first.segments[0], PairedSegment)
        if not bool(take.any()) or (self.alike is None and (merged or not prompt)):
            return take
        known = first.statistics.get(LIKENESS)
        if known is None:
            known = torch.full((len(take), 1, 1), torch.nan, device=first.device)
        fresh = (take > 0).to(known.device)[:, None, None] & known.isnan()
        if bool(fresh.any()):
            known = torch.where(fresh, likeness(first, second, take, self.sinks)[:, None, None], known)
        if self.alike is None:
            low = float(known.nan_to_num(1.0).min())
            if low < _ALIKE:
                warnings.warn(
                    f"minicache merges layers {first.index} and {second.index}, whose mean cosine is {low:.2f} (limit "
                    f"{_ALIKE}): answers will suffer; use alike={_ALIKE}, which keeps such pairs apart",
                    stacklevel=2,
                )
            return take
        # One number per row: it moves, is saved and is counted with its row, and is found only once.
        first.statistics[LIKENESS] = known
        return take.masked_fill((known < self.alike).cpu()[:, 0, 0], 0)


def likeness(first: Layer, second: Layer, take: torch.Tensor, sinks: int) -> torch.Tensor:
    """Mean cosine of two layers' oldest exact tokens, `take` int64 [batch] of each row, in keys or in values, whichever
    is less alike: fp32 [batch], 1 where there is no token but sinks."""
    old, _ = _divided(first.segments[-1], take)
    one, other = (layer.segments[-1].stored() for layer in (first, second))
    slots = old.clamp(min=0).expand(-1, one.keys.shape[1], -1)
    at = one.positions.gather(-1, slots).masked_fill(old < 0, -1)
    counts, pick = at >= sinks, slots[..., None].expand(*slots.shape, one.keys.shape[-1])
    found = []
    for name in ("keys", "values"):
        x, y = (getattr(held, name).gather(2, pick).float() for held in (one, other))
        cosine = torch.cosine_similarity(x, y, dim=-1).masked_fill(~counts, 0).sum((1, 2))
        found.append(cosine / counts.sum((1, 2)).clamp(min=1))
    return torch.minimum(*found).masked_fill(~counts.any(-1).any(-1), 1.0)


def _divided(buffer: DenseSegment, take: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of each row's `take` oldest tokens (int64 [batch]) and of the others: int64 [batch, 1 or kv_heads, c].

    Holes (-1) come last among the old, first among the new: then the newest tokens of all rows share their columns.
    """
    real = buffer.positions[..., : buffer.used] >= 0
    old = real & (real.cumsum(-1) <= take.to(real.device)[:, None, None])
    new = real & ~old
    order = (~old).sort(dim=-1, stable=True).indices[..., : int(take.max())]
    rest = new.sort(dim=-1, stable=True).indices[..., buffer.used - int(new.sum(-1).max()) :]
    return order.masked_fill(~old.gather(-1, order), -1), rest.masked_fill(~new.gather(-1, rest), -1)


def _traits(layer: Layer) -> dict[str, object]:
    """What two layers must have in common for their keys to be comparable."""
    config, number = layer.context.config, layer.kind.number
    rotated = getattr(config, "no_rope_layers", None)
    return {
        "kv_heads": getattr(layer, "kv_heads", None),
        "head_dim": getattr(layer, "head_dim", None),
        "dtype": getattr(layer, "dtype", None),
        "device": getattr(layer, "device", None),
        "attention": layer.kind.name,
        "rotary": rotated[number] if rotated else None,
    }
