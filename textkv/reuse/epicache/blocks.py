"""Block prefill under a hard budget (stage 2 of EpiCache, arXiv 2509.17396): a long text is read block by block, and
after each block only the entries stay that a probe looks at.

The probe is a short prompt that is read behind the block and taken back again; its queries score every cached token
(Eq. 3). So at no moment a layer holds more than its budget, a block and the probe, however long the text is. Keys stay
at their original positions; the next token's position counts all that was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from textkv.cache import MethodCache
from textkv.eviction import NEVER, PROTECTED, keep_best
from textkv.evidence import Evidence, Needs
from textkv.kinds import describe
from textkv.layer import Layer
from textkv.method import Method
from textkv.segments.base import Stored
from textkv.softmax import Softmax

Level = Literal["pair", "uniform"]
_NOTE = "probe"
_QUERIES = 32  # of the probe scored together: its whole logits would weigh more than the cache


@dataclass(frozen=True)
class Observed(Method):
    """Keeps everything, and notes how the last `window` queries of each block score what is stored. What then stays is
    decided by `BlockPrefill`, when the probe is gone.

    Attributes:
        window: tokens of the probe.
    """

    window: int = 1

    name: ClassVar[str] = "textkv.reuse.epicache.blocks:Observed"
    """By which a saved cache finds it again: it is no method to be chosen from a list."""

    def needs(self) -> Needs:
        """The queries of the probe."""
        return Needs(window=self.window)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Notes scores fp32 [1, kv_heads, n] of what is stored; the probe's own tokens have none."""
        held = layer.stored()
        probe = held.positions >= int(evidence.tokens[0]) - self.window
        held = Stored(held.keys, held.values, held.positions.masked_fill(probe, -1))
        layer.notes[_NOTE] = probe_scores(evidence.queries, held, evidence.softmax)


def probe_scores(queries: torch.Tensor, held: Stored, softmax: Softmax) -> torch.Tensor:
    """The most attention that any query of a KV head's group pays to each stored token: fp32 [batch, kv_heads, n],
    NEVER at holes. The softmax runs over what is stored alone.

    Args:
        queries: [batch, heads, w, head_dim], post-RoPE.
        held: keys [batch, kv_heads, n, head_dim]; position -1 = not to be scored.
    """
    heads = held.keys.shape[1]
    grouped = queries.unflatten(1, (heads, -1)).float()  # [batch, kv_heads, group, w, head_dim]
    keys, hole = held.keys.float(), (held.positions < 0)[:, :, None, None]
    best = torch.full(held.positions.shape, NEVER, device=keys.device)
    for part in grouped.split(_QUERIES, 3):
        scores = softmax.scores(torch.einsum("bhgwd,bhnd->bhgwn", part, keys)).masked_fill(hole, NEVER)
        best = torch.maximum(best, softmax.weights(scores).amax((2, 3)))
    return best.masked_fill(held.positions < 0, NEVER)


class BlockPrefill:
    """Reads texts of any length into a cache of bounded size.

    Args:
        model: a text decoder; one row at a time.
        entries: for each layer that a method would govern, how many tokens a KV head keeps on average.
        block: tokens read at a time.
        protected: first tokens of the text that always stay, e.g. the system prompt.
        level: "pair" lets the heads of a layer compete for its entries, "uniform" gives each the same.

    Raises:
        ValueError: a number below 1, a layer that keeps less than is protected, another number of layers, or a model
            that cannot take a probe back.
    """

    def __init__(
        self, model: PreTrainedModel, entries: Sequence[int], block: int, protected: int = 4, level: Level = "pair"
    ) -> None:
        if block < 1 or protected < 0 or level not in ("pair", "uniform"):
            raise ValueError(
                f"block={block}, protected={protected}, level={level!r}: a block has at least 1 token, no fewer than 0 "
                "are protected, and level is 'pair' or 'uniform'"
            )
        if min(entries, default=0) <= protected:
            raise ValueError(
                f"a layer keeps {min(entries, default=0)} tokens and {protected} are protected: raise the budget, or "
                "protect fewer"
            )
        moving = next((kind for kind in describe(model) if kind.name not in ("full", "shared", "none")), None)
        if moving is not None:
            raise ValueError(
                f"{type(model).__name__}: layer {moving.number} is of kind {moving.name} and cannot take the probe "
                "back that follows every block; use a model whose layers all have full attention, or a method by itself"
            )
        layers = MethodCache(model, Observed()).context.governed
        if layers != len(entries):
            raise ValueError(f"entries for {len(entries)} layers were given, the model has {layers}")
        self.model, self.entries, self.block = model, tuple(entries), block
        self.protected, self.level = protected, level

    def open(self, probe: Sequence[int]) -> MethodCache:
        """An empty cache for texts that will be compressed by this probe.

        Raises:
            ValueError: a probe of no token, or one that is longer than a block.
        """
        if not 0 < len(probe) <= self.block:
            raise ValueError(f"a probe of {len(probe)} tokens: give 1 to {self.block}, the tokens of a block")
        return MethodCache(self.model, Observed(window=len(probe)))

    @torch.inference_mode()
    def read(self, cache: MethodCache, ids: Sequence[int], probe: Sequence[int]) -> None:
        """Reads `ids` behind what the cache holds, block by block, and leaves it within its budget."""
        for first in range(0, len(ids), self.block):
            part = list(ids[first : first + self.block])
            before = cache.tokens_seen
            if self._fits(cache, len(part), 0):
                self.append(cache, part)
                continue
            cache.freeze(False)
            cache.begin(tokens=before + len(part) + len(probe))
            # The probe sees the block as if it had come by itself: causality needs no second forward.
            self._feed(cache, [*part, *probe])
            cache.crop(-len(probe))
            for layer, entries in zip(cache.context.layers, self.entries, strict=True):
                self._shrink(layer, entries)
            cache.begin(tokens=0)
        cache.freeze()

    def _feed(self, cache: MethodCache, ids: Sequence[int]) -> None:
        given = torch.tensor([list(ids)], device=self.model.device)
        self.model(given, past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def append(self, cache: MethodCache, ids: Sequence[int]) -> None:
        """Reads `ids` behind what the cache holds, and drops nothing."""
        cache.freeze()
        self._feed(cache, ids)

    def has_room(self, cache: MethodCache, tokens: int) -> bool:
        """Whether no layer holds more than its budget and a block when so many tokens are appended."""
        return self._fits(cache, tokens, self.block)

    def _fits(self, cache: MethodCache, more: int, beyond: int) -> bool:
        heads = cache.context.config.num_key_value_heads
        held = [int(layer.lengths().sum()) if layer.is_initialized else 0 for layer in cache.context.layers]
        return all(n + more * heads <= (most + beyond) * heads for n, most in zip(held, self.entries, strict=True))

    def _shrink(self, layer: Layer, entries: int) -> None:
        positions = layer.held_positions()
        scores = layer.notes.pop(_NOTE)[..., : positions.shape[-1]].masked_fill(positions < 0, NEVER)
        guarded = (positions >= 0) & (positions < self.protected)
        keep_best(layer, scores.masked_fill(guarded, PROTECTED), self._counts(scores, guarded, entries))

    def _counts(self, scores: torch.Tensor, guarded: torch.Tensor, entries: int) -> torch.Tensor:
        """Tokens that each head keeps, int64 [1, 1 or kv_heads]: their sum is never above entries * kv_heads."""
        if self.level == "uniform":
            return torch.tensor([[entries]])
        heads = scores.shape[1]
        ranked = scores.masked_fill(guarded, PROTECTED)[0]
        most = min(entries * heads, int((ranked > NEVER).sum()))
        # Equal scores go to the lower head and the older token, on every device.
        winners = ranked.flatten().sort(descending=True, stable=True).indices[:most]
        return torch.bincount(winners // scores.shape[2], minlength=heads).cpu()[None]
