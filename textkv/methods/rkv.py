"""R-KV: keep what is looked at and not said again, in rounds while decoding (arXiv 2505.24133).

Reasoning repeats itself. A token's worth is weight * importance - (1 - weight) * redundancy. Importance is what the
last `window` queries look at; redundancy says how much a key resembles all others, but for the most recent one that
each key resembles: of a repeated passage the last copy counts as new. Cut at the end of each prompt block, and each
time `interval` decoded tokens have come on top of the budget; the window itself always stays.

The queries of decoded tokens are held only for the last `window` tokens before a round. The authors count rounds by
generated tokens, or end them at a line break, and work on the first row of a batch alone; here each row has its own.
Their n x n matrix of similarities is never held: it is made in tiles, of which each row leaves one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.contents import OF_HEAD
from textkv.evidence import Evidence, Needs
from textkv.interval_eviction import IntervalEviction
from textkv.layer import Layer
from textkv.method import register
from textkv.scores import fit_window, pool, with_window
from textkv.segments.base import Stored
from textkv.softmax import soft_capped

QUERIES = OF_HEAD + "rkv.queries"
"""Statistic per row, [batch, heads, window, head_dim] in the model's dtype: the last queries, while a round is near."""
_TILE = 1 << 22  # fp32 similarities held at a time


@register("rkv")
@dataclass(frozen=True)
class RKV(IntervalEviction):
    """Importance less redundancy.

    Attributes:
        window: the last tokens, whose queries judge and which always stay; 8 in the authors' code.
        kernel: width of the max pooling of importance over tokens, odd; 7 there, 1 = none.
        weight: of importance against redundancy, in [0, 1]: the paper's lambda. 0.1 in the paper, 0.07 in its script.
        similar: keys whose cosine exceeds this say the same; 0.5 there.
    """

    window: int = 8
    kernel: int = 7
    weight: float = 0.1
    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= self.interval:
            raise ValueError(
                f"window={self.window}: between 1 and interval={self.interval}, for a round is judged by queries that "
                "came since the last one"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: pooling needs an odd width of at least 1; the authors use 7")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: a share of importance lies in [0, 1]; the paper uses 0.1")
        if not -1 <= self.similar <= 1:
            raise ValueError(f"similar={self.similar}: a cosine lies in [-1, 1]; the paper uses 0.5")

    def needs(self) -> Needs:
        """The queries of the prompt's last tokens."""
        return Needs(window=self.window)

    # ---- the score ---------------------------------------------------------------------------------------------

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """weight * importance - (1 - weight) * redundancy of past tokens; the window is PROTECTED."""
        queries = fit_window(evidence.queries, held.keys.shape[2], keep)
        past = held.keys.shape[2] - queries.shape[2]
        worth = -(1 - self.weight) * redundancy(held.keys, self.similar)[..., :past]
        if queries.shape[2]:  # a single kept token leaves no window, and nobody to judge importance
            seen = importance(queries, held.keys, evidence.scale, evidence.softcap)
            worth = worth + self.weight * pool(seen, self.kernel, "max")
        return with_window(worth, queries.shape[2])

    # ---- when --------------------------------------------------------------------------------------------------

    def watch(self, layer: Layer, query: torch.Tensor, ahead: int) -> None:
        """Keeps the last `window` queries of each row from the moment on that a round may need them; after it they go
        with the next token, unless another row's round is near."""
        if ahead >= self.window:
            layer.statistics.pop(QUERIES, None)
            return
        known = layer.statistics.get(QUERIES)
        if known is None:
            known = query.new_zeros(*query.shape[:2], self.window, query.shape[3])
        now = torch.cat([known[:, :, 1:], query], 2)
        if layer.came is not None:  # padding has no vote
            now = torch.where((layer.came > 0).to(now.device)[:, None, None, None], now, known)
        layer.statistics[QUERIES] = now

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Cut by the block's own last queries; those of decoded tokens are done with."""
        if layer.came is None:  # a row to which nothing came goes on with its own
            layer.statistics.pop(QUERIES, None)
        super().on_prefill_end(layer, evidence)

    def recall(self, layer: Layer, query: torch.Tensor) -> Evidence:
        """The last `window` queries, as evidence; see `IntervalEviction`."""
        return Evidence(layer.statistics[QUERIES], tokens=layer.real_seen, hidden=layer.hidden, **layer.softmax.options)


def importance(queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Attention that each token before the window gets, fp32 [batch, kv_heads, n - w]: the mean over the window.

    Query heads of a group are joined by the larger logit, and each query's softmax runs over the tokens before the
    window alone: a model's learned sink takes no part in it, as the window does not.

    Args:
        queries: [batch, heads, w, head_dim] of the last w tokens.
        keys: [batch, kv_heads, n, head_dim].
    """
    groups = queries.unflatten(1, (keys.shape[1], -1)).float() * scale
    logits = groups @ keys[:, :, None, : keys.shape[2] - queries.shape[2]].float().mT
    return soft_capped(logits, softcap).amax(2).softmax(-1).mean(2)


def redundancy(keys: torch.Tensor, similar: float) -> torch.Tensor:
    """How much each key [batch, kv_heads, n, head_dim] resembles all others: fp32 [batch, kv_heads, n], sums to 1.

    The softmax over tokens of each column's mean in the matrix of cosines, in which the diagonal is 0, and in every row
    also the last entry above `similar` (the first entry, where there is none).
    """
    n = keys.shape[2]
    unit = keys.float()
    unit = unit / (unit.norm(dim=-1, keepdim=True) + 1e-8)
    # A column's sum is one product with the sum of all keys; what counts as 0 is taken off it.
    sums = (unit @ unit.sum(2)[..., None])[..., 0] - unit.square().sum(-1)
    rows = max(1, _TILE // (keys.shape[0] * keys.shape[1] * n))
    place = torch.arange(n, device=keys.device)
    for start in range(0, n, rows):
        tile = unit[:, :, start : start + rows] @ unit.mT
        tile[..., place[: tile.shape[2]], place[start : start + rows]] = 0
        last = torch.where(tile > similar, place, 0).amax(-1)
        sums = sums.scatter_add(-1, last, -tile.gather(-1, last[..., None])[..., 0])
    return (sums / n).softmax(-1)
