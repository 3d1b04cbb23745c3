"""CAKE: layers share one budget by how widely and restlessly they look, and shrink while the prompt still runs
(arXiv 2503.12491).

A layer's preference comes from what the prompt's last tokens look at: the entropy of their attention over the past and
its variance from query to query. As soon as a layer is through, all layers so far are cut to their share of the whole
budget, so that memory peaks at the budget plus one full layer. A later layer only makes earlier shares smaller, and
the best of the best are the best: the cascade keeps exactly what one cut at the end would keep. It can start only in
the last chunk of a prompt that comes in chunks, because only there are the window's queries; then the peak is higher.

Where the released code is not followed, in either variant: it adds preferences up over the batch, rounds attention to
half precision before taking variances, and leaves prompts of up to budget + window tokens to be cut by a single query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from textkv.budgets import apportion
from textkv.context import Context
from textkv.decode_eviction import last_row
from textkv.eviction import HIDDEN, NEVER, Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.kernels import window_mass
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.scores import fit_window, group_mean, pool, with_window
from textkv.segments.base import Stored
from textkv.softmax import Softmax

NAME = "cake"
"""The name of the token statistics and notes that live from a layer's end to the prompt's end."""
TINY = 1e-30
"""Stands for an entropy or variance of zero, so that layers without any still share what others leave."""


@dataclass(frozen=True)
class Claim:
    """What one row of one layer brings to the allocation.

    Attributes:
        preference: natural logarithm of the layer's preference.
        past: tokens before the window: the most that the layer can use.
        spare: slots per layer that the budget leaves beside the window.
        window: tokens that are kept in any case.
    """

    preference: float
    past: int
    spare: int
    window: int


@register("cake")
@dataclass(frozen=True)
class Cake(Eviction):
    """Cuts layer by layer while the prompt runs; the budget is the mean over layers.

    It gives its scores to wrappers ("cake+adakv"), which keep the same in every layer and evict nothing while decoding.

    The authors tuned (tau1, tau2) per model and budget (1024, then 128 tokens a layer): Llama-3.1-8B (1.6, 0.4) and
    (1.6, 0.6); Llama-2-7B (1.9, 1.8) and (0.9, 2.3); Llama-2-13B (0.5, 0.4) and (1.8, 2.0); Mistral-7B-v0.3 (0.8, 0.5)
    and (1.0, 0.8); Qwen2.5-7B (1.5, 0.6) and (0.4, 0.6). Their code falls back to 1 and 1.

    Attributes:
        window: last prompt tokens that are observed and always kept, and last tokens that decoding never drops; 32.
        gamma: weight of the variance in a token's score; 200. 0 scores by the mean alone, as SnapKV does.
        tau1: the entropy counts with the exponent 1 / tau1.
        tau2: the variance counts with the exponent 1 / tau2.
        kernel: average-pooling width over tokens; 5.
        floor: share of the uniform number of past tokens that each layer keeps whatever its preference; 0 in the
            paper, 1 gives every layer the same.
        rows: "own" shares out each row's budget by its own preferences; "shared" takes the geometric mean over the
            rows, so that rows of one length keep one length and their storage has no holes.
        cascade: False cuts all layers when the last is through: the same tokens, the peak of a full cache.
        decode: "last_query" drops for each decoded token what that token looks at least; "none" keeps decoded tokens.
    """

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    kernel: int = 5
    floor: float = 0.0
    rows: Literal["own", "shared"] = "own"
    cascade: bool = True
    decode: Literal["last_query", "none"] = "last_query"

    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, decode_eviction=True, crop=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise ValueError(f"window={self.window}: the variance over queries needs at least 2 tokens")
        if min(self.tau1, self.tau2) <= 0:
            raise ValueError(f"tau1={self.tau1}, tau2={self.tau2}: both must be above 0; 1 changes nothing")
        if self.gamma < 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"gamma={self.gamma}, floor={self.floor}: gamma may not be negative, floor is a share")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: pooling needs an odd width of at least 1")
        if self.rows not in ("own", "shared"):
            raise ValueError(f"rows={self.rows!r}: use 'own' or 'shared'")
        if self.decode not in ("last_query", "none"):
            raise ValueError(f"decode={self.decode!r}: use 'last_query' or 'none'")
        if self.budget.tokens is not None and self.budget.tokens <= self.window:
            raise ValueError(
                f"budget={self.budget}: a window of {self.window} leaves no slot for the past; "
                f"use {self.window + 1}t or more, or a smaller window"
            )
        if self.decode == "none":
            object.__setattr__(self, "capabilities", Capabilities(scores=True))

    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(window=self.window)

    # ---- while the prompt runs ---------------------------------------------------------------------------------

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """mean + gamma * variance of the window's attention, pooled: fp32 [batch, kv_heads, n]; for wrappers."""
        queries = fit_window(evidence.queries, held.keys.shape[2], keep)
        return with_window(self.look(queries, held.keys, evidence.softmax)[0], queries.shape[2])

    def look(self, queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> tuple[torch.Tensor, list[float]]:
        """Scores of the tokens before the window, fp32 [batch, kv_heads, n - w], and each row's log preference.

        Args:
            queries: [batch, heads, w, head_dim] of the last w of the keys [batch, kv_heads, n, head_dim].
        """
        batch, kv_heads, n, _ = keys.shape
        scores = keys.new_empty((batch, kv_heads, n - queries.shape[2]), dtype=torch.float32)
        spread = keys.new_zeros((batch, 2), dtype=torch.float64)
        for row in range(batch):
            # One KV head at a time: over long prompts the attention of all heads' windows would be large.
            for head, group in enumerate(queries[row].unflatten(0, (kv_heads, -1))):
                ours = slice(head * len(group), (head + 1) * len(group))
                weights = past_attention(group, keys[row, head], softmax.of_heads(ours))
                scores[row, head] = self.indicator(weights).mean(0)
                spread[row, 0] -= (weights * (weights + 1e-10).log()).sum()
                spread[row, 1] += variance(weights).sum()
        return pool(scores, self.kernel), [self.preference(*pair) for pair in spread.tolist()]

    def indicator(self, weights: torch.Tensor) -> torch.Tensor:
        """Score of each past token by its weights [heads, w, past] in the window's rows: mean + gamma * variance."""
        return weights.sum(-2) / max(1, weights.shape[-2]) + self.gamma * variance(weights)

    def preference(self, entropy: float, shift: float) -> float:
        """log(entropy^(1/tau1) * shift^(1/tau2)); sums over heads and keys do, since only ratios matter."""
        return math.log(max(entropy, TINY)) / self.tau1 + math.log(max(shift, TINY)) / self.tau2

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Score the layer, then cut it and (in the cascade) all layers before it to their shares so far."""
        if self.budget.is_full:
            return
        layer.statistics[NAME], claims = self._observe(layer, evidence)
        if self.rows == "shared":
            mean = sum(claim.preference for claim in claims) / len(claims)
            claims = [Claim(mean, claim.past, claim.spare, claim.window) for claim in claims]
        layer.notes[NAME] = claims
        # Noted before the cut: this layer is whole now, which is the peak that the cascade bounds.
        layer.context.note_bytes(layer)
        layers = layer.context.layers
        if self.cascade or layer is layers[-1]:
            self._cut(layers[: layer.index + 1], len(layers))

    def _observe(self, layer: Layer, evidence: Evidence) -> tuple[torch.Tensor, list[Claim]]:
        """The layer's scores, slot by slot, and the claim of each row."""
        held = layer.stored()
        visible = evidence.visible(held.positions)
        scores = torch.zeros(held.positions.shape, device=held.keys.device).masked_fill(~visible, HIDDEN)
        claims = []
        for row, seen in enumerate(evidence.remaining.tolist()):
            real = visible[row, 0]
            slots = slice(None) if bool(real.all()) else real  # a mask would copy the keys even if it hides none
            keys = held.keys[row : row + 1, :, slots]
            if evidence.idle is not None and evidence.idle[row]:  # the block brought it nothing: it keeps what it has
                claims.append(Claim(0.0, 0, 0, keys.shape[2]))
                continue
            keep = self.budget.count(seen)
            queries = fit_window(evidence.queries_of(row), keys.shape[2], keep)
            window = queries.shape[2]
            past, (preference,) = self.look(queries, keys, evidence.softmax)
            if not math.isfinite(preference):
                raise ValueError(f"layer {layer.index}: the window's attention is NaN; are keys and queries finite?")
            scores[row][:, slots] = with_window(past, window)[0]
            claims.append(Claim(preference, keys.shape[2] - window, keep - window, window))
        return scores, claims

    def _cut(self, arrived: list[Layer], layers: int) -> None:
        """Brings every layer that is through to its share; a layer already cut goes by the scores it still holds."""
        rows = zip(*(layer.notes[NAME] for layer in arrived), strict=True)
        counts = torch.tensor([self._counts(claims, layers) for claims in rows])
        for layer, of_layer in zip(arrived, counts.T.unsqueeze(-1), strict=True):
            if bool((layer.lengths().amax(1, keepdim=True) > of_layer).any()):
                scores = layer.statistic(NAME).masked_fill(layer.stored().positions < 0, NEVER)
                # The best of the best are the best: cutting again by the same scores equals one cut at the end.
                keep_best(layer, scores, of_layer)
                layer.context.note_bytes(layer)

    def _counts(self, claims: tuple[Claim, ...], layers: int) -> list[int]:
        shares = self.shares([c.preference for c in claims], [c.past for c in claims], claims[0].spare, layers)
        return [claim.window + share for claim, share in zip(claims, shares, strict=True)]

    def shares(self, preferences: list[float], past: list[int], spare: int, layers: int) -> list[int]:
        """Past tokens that each layer so far keeps of `layers` x `spare`, by log preference, at most `past` each.

        A further layer never makes another's share larger; and the last stage is the whole allocation at once.
        """
        return apportion(preferences, past, layers * spare, int(self.floor * spare))

    def on_finish(self, context: Context) -> None:
        """Forget the scores: nothing is held at rest but the tokens."""
        for layer in context.layers:
            layer.notes.pop(NAME, None)
            if layer.statistics.pop(NAME, None) is not None:
                context.note_bytes(layer)

    # ---- while decoding ----------------------------------------------------------------------------------------

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Drop what the decoded token looks at least, outside the window."""
        if self.decode == "none" or self.budget.is_full:
            return
        n = layer.whole
        if self.budget.tokens is None and n is not None and layer.came is None and layer.hidden is None:
            scorer = LastQuery(window=self.window, kernel=self.kernel)
            layer.drop_lowest(scorer.of_row(last_row(query, layer.stored().keys, layer.softmax), layer.kv_heads))
            return
        lengths = layer.lengths().amax(1, keepdim=True)
        counts = self._limits(layer, lengths)
        if bool((lengths > layer.resting(counts)).any()):
            scorer = LastQuery(window=self.window, kernel=self.kernel)
            known = Evidence(query, tokens=layer.real_seen, hidden=layer.hidden, **layer.softmax.options)
            keep_best(layer, scorer.scores(layer, known), counts)

    def _limits(self, layer: Layer, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens that each row may hold, int64 [batch, 1]: one leaves for each that came, once anything had to go."""
        if self.budget.tokens is None:
            return lengths - 1
        # A layer that could keep its whole prompt stops growing too if another one was cut.
        cut = lengths[:, 0] < layer.real_seen
        for other in layer.context.layers:
            if bool(cut.all()):
                break
            cut = cut | (other.lengths().amax(1) < other.real_seen)
        return torch.where(cut[:, None], lengths - 1, lengths.clamp(max=self.budget.tokens))


@register("cake-official")
@dataclass(frozen=True)
class CakeOfficial(Cake):
    """CAKE with the released code's allocation: truncated shares, what exceeds a layer goes equally to the others.

    Their shares can grow from one stage to the next, when the tokens are gone already, and can exceed a layer, so that
    less than the budget is kept. With the cascade (off by default, as there) the result may differ from one cut.
    """

    cascade: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor:
            raise ValueError(f"floor={self.floor}: the released code has none; use cake")

    def shares(self, preferences: list[float], past: list[int], spare: int, layers: int) -> list[int]:
        """Truncated shares; what a layer cannot use goes in equal parts to the others, whatever their size."""
        # Less the largest: only ratios matter, and the power itself overflows where tau1 or tau2 is small.
        total, top = layers * spare, max(preferences)
        weights = [math.exp(p - top) for p in preferences]
        raw = [int(total * w / sum(weights)) for w in weights]
        given = [min(share, most) for share, most in zip(raw, past, strict=True)]
        spread(given, sum(raw) - sum(given), [i for i, most in enumerate(past) if raw[i] < most])
        spread(given, total - sum(given), [i for i, most in enumerate(past) if given[i] < most])
        return [min(share, most) for share, most in zip(given, past, strict=True)]


def spread(shares: list[int], units: int, to: list[int]) -> None:
    """Adds `units` in equal parts to the shares at the indices `to`, in place; the first ones get what is left over."""
    for place, index in enumerate(to):
        shares[index] += units // len(to) + (place < units % len(to))


@dataclass(frozen=True)
class LastQuery(Eviction):
    """Scores by the attention of one decoded token; its last `window` predecessors (itself included) are kept."""

    window: int = 32
    kernel: int = 5

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The query's attention, pooled: fp32 [batch, kv_heads, n]."""
        return self.of_row(window_mass(evidence.queries, held.keys, **evidence.softmax.options), held.keys.shape[1])

    def of_row(self, row: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Scores fp32 [batch, kv_heads, n] from what the token looked at, [batch, heads, n]."""
        # One token leaves: the window must spare one to keep and one to drop.
        window = max(0, min(self.window, row.shape[-1] - 2))
        past = group_mean(row, kv_heads)[..., : row.shape[-1] - window]
        return with_window(pool(past, self.kernel), window)


def past_attention(queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Attention of queries [heads, w, head_dim] of the last w of the keys [n, head_dim] to the n - w before them.

    fp32 [heads, w, n - w]; softmax over all visible keys, so rows sum to less than 1.
    """
    width, n = queries.shape[1], keys.shape[0]
    unseen = torch.ones(width, n, dtype=torch.bool, device=keys.device).triu(n - width + 1)
    scores = softmax.scores(queries.float() @ keys.float().mT)
    return softmax.weights(scores.masked_fill_(unseen, NEVER))[..., : n - width]


def variance(weights: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the rows of [heads, w, past] -> [heads, past]; 0 for fewer than two rows.

    Two passes: the difference of sums that a fused kernel would take drowns variances of 1e-8 in rounding.
    """
    if weights.shape[-2] < 2:
        return torch.zeros_like(weights.sum(-2))
    return weights.var(-2)
