"""D2O: layers that look widely keep more, and what leaves is merged into what stays (arXiv 2406.13035).

Inside a layer the kept tokens are H2O's: sinks, recent tokens and heavy hitters by accumulated attention, per KV head.
A token that leaves is merged into the kept token whose key is most like its own, if it is similar enough: the bar is a
moving average per row and head. How many tokens a layer keeps follows from how unevenly its attention falls on the
tokens, known only when all layers are through: the prompt's peak is the full cache, and all layers are cut together
at its end. (The authors cut at the first decoded token, which so still sees everything.)

Paper and released code disagree; `d2o` follows the paper, `d2o-official` the code:
- merging weights that sum to 1 [eq. 11] / a mean of u * k, which shrinks keys and values;
- bar moved by the largest similarity, 0.7 new / by the mean over victims and heads, 0.5 new;
- layer shares scaled so that the mean over layers is the budget / clamped and left below it.
The raw variances of column sums grow with the prompt, and softmax(-F) of them is one layer takes all; the code scales
them to [0, 1] over the heads of EACH layer, which loses the layers' order. `density="layers"` scales over the layers.
In neither do we copy the code's bar per rank (it ties unrelated tokens of different heads), its bar that leaks into the
next prompt, its KV copies per query head, or its three layers that ignore the budget (`protected_layers`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from textkv.budgets import apportion
from textkv.contents import OF_HEAD
from textkv.context import Context
from textkv.decode_eviction import accumulate, attention_row, part_of, protect
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.positions import RotarySpec
from textkv.scores import group_mean
from textkv.segments.base import Stored

MASS, THRESHOLD = "d2o.mass", OF_HEAD + "d2o.threshold"
_BLOCK_ELEMENTS = 1 << 24  # fp32 similarities held at a time
_ROUNDING = 1e-6


@register("d2o")
@dataclass(frozen=True)
class D2O(Method):
    """Cuts and merges at the end of each prompt block, then one token per decoded token; the budget is the mean over
    layers, heavy + recent, sinks among the heavy ones.

    Attributes:
        recent: share of a layer's tokens that is the newest ones, at least one; the paper advises 0.25 (3 : 1).
        sinks: first tokens that never leave.
        beta: weight of the newest similarity in the moving bar, in [0, 1].
        self_weight: weight `e` of the kept token against exp(similarity) of a merged one. Euler's number gives it about
            half; another implementation reads 0.1, which leaves it 4 %.
        merge_keys: "post" merges keys as stored; "pre" turns a victim to the kept token's position first (distant keys
            then do not cancel; no M-RoPE); "none" merges values only.
        threshold: a fixed bar instead of the moving one; above 1 nothing is ever merged.
        density: how a layer's unevenness is measured: variance of the column sums, scaled to [0, 1] over the "layers"
            or over the "heads" of each layer (the released code), or unscaled: "variance" (the paper's formula).
        protected_layers: layers that keep everything and grow, e.g. (0, 1, -1) as in the released code. The other
            layers pay for them as far as they can.
    """

    recent: float = 0.25
    sinks: int = 4
    beta: float = 0.7
    self_weight: float = math.e
    merge_keys: Literal["post", "pre", "none"] = "post"
    threshold: float | None = None
    density: Literal["layers", "heads", "variance"] = "layers"
    protected_layers: tuple[int, ...] = ()

    capabilities: ClassVar[Capabilities] = Capabilities(decode_eviction=True, crop=False, merges=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.recent <= 1:
            raise ValueError(f"recent={self.recent}: give a share of the budget in (0, 1], e.g. 0.25")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: cannot be negative; 0 protects no first token")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: the weight of the newest similarity lies in [0, 1], e.g. 0.7")
        if self.self_weight <= 0:
            raise ValueError(f"self_weight={self.self_weight}: must be positive, e.g. 2.718 or 0.1")
        if self.merge_keys not in ("post", "pre", "none"):
            raise ValueError(f"merge_keys={self.merge_keys!r}: use 'post', 'pre' or 'none'")
        if self.density not in ("layers", "heads", "variance"):
            raise ValueError(f"density={self.density!r}: use 'layers', 'heads' or 'variance'")
        if self.budget.tokens is not None and self.budget.tokens <= self.sinks:
            raise ValueError(
                f"budget={self.budget}: {self.sinks} sinks leave no other token; use {self.sinks + 1}t or more"
            )

    def needs(self) -> Needs:
        """Column sums, and rotary positions where keys are merged before the rotation."""
        return Needs(columns=True, rope=self.merge_keys == "pre")

    def on_build(self, context: Context) -> None:
        """Check that the model has the protected layers, and one rotary position per token where keys are turned.

        Raises:
            ValueError: it has not.
        """
        super().on_build(context)
        layers = context.governed
        wrong = [i for i in self.protected_layers if not -layers <= i < layers]
        if layers and wrong:
            raise ValueError(f"protected_layers={self.protected_layers}: the model has layers 0 to {layers - 1}")
        rope = getattr(context.config, "rope_parameters", None) or {}
        if self.merge_keys == "pre" and "mrope_section" in rope:
            raise ValueError("merge_keys='pre' knows one position per token and the model has three; use 'post'")

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Add the block's column sums to those known and note their variance, until all layers are through."""
        if not self.budget.is_full:
            mass = _added(layer, evidence.columns)
            layer.notes["d2o"] = spread(mass, layer.stored().positions >= 0).cpu(), evidence.remaining

    def on_finish(self, context: Context) -> None:
        """All layers have seen the prompt: share out the budget, cut and merge."""
        if self.budget.is_full:
            return
        notes = [layer.notes.pop("d2o") for layer in context.layers]
        spreads = torch.stack([of_layer for of_layer, _ in notes])
        counts = [self.layer_counts(spreads[:, row], seen) for row, seen in enumerate(notes[0][1].tolist())]
        for layer, of_layer in zip(context.layers, torch.tensor(counts).T, strict=True):
            if layer.index not in self._protected(len(context.layers)):
                self._compress(layer, of_layer[:, None])

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Add the decoded token's attention; where the layer is full, one token leaves and is merged."""
        if self.budget.is_full or self._drop_one(layer, query):
            return
        _added(layer, group_mean(attention_row(layer, query), layer.kv_heads))
        if layer.index in self._protected(layer.context.governed):
            return
        lengths = layer.lengths().amax(1, keepdim=True)
        full = lengths > (self.budget.tokens or 0)  # a share was taken at the prompt's end: every row is full
        if THRESHOLD in layer.statistics:  # a row that was cut is full at its layer's share, below the mean or above it
            full |= ~layer.statistics[THRESHOLD][:, 0, :1].isnan().cpu()
        self._compress(layer, lengths - full.long())

    def _drop_one(self, layer: Layer, query: torch.Tensor) -> bool:
        """The common case, in which the host knows all lengths and that the layer is full: nothing is asked of the
        device, and only the rows that change are moved. Returns whether it is that."""
        n = layer.whole
        # Under a budget in tokens a row may be full at its layer's share or still grow: the bars tell, on the device.
        if n is None or n < 2 or layer.came is not None or self.budget.tokens is not None:
            return False
        mass = accumulate(layer, MASS, group_mean(attention_row(layer, query), layer.kv_heads))
        if layer.index in self._protected(layer.context.governed):
            return True
        recent = part_of(n - 1, self.recent)
        scores = protect(mass, None, min(n - 1 - recent, self.sinks), recent)
        victim = n - 1 - scores.flip(-1).argmin(-1, keepdim=True)  # of equal ones the newest, as `drop_lowest`
        held = layer.stored()
        target, keys, values, threshold = self._merged_one(layer, held, victim)
        layer.drop_lowest(scores)
        layer.statistics[THRESHOLD] = threshold
        # Slots behind the victim have moved up by one.
        slot, now = _columns(target - (target > victim).long(), held.keys), layer.stored()
        now.values.scatter_(2, slot, values.to(now.values.dtype))
        if self.merge_keys != "none":
            now.keys.scatter_(2, slot, keys.to(now.keys.dtype))
        return True

    def _merged_one(
        self, layer: Layer, held: Stored, victim: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The slot nearest to each head's `victim` int64 [batch, kv_heads, 1], its key and value with the victim's
        merged in if they are alike, fp32 [batch, kv_heads, 1, head_dim], and the new bar."""
        at = _columns(victim, held.keys)
        key, value = held.keys.gather(2, at).float(), held.values.gather(2, at).float()
        cosines = torch.cosine_similarity(key, held.keys.float(), dim=-1)
        closeness, target = cosines.scatter_(-1, victim, -torch.inf).max(-1, keepdim=True)
        before = layer.statistics.get(THRESHOLD)
        threshold = self._moved(before, closeness, torch.ones_like(closeness, dtype=torch.bool))
        weight, share, own = self._weights(closeness)
        joins = closeness >= threshold - _ROUNDING
        to = _columns(target, held.keys)

        def mixed(kept: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
            # A token that takes nobody in stays bit for bit.
            sums = (own * kept + weight[..., None] * gone) / (own + share)[..., None]
            return torch.where((joins & (share > 0))[..., None], sums, kept)

        values = mixed(held.values.gather(2, to).float(), value)
        if self.merge_keys == "pre":
            key = _rotated(key, held.positions.gather(-1, target) - held.positions.gather(-1, victim), layer.rotary)
        return target, mixed(held.keys.gather(2, to).float(), key), values, threshold

    def _protected(self, layers: int) -> set[int]:
        return {i % layers for i in self.protected_layers}

    def layer_counts(self, spreads: torch.Tensor, seen: int) -> list[int]:
        """Tokens per layer of a prompt of `seen`, for variances fp32 [layers, kv_heads]: together layers x budget."""
        keep, layers = self.budget.count(seen), len(spreads)
        free = [i for i in range(layers) if i not in self._protected(layers)]
        counts = [seen] * layers
        if keep == seen or not free:
            return counts
        # The released code's floor of 1 %, and room for one token that can take others in.
        least = min(keep, max(math.ceil(0.01 * seen), self.sinks + 1))
        total = max(layers * keep - (layers - len(free)) * seen, len(free) * least)
        shares = apportion((-self.unevenness(spreads[free])).tolist(), [seen] * len(free), total, floor=least)
        for index, share in zip(free, shares, strict=True):
            counts[index] = share
        return counts

    def unevenness(self, spreads: torch.Tensor) -> torch.Tensor:
        """F of each layer, float64 [layers], from variances [layers, kv_heads]; see `density`."""
        spreads = spreads.double()
        if self.density == "heads":
            return _unit(spreads, 1).mean(1)
        return _unit(spreads.mean(1), 0) if self.density == "layers" else spreads.mean(1)

    def _compress(self, layer: Layer, counts: torch.Tensor) -> None:
        """Cuts each row to `counts` int64 [batch, 1] tokens per head and merges what leaves."""
        lengths = layer.lengths().amax(1, keepdim=True)
        counts = torch.minimum(layer.resting(counts), lengths)
        if bool((counts == lengths).all()):
            return
        held = layer.stored()
        recent = part_of(counts[:, 0], self.recent)
        sinks = (counts[:, 0] - recent).clamp(max=self.sinks)
        kept, gone = split(protect(layer.statistic(MASS), held.positions, sinks, recent), counts, lengths)
        keys, values, threshold = self._merged(layer, held, kept, gone)
        layer.keep(kept)
        # One number per row and head: a statistic of one column moves, is saved and is counted with its row.
        layer.statistics[THRESHOLD] = threshold
        now = layer.stored()
        now.keys.copy_(keys)
        now.values.copy_(values)

    def _merged(
        self, layer: Layer, held: Stored, kept: torch.Tensor, gone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of the slots `kept` with those of the slots `gone` merged in, fp32, and the new bar."""
        # Similarity is that of keys as they are stored; values follow the keys' pairs [eq. 8].
        keys, victims = rows(held.keys, kept), rows(held.keys, gone)
        closeness, target = nearest(victims, keys, kept >= 0)
        threshold = self._moved(layer.statistics.pop(THRESHOLD, None), closeness, gone >= 0)
        # A mean of equal similarities may come out a rounding above them.
        joins = (gone >= 0) & (closeness >= threshold - _ROUNDING)
        weight, share, own = self._weights(closeness)
        how = target, weight * joins, share * joins, own
        values = absorb(rows(held.values, kept), rows(held.values, gone), *how)
        if self.merge_keys == "pre":
            to = held.positions.gather(-1, kept.clamp(min=0)).gather(-1, target)
            victims = _rotated(victims, to - held.positions.gather(-1, gone.clamp(min=0)), layer.rotary)
        return keys if self.merge_keys == "none" else absorb(keys, victims, *how), values, threshold

    def _moved(self, before: torch.Tensor | None, closeness: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        """The bar after these victims, fp32 [batch, kv_heads, 1]; NaN where none ever left [eq. 10]."""
        before = closeness.new_full((*closeness.shape[:2], 1), torch.nan) if before is None else before[..., :1]
        if self.threshold is None:
            first, later = self._statistics(closeness, gone)
            after = torch.where(before.isnan(), first, self.beta * later + (1 - self.beta) * before)
        else:
            after = torch.full_like(before, self.threshold)
        return torch.where(gone.any(-1, keepdim=True), after, before)

    def _statistics(self, closeness: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What starts the bar and what moves it, each [batch, kv_heads, 1]: mean and largest of the similarities."""
        mean = closeness.masked_fill(~gone, 0).sum(-1, keepdim=True) / gone.sum(-1, keepdim=True).clamp(min=1)
        return mean, closeness.masked_fill(~gone, -torch.inf).amax(-1, keepdim=True)

    def _weights(self, closeness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weight of each victim, its share of the divisor, and the kept token's weight and share [eq. 11]."""
        # A kept token is like itself with cosine 1: its weight is e unless told otherwise.
        return closeness.exp(), closeness.exp(), self.self_weight


@register("d2o-official")
@dataclass(frozen=True)
class D2OOfficial(D2O):
    """D2O with the released code's arithmetic; pass protected_layers=(0, 1, -1) for its bytes, which exceed the budget.

    `self_weight` plays no part: the kept token counts like each merged one.
    """

    recent: float = 0.5
    beta: float = 0.5
    density: Literal["layers", "heads", "variance"] = "heads"

    def layer_counts(self, spreads: torch.Tensor, seen: int) -> list[int]:
        """Tokens per layer as released: softmax shares clamped to [1 %, 100 %], heavy and recent parts truncated."""
        keep, layers = self.budget.count(seen), len(spreads)
        if keep == seen:
            return [seen] * layers
        weight = (-self.unevenness(spreads)).softmax(0)
        share = (layers * keep / seen * weight).clamp(0.01, 1.0) * seen
        heavy, recent = ((share * part + _ROUNDING).long() for part in (1 - self.recent, self.recent))
        counts = (heavy + recent).clamp(min=1).tolist()
        return [seen if i in self._protected(layers) else count for i, count in enumerate(counts)]

    def _statistics(self, closeness: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        together = closeness.masked_fill(~gone, 0).sum((1, 2), keepdim=True)
        mean = (together / gone.sum((1, 2), keepdim=True).clamp(min=1)).expand(-1, gone.shape[1], -1)
        return mean, mean

    def _weights(self, closeness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        return closeness, torch.ones_like(closeness), 1.0


def _added(layer: Layer, mass: torch.Tensor) -> torch.Tensor:
    """All the attention that the stored tokens ever got, `mass` fp32 [batch, kv_heads, n] included."""
    total = accumulate(layer, MASS, mass)
    if bool(total.isnan().any()):
        raise ValueError(f"layer {layer.index}: the attention sums contain NaN; are keys and queries finite?")
    return total


def spread(mass: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the real tokens of column sums [batch, kv_heads, n]: [batch, kv_heads]."""
    count = real.sum(-1)
    mean = (mass * real).sum(-1) / count.clamp(min=1)
    return ((mass - mean[..., None]).square() * real).sum(-1) / (count - 1).clamp(min=1)


def split(scores: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that stay, ascending, and slots that go, best first: int64 [batch, kv_heads, ..], -1 = none.

    counts, lengths: int64 [batch, 1] on the CPU, tokens per head that stay and that are there.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    n, most, longest = scores.shape[-1], int(counts.max()), int((lengths - counts).max())
    counts, lengths = (x[..., None].to(scores.device) for x in (counts, lengths))
    rank = torch.arange(most, device=scores.device)
    kept = order[..., :most].masked_fill(rank >= counts, n).sort(dim=-1).values
    rank = (counts + torch.arange(longest, device=scores.device)).expand(-1, scores.shape[1], -1)
    gone = order.gather(-1, rank.clamp(max=n - 1)).masked_fill(rank >= lengths, -1)
    return kept.masked_fill(kept == n, -1), gone


def rows(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """x [batch, kv_heads, n, head_dim] at `slots` [batch, kv_heads, c] (-1 gives any row): fp32."""
    return x.gather(2, slots.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[-1])).float()


def _columns(slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Slots [batch, kv_heads, c] as an index into rows like [batch, kv_heads, n, head_dim]."""
    return slots[..., None].expand(*slots.shape, like.shape[-1])


def nearest(victims: torch.Tensor, kept: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of each victim [batch, kv_heads, e, head_dim] with a kept key, and which [eq. 8]: [.., e] each.

    real: bool [batch, kv_heads, c], which kept slots hold a token. The e x c matrix is never whole in memory.
    """
    victims, kept = F.normalize(victims, dim=-1), F.normalize(kept, dim=-1)
    size = max(1, _BLOCK_ELEMENTS // max(1, real.numel()))
    found = [
        (part @ kept.mT).masked_fill(~real[:, :, None], -torch.inf).max(-1) for part in victims.split(size, dim=2)
    ]  # fmt: skip
    return torch.cat([x.values for x in found], -1), torch.cat([x.indices for x in found], -1)


def absorb(
    kept: torch.Tensor,
    victims: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    share: torch.Tensor,
    own: float,
) -> torch.Tensor:
    """(own * kept + sum of weight * victims) / (own + sum of share), over the victims of each kept token.

    Args:
        kept, victims: fp32 [batch, kv_heads, c or e, head_dim].
        target: int64 [batch, kv_heads, e], the kept token that a victim goes to.
        weight, share: fp32 [batch, kv_heads, e]; share 0 = is dropped. A token without victims stays bit for bit.
    """
    added = torch.zeros_like(kept).scatter_add(2, target[..., None].expand_as(victims), weight[..., None] * victims)
    shares = kept.new_zeros(kept.shape[:3]).scatter_add(2, target, share)[..., None]
    return torch.where(shares > 0, (own * kept + added) / (own + shares), kept)


def _rotated(keys: torch.Tensor, delta: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
    """Keys [batch, kv_heads, e, head_dim] moved by `delta` [batch, kv_heads, e] rotary positions."""
    return rotary.turn(keys.flatten(0, 1)[:, None], delta.flatten(0, 1))[:, 0].view_as(keys)


def _unit(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x scaled to [0, 1] along `dim`; 0 where all are equal."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return (x - low) / (high - low + 1e-6)
