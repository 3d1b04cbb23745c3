"""LaCache: a ladder over the layers; every layer keeps other tokens, so together they reach further back (2507.14204).

Cached tokens are cut into blocks and every layer keeps the same number of each block, at its own offset. When the cache
is full, only as many blocks as needed are compacted, oldest first; when none is left, a further pass compacts what
earlier passes kept. So a stream runs on in constant memory and old tokens thin out layer by layer. No attention scores.
Keys sit at cache positions, as in StreamingLLM (`segments.renumbered`); `positions="original"` leaves them.

The paper draws a ladder that rises with depth ("staircase"), the authors' code cycles the offset with the layer's
number ("interleaved"). Their code also lets the cache grow past its size by half of what a block frees, so that the
MEAN length meets the size, and squeezes the further passes of a long prompt into one with wider blocks; where that
stores a token twice or runs past the prompt, `lacache-official` refuses. `lacache` never exceeds its budget and loops.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.segments.renumbered import RenumberedSegment

Layout = Literal["staircase", "interleaved"]


@dataclass(frozen=True)
class Ladder:
    """The arithmetic of one ladder: what each layer keeps of `block` neighbouring tokens.

    Attributes:
        layers: layers of the model, L.
        span: neighbouring layers that a token lives in, S.
        overlap: layers that two neighbouring tokens share, O; their ladders start S - O layers apart.
        layout: "staircase" (early tokens in early layers) or "interleaved" (the offset cycles with the layer).

    Raises:
        ValueError: a ladder that frees nothing; the message says what must hold.
    """

    layers: int
    span: int
    overlap: int = 0
    layout: Layout = "staircase"

    def __post_init__(self) -> None:
        if not 1 <= self.span < self.layers:
            raise ValueError(
                f"span={self.span}: a ladder needs 1 <= span < layers, and the model has {self.layers} layers"
            )
        if not 0 <= self.overlap < self.span:
            raise ValueError(f"overlap={self.overlap}: a ladder needs 0 <= overlap < span, and span is {self.span}")
        if self.freed < 1:
            raise ValueError(
                f"span={self.span}, overlap={self.overlap}: each of {self.layers} layers would keep all {self.block} "
                "tokens of a block; a ladder needs ceil(span / (span - overlap)) <= "
                "ceil((layers - span) / (span - overlap)): use a smaller span or overlap"
            )

    @property
    def block(self) -> int:
        """Tokens of a block before compaction."""
        return 1 + _ceil(self.layers - self.span, self.span - self.overlap)

    @property
    def kept(self) -> int:
        """Tokens of a block that every layer keeps."""
        return min(_ceil(self.span, self.span - self.overlap), self.block)

    @property
    def freed(self) -> int:
        """Tokens of a block that every layer drops."""
        return self.block - self.kept

    def offset(self, layer: int, freed: int) -> int:
        """Where in a block, 0 to `freed`, the run begins that a layer keeps."""
        if self.layout == "interleaved":
            return layer % (freed + 1)
        return 0 if layer < self.span else min(freed, (layer - self.span) // (self.span - self.overlap) + 1)

    def compact(
        self, stored: int, limit: int, cursor: int, *, layer: int, sinks: int, recent: int
    ) -> tuple[torch.Tensor, int]:
        """Which of `stored` slots a layer keeps so that at most `limit` are left.

        Args:
            cursor: slots before it are compacted already in this pass; a pass starts at `sinks`.
            recent: about this many newest slots stay out of the ladder (at least recent - freed + 1 of them).

        Returns:
            The kept slots, int64, ascending, on the CPU; and the cursor after the last block compacted.
        """
        # A loop, so that a long prompt is compacted as often as it needs; the authors' code takes one wider pass.
        slots, width, stride = torch.arange(stored), self.block, 1
        while len(slots) > limit:
            room = (limit - cursor - recent) // self.kept
            if room <= 0:
                width, stride = self.wider(len(slots), limit, sinks, (limit - sinks - recent) // self.kept)
                # A further pass: what this one has compacted is old text again, and thins out once more.
                cursor = sinks
                continue
            # Oldest first, and no more blocks than needed: newer text stays whole in every layer.
            blocks = min(_ceil(len(slots) - limit, width - self.kept), room)
            first = cursor + self.offset(layer, width - self.kept) + width * torch.arange(blocks)
            taken = (first[:, None] + stride * torch.arange(self.kept)).flatten()
            slots = torch.cat([slots[:cursor], slots[taken], slots[cursor + width * blocks :]])
            cursor += blocks * self.kept
        return slots, cursor

    def wider(self, stored: int, limit: int, sinks: int, room: int) -> tuple[int, int]:
        """Block width, and distance of its kept tokens, for a further pass over `stored` slots with `room` blocks."""
        return self.block, 1


@dataclass(frozen=True)
class OfficialLadder(Ladder):
    """The ladder of the authors' code: one wider pass stands for all further ones."""

    def wider(self, stored: int, limit: int, sinks: int, room: int) -> tuple[int, int]:
        """Blocks `times` as wide, for as many further passes as one may stand for.

        Raises:
            ValueError: such blocks would store a token twice, or end behind the newest one.
        """
        # The authors' arithmetic: passes that would follow each other, and one block wide enough for them all.
        times = _ceil(stored - limit, room * self.freed)
        width = times * (self.block - 1) + 1
        end = sinks + width * _ceil(stored - limit, width - self.kept)
        # Their kept tokens lie `times` apart, and the last layer's last one must still lie within the block.
        reach = min(self.layers - 1, width - self.kept) + times * (self.kept - 1)
        if reach >= width or end >= stored:
            raise ValueError(
                f"{stored - limit} tokens over the budget need {times} further passes, and the authors' blocks of "
                f"{width} tokens then need a last kept token (here {reach}) below the width, so that none is stored "
                f"twice, and a last block that ends (here at {end}) before the newest of {stored} tokens; "
                "use a larger budget, or lacache(layout='interleaved'), which repeats the pass"
            )
        return width, times


@register("lacache")
@dataclass(frozen=True)
class LaCache(Method):
    """A ladder-shaped cache, compacted again whenever it is full; the budget is the most that any layer holds.

    A budget in tokens holds for the whole stream. A share is taken of the first prompt and then stays that number; of
    a very short prompt it is raised to the sinks and one block, the least that a ladder can work with.

    Attributes:
        span: neighbouring layers that keep a token; None = half of the layers, rounded up (16 of 32 in the paper). The
            paper advises layers x kept share for understanding, a quarter of the layers for language modelling.
        overlap: layers that two neighbouring tokens share. Paper: 0 where the answer is local, span / 2 else.
        sinks: first tokens of each row that stay in every layer. Paper: 4 for language modelling, up to 128.
        recent: newest tokens that stay out of the ladder; None = as many as the model has layers (the authors' code).
            Where the budget is too small for that, it is what sinks and one block leave.
        layout: see `Ladder`.
        positions: "cache" (the paper) or "original".
    """

    heads_apart = True

    span: int | None = None
    overlap: int = 0
    sinks: int = 4
    recent: int | None = None
    layout: Layout = "staircase"
    positions: Literal["cache", "original"] = "cache"

    capabilities: ClassVar[Capabilities] = Capabilities(decode_eviction=True, original_positions=False, crop=False)
    ladder_type: ClassVar[type[Ladder]] = Ladder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: cannot be negative; 0 protects no first tokens")
        if self.layout not in ("staircase", "interleaved"):
            raise ValueError(f"layout={self.layout!r}: use 'staircase' or 'interleaved'")
        if self.positions not in ("cache", "original"):
            raise ValueError(f"positions={self.positions!r}: use 'cache' or 'original'")
        if self.positions == "original":
            object.__setattr__(self, "capabilities", replace(self.capabilities, original_positions=True))

    def needs(self) -> Needs:
        """Rotary positions, where keys move to cache positions."""
        return Needs(rope=self.positions == "cache")

    def on_build(self, context: Context) -> None:
        """Check ladder and budget against the model, and say where a budget is longer than its positions.

        Raises:
            ValueError: the ladder does not fit the layers, or a budget in tokens does not hold it.
        """
        super().on_build(context)
        if self.budget.is_full or not context.governed:
            return
        ladder = self.ladder(context.governed)
        if self.budget.tokens is not None:
            self.size(ladder, self.budget.tokens)
            known = getattr(context.config, "max_position_embeddings", None)
            if known and self.budget.tokens > known:
                self.beyond(known)

    def on_start(self, layer: Layer) -> None:
        """Let keys sit at cache positions."""
        if not self.budget.is_full:
            layer.segments = [RenumberedSegment(layer.rotary)]

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Fix the size of each row by the first prompt, then compact what exceeds it."""
        segment = layer.segments[0]
        if not isinstance(segment, RenumberedSegment):
            return
        ladder = self.ladder(layer.context.governed)
        # Once: a share is taken of the first prompt, so that later turns do not let the cache grow.
        if not segment.row_state:
            tokens = [self.budget.tokens or self.budget.count(seen) for seen in evidence.tokens.tolist()]
            segment.row_state = [[self.size(ladder, count), self.sinks] for count in tokens]
        self._compact(layer, segment, ladder)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Compact the rows that the token has filled."""
        segment = layer.segments[0]
        if isinstance(segment, RenumberedSegment):
            self._compact(layer, segment, self.ladder(layer.context.governed))

    def ladder(self, layers: int) -> Ladder:
        """The ladder over a model's layers.

        Raises:
            ValueError: span, overlap or recent do not fit that many layers.
        """
        span = _ceil(layers, 2) if self.span is None else self.span
        ladder = self.ladder_type(layers, span, self.overlap, self.layout)
        if self.recent is not None and self.recent < ladder.freed:
            raise ValueError(
                f"recent={self.recent}: with {layers} layers each block frees {ladder.freed} tokens, and at least as "
                "many of the newest must stay out of the ladder"
            )
        return ladder

    def size(self, ladder: Ladder, tokens: int) -> int:
        """The cache size of a row whose budget comes to `tokens`.

        Raises:
            ValueError: a budget in tokens that does not hold the sinks and one block.
        """
        least = self.sinks + ladder.block
        if self.budget.tokens is not None and tokens < least:
            raise ValueError(
                f"budget={self.budget}: {self.sinks} sinks and one ladder block of {ladder.block} tokens need "
                f"{least}t or more"
            )
        return max(tokens, least)

    def limit(self, ladder: Ladder, size: int) -> int:
        """The length above which a cache of this size is compacted."""
        return size

    def beyond(self, known: int) -> None:
        """Called for a budget in tokens above the `known` positions of the model."""
        warnings.warn(f"budget={self.budget} is longer than the {known} positions the model knows", stacklevel=2)

    def _compact(self, layer: Layer, segment: RenumberedSegment, ladder: Ladder) -> None:
        lengths = layer.lengths()[:, 0].tolist()
        limits = [self.limit(ladder, size) for size, _ in segment.row_state]
        if all(n <= limit for n, limit in zip(lengths, limits, strict=True)):
            return
        rows = []
        for n, limit, state in zip(lengths, limits, segment.row_state, strict=True):
            size, cursor = state
            # The authors keep about one newest token per layer; a small budget must still hold one block.
            reserve = min(ladder.layers if self.recent is None else self.recent, size - self.sinks - ladder.kept)
            slots, state[1] = ladder.compact(n, limit, cursor, layer=layer.index, sinks=self.sinks, recent=reserve)
            rows.append(slots)
        index = pad_sequence(rows, batch_first=True, padding_value=-1).to(layer.device)
        if segment.holes:
            # The ladder counts a row's real tokens; here they become slots.
            order = (layer.stored().positions[:, 0] < 0).sort(dim=1, stable=True).indices
            index = order.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        layer.keep(index[:, None])


@register("lacache-official")
@dataclass(frozen=True)
class LaCacheOfficial(LaCache):
    """LaCache as released: interleaved, the mean length meets the budget, settings that would crash are refused."""

    layout: Layout = "interleaved"

    ladder_type: ClassVar[type[Ladder]] = OfficialLadder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout != "interleaved" or self.recent is not None:
            raise ValueError(
                f"layout={self.layout!r}, recent={self.recent}: the authors' code is interleaved and keeps one newest "
                "token per layer of the model; use lacache to choose"
            )

    def size(self, ladder: Ladder, tokens: int) -> int:
        """The budget as it is; the authors' code knows no smaller size to fall back to.

        Raises:
            ValueError: a budget that the authors' arithmetic cannot hold.
        """
        # Below it their code divides by zero or indexes beyond the cache.
        least = self.sinks + ladder.layers + ladder.kept
        if tokens < least:
            raise ValueError(
                f"budget={self.budget} is {tokens} tokens, but the authors' arithmetic needs budget - sinks - layers "
                f">= {ladder.kept}, the tokens kept of a block, and {tokens} - {self.sinks} - {ladder.layers} = "
                f"{tokens - self.sinks - ladder.layers}: use {least}t or more, fewer sinks, or lacache"
            )
        return tokens

    def limit(self, ladder: Ladder, size: int) -> int:
        """Half of what a block frees above the size."""
        # The cache swings between limit - freed and limit: this puts the middle at the size.
        return size + ladder.freed // 2

    def beyond(self, known: int) -> None:
        """Raises ValueError: the authors' rotary table ends there."""
        raise ValueError(
            f"budget={self.budget}: the authors' rotary table has {known} positions, so budget <= {known}t; "
            "use lacache to go beyond"
        )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
