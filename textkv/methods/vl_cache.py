"""VL-Cache: for prompts with screenshots; layers that look narrowly keep less (arXiv 2410.23317).

What the tokens after the last screenshot look at is kept. How much of it, is shared out over the layers by how dense
their attention is, which is known only when all layers are through: so nothing is dropped before the last layer, and
the peak of the prompt is the full cache. A layer whose share is smaller than the window shrinks its window to the
share - 1 newest tokens, scores by their queries alone and keeps the best token before them, as the GUI-KV authors do;
so the layers' windows of queries are held until then, and scores are made last.

The GUI-KV authors' version tests probabilities against an absolute threshold (`vl-cache-official`); the paper's is
relative to each row's largest. Their extra forward pass over raw embeddings is not repeated here: the layers' true
attention is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from textkv.budgets import apportion
from textkv.context import Context
from textkv.eviction import Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.scores import fit_window, group_mean, past_mass, pool, with_window
from textkv.segments.base import Stored

_ALL = 1 << 30  # more queries than any prompt has


@register("vl-cache")
@dataclass(frozen=True)
class VLCache(Eviction):
    """Cuts all layers when the last one is through; decoded tokens are all kept.

    Attributes:
        window: most tokens after the last screenshot that are observed; these are kept as far as a layer's share goes.
            None = all of them, for which a prompt's queries are held until it ends.
        text_window: observed tokens of a prompt without screenshots.
        threshold: an attention entry counts as sparse below this share of its row's largest entry.
        kernel: average-pooling width over tokens; 1 = none, as in the paper.
        floor: least share of the total that a layer gets.
    """

    window: int | None = 128
    text_window: int = 32
    threshold: float = 0.01
    kernel: int = 1
    floor: float = 0.0

    relative: ClassVar[bool] = True
    """Whether `threshold` is a share of the row's largest entry (the paper) or a probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.window or 1, self.text_window) < 1 or self.window == 0:
            raise ValueError(f"window={self.window}, text_window={self.text_window}: both must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: pooling needs an odd width of at least 1")
        if not 0 < self.threshold < 1 or not 0 <= self.floor < 1:
            raise ValueError(f"threshold={self.threshold}, floor={self.floor}: both are shares below 1")

    def needs(self) -> Needs:
        """The spans of screenshots, and as many last queries as may be observed."""
        return Needs(window=_ALL if self.window is None else max(self.window, self.text_window), spans=True)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Attention from the tokens after the row's last screenshot, pooled: fp32 [batch, kv_heads, n]."""
        # Row by row: the last screenshot ends elsewhere in each, so windows differ.
        rows = []
        for row in range(len(held.keys)):
            queries = fit_window(self._observed(evidence, row), held.keys.shape[2], keep)
            keys = held.keys[row : row + 1]
            mass = pool(group_mean(past_mass(queries, keys, evidence.softmax), keys.shape[1]), self.kernel)
            rows.append(with_window(mass, queries.shape[2]))
        return torch.cat(rows)

    def _observed(self, evidence: Evidence, row: int) -> torch.Tensor:
        """Queries [1, heads, w, head_dim] of the tokens after the row's last screenshot."""
        return evidence.queries[row : row + 1, :, evidence.queries.shape[2] - self._width(evidence, row) :]

    def _width(self, evidence: Evidence, row: int) -> int:
        """How many of the evidence's queries are observed in a row."""
        spans = evidence.spans[row] if evidence.spans else []
        after = int(evidence.tokens[row]) - spans[-1][1] if spans else self.text_window
        most = _ALL if spans and self.window is None else self.window if spans else self.text_window
        return min(max(after, 1), most, evidence.queries.shape[2])

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Note how dense the layer's attention is, and what it takes to score its tokens once its share is known."""
        if not self.budget.is_full:
            rows = range(len(evidence.tokens))
            density = torch.tensor([self._density(layer, evidence, row) for row in rows])
            width = max(self._width(evidence, row) for row in rows)
            # A copy: a slice would keep all queries of the prompt alive in every layer.
            queries = evidence.queries[:, :, evidence.queries.shape[2] - width :].clone()
            layer.notes["vl-cache"] = replace(evidence, queries=queries), density

    def _density(self, layer: Layer, evidence: Evidence, row: int) -> float:
        """Share of the causal attention entries of the observed rows that are not sparse, mean over heads."""
        held, queries = layer.stored(), self._observed(evidence, row)[0]
        visible = evidence.visible(held.positions)
        kv_heads, width = held.keys.shape[1], queries.shape[1]
        dense = seen = 0
        for head, group in enumerate(queries.unflatten(0, (kv_heads, -1))):
            keys = held.keys[row, head][visible[row, head]]
            if not len(keys):  # a row that has not begun
                return 0.0
            hidden = torch.ones(width, len(keys), dtype=torch.bool, device=keys.device).triu(len(keys) - width + 1)
            how = evidence.softmax.of_heads(slice(head * len(group), (head + 1) * len(group)))
            scores = how.scores(group.float() @ keys.float().mT)
            shares = how.weights(scores.masked_fill(hidden, float("-inf")))
            # Dense = not sparse: layers get shares in proportion to it.
            limit = self.threshold * (shares.amax(-1, keepdim=True) if self.relative else 1.0)
            dense += int((shares >= limit).masked_fill(hidden, False).sum())
            seen += len(group) * int((~hidden).sum())
        return dense / seen

    def on_finish(self, context: Context) -> None:
        """All layers are through: share out the budget by density, score, and cut."""
        notes = [layer.notes.pop("vl-cache", None) for layer in context.layers]
        if None in notes:
            return
        densities = torch.stack([density for _, density in notes])
        tokens = notes[0][0].remaining.tolist()
        counts = torch.tensor([self.shares(densities[:, row], seen) for row, seen in enumerate(tokens)])
        for layer, (evidence, _) in zip(context.layers, notes, strict=True):
            of_layer = counts[:, layer.index : layer.index + 1]
            if not bool((layer.lengths().amax(1, keepdim=True) <= of_layer).all()):
                keep_best(layer, self.scores(layer, evidence, of_layer[:, 0].tolist()), of_layer)

    def shares(self, densities: torch.Tensor, seen: int) -> list[int]:
        """Tokens per layer in proportion to `densities` [layers]: together layers x budget, each 1 to `seen`."""
        layers = len(densities)
        if not seen:  # a row that has not begun
            return [0] * layers
        # In logarithms, as `apportion` wants them; the floor keeps a layer without dense entries from -inf.
        weight = (densities.double() / densities.double().sum().clamp(min=1e-12)).clamp(min=max(self.floor, 1e-9))
        return apportion(weight.log().tolist(), [seen] * layers, layers * self.budget.count(seen), floor=1)


@register("vl-cache-official")
@dataclass(frozen=True)
class VLCacheOfficial(VLCache):
    """VL-Cache as the GUI-KV authors re-implemented it: all tokens after the last screenshot are observed,
    probabilities under 0.01 are sparse, scores are pooled, shares have a floor."""

    window: int | None = None
    kernel: int = 5
    floor: float = 0.001

    relative: ClassVar[bool] = False
