"""Evicting in rounds: the cache grows by `interval` decoded tokens over its budget and is then cut back to it.

For scorers whose score costs more than one row of attention, or needs none, cutting once for many tokens is what keeps
them cheap. Bytes follow a sawtooth: a layer rests at budget .. budget + interval - 1 tokens, and one more attends
before a cut. So that 512 slots are never exceeded with interval=128, ask for "384t". The budget itself is kept at the
end of every prompt block. A share is taken of the tokens seen there and stays that number until the next block.

Behind a wrapper ("rkv+adakv") a method only scores, at the end of prompt blocks, as `textkv.decode_eviction` says.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv.contents import OF_HEAD
from textkv.eviction import Eviction, keep_best
from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import Capabilities

BASE = OF_HEAD + "rounds.base"
"""Statistic per row, int64 [batch, 1, 1] on the CPU: what a share of the budget was at the last block's end."""


@dataclass(frozen=True)
class IntervalEviction(Eviction):
    """Base of scorers that cut a layer back to the budget whenever it is `interval` tokens over it.

    Attributes:
        interval: decoded tokens between two cuts.
    """

    interval: int = 128

    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, decode_eviction=True, crop=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: at least 1 token lies between two cuts; the papers use 128")

    def note_base(self, layer: Layer, evidence: Evidence) -> None:
        """Puts down what a share of the budget comes to, for rows to which the block that ends brought tokens."""
        if self.budget.tokens is not None:
            return
        base, known = self._least(evidence)[:, None, None], layer.statistics.get(BASE)
        if known is not None and layer.came is not None:
            base = torch.where(layer.came[:, None, None] > 0, base, known.cpu())
        layer.statistics[BASE] = base

    @abstractmethod
    def recall(self, layer: Layer, query: torch.Tensor) -> Evidence:
        """The evidence by which `score` judges a layer in a round: what was put down about the layer.

        Args:
            query: [batch, heads, 1, head_dim], post-RoPE, of the token stored last.
        """

    def watch(self, layer: Layer, query: torch.Tensor, ahead: int) -> None:
        """Called after every decoded token, before a round: for methods that remember queries.

        Args:
            query: [batch, heads, 1, head_dim], post-RoPE.
            ahead: no row has a round before this many more tokens; 0 or less = some row may have one now.
        """

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Cut to the budget, and put down what a share of it comes to."""
        if self.budget.is_full:
            return
        self.note_base(layer, evidence)
        super().on_prefill_end(layer, evidence)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Have a round where a row has grown enough. In between, the host decides from what it knows by itself."""
        if self.budget.is_full:
            return
        slots = layer.held_positions().shape[-1] if layer.whole is None else layer.whole
        ahead = self._lowest(layer) + self.interval - slots  # no row holds more tokens than there are slots
        self.watch(layer, query, ahead)
        if ahead > 0:
            return
        lengths, limits = layer.lengths().amax(1), self._limits(layer)
        # Each row has its round when it would have had it alone.
        counts = torch.where(lengths >= limits + self.interval, limits, lengths)
        if bool((counts < lengths).any()):
            self.cut(layer, query, counts)

    def cut(self, layer: Layer, query: torch.Tensor, counts: torch.Tensor) -> None:
        """One round: keeps the `counts` best tokens of each row, int64 [batch] on the CPU."""
        scores = self.scores(layer, self.recall(layer, query), counts.tolist())
        keep_best(layer, scores, counts[:, None])

    def _limits(self, layer: Layer) -> torch.Tensor:
        """What each row is cut back to, int64 [batch] on the CPU."""
        if self.budget.tokens is not None:
            return torch.full((len(layer.real_seen),), self.budget.tokens)
        if BASE not in layer.statistics:  # the prompt was read while the cache was frozen: no block has ended
            layer.statistics[BASE] = layer.lengths().amax(1)[:, None, None]
        base = layer.statistics[BASE]
        if base.device.type != "cpu":  # a cache that was loaded: brought back once, not asked for at every token
            base = layer.statistics[BASE] = base.cpu()
        return base[:, 0, 0]

    def _lowest(self, layer: Layer) -> int:
        return self.budget.tokens if self.budget.tokens is not None else int(self._limits(layer).min())
