"""CRITIC: a hybrid importance of attention, entropy and gradient, under a drop rate that follows memory (the cache rule
of PORAG/ATLAS/CRITIC, arXiv 2504.01281, no code released).

What is printed does not work; this is what it can mean. The attention that a token GIVES sums to 1 for every token, so
we take what it RECEIVES. The entropy of a token's own attention grows with its position, so it is divided by the log of
the keys that the token saw; it is known only while the token is a query and then stays with it. The gradient of the
change of the layer's output is taken in closed form from one query's row. And a share of the tokens still STORED,
dropped at every step, shrinks the cache to nothing: the share is of the tokens SEEN. Sinks and the newest tokens are
protected, which the paper does not do.

Entropies need every query of the prompt: a prompt in chunks keeps them all until it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from textkv.budgets import Budget
from textkv.contents import OF_HEAD
from textkv.decode_eviction import accumulate, attention_row, protect
from textkv.eviction import Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.kernels import decode_attention
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.segments.base import Stored
from textkv.softmax import Softmax

ATTENTION, ENTROPY = "critic.attention", "critic.entropy"
"""Token statistics: attention received so far, and the normalised entropy of the token's own row."""
OUTPUT, LOAD = OF_HEAD + "critic.output", OF_HEAD + "critic.load"
"""Statistics per row, taken out while tokens move: the last query's output [batch, kv_heads, group * head_dim] and the
highest memory load so far [batch, 1, 1]."""
ALL = 1 << 30
_TILE = 1 << 22  # fp32 probabilities held at a time


@dataclass(frozen=True)
class Terms:
    """What importance is made of, fp32 [batch, kv_heads, n], and the last query's output [batch, kv_heads, group,
    head_dim]. Entropies of tokens that were no query of this block are 0."""

    attention: torch.Tensor
    entropy: torch.Tensor
    gradient: torch.Tensor
    output: torch.Tensor


@register("critic")
@dataclass(frozen=True)
class Critic(Eviction):
    """Cuts at the end of each prompt block and after each decoded token, to a share of all tokens seen.

    The paper's base rate r is 1 - budget; it lies between 0.1 and 0.5 there, and 0.3 (budget 0.7) where we choose. A
    budget in tokens is a ceiling. Behind a wrapper ("critic+adakv") it only scores, and drops nothing while decoding.

    Attributes:
        weights: of attention, entropy and gradient, together 1. Not given in the paper; 0.5, 0.2, 0.3 are ours.
        sinks: first tokens that always stay, at most a quarter of what is kept; ours, 0 in the paper.
        recent: newest tokens that always stay, at most half of what is kept; ours, 0 in the paper.
        heads: "shared" keeps the same tokens in all heads of a layer (the paper); "own" lets each KV head choose.
        least: never keep fewer than this (the paper's m, no value given). It raises what short prompts keep above the
            budget, so it is off by default; 128 is a plausible m.
        capacity: bytes that the cache may hold, for the memory term of the rate; None = no memory term.
        pressure: how much a full `capacity` adds to the rate (the paper's a, no value given).
        most: the memory term never raises the rate above this (the paper's r_max, no value given).
    """

    weights: tuple[float, float, float] = (0.5, 0.2, 0.3)
    sinks: int = 4
    recent: int = 32
    heads: Literal["shared", "own"] = "shared"
    least: int = 0
    capacity: int | None = None
    pressure: float = 0.2
    most: float = 0.5

    capabilities: ClassVar[Capabilities] = Capabilities(scores=True, decode_eviction=True, crop=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != 3 or min(self.weights) < 0:
            raise ValueError(f"weights={self.weights}: give three shares, of attention, entropy and gradient")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights={self.weights} add up to {sum(self.weights):g}; scale them to 1")
        if min(self.sinks, self.recent, self.least) < 0:
            raise ValueError(f"sinks={self.sinks}, recent={self.recent}, least={self.least}: none may be negative")
        if self.heads not in ("shared", "own"):
            raise ValueError(f"heads={self.heads!r}: use 'shared' or 'own'")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity={self.capacity}: give the bytes that the cache may hold, or None")
        if self.pressure < 0 or not 0 <= self.most < 1:
            raise ValueError(f"pressure={self.pressure}, most={self.most}: pressure is at least 0, most lies in [0, 1)")

    def needs(self) -> Needs:
        """The prompt's column sums, and every query for the entropies or the last two for the gradient."""
        return Needs(window=ALL if self.weights[1] else 2, columns=True)

    # ---- the rate rule -----------------------------------------------------------------------------------------

    def kept(self, seen: int, load: float = 0.0) -> int:
        """Tokens kept of `seen`: max(m, floor((1 - r) seen)) with r = min(base + a load, r_max), base = 1 - budget.

        Args:
            load: share of `capacity` in use. A base rate above `most` stays as it is.
        """
        if not seen:  # a row that has not begun
            return 0
        base = 1 - (self.budget.fraction or min(1.0, self.budget.tokens / seen))
        rate = max(base, min(base + self.pressure * load, self.most))
        count = self.budget if rate == base else Budget(fraction=1 - rate)
        return min(seen, max(self.least, count.count(seen)))

    def _limits(self, layer: Layer) -> torch.Tensor:
        """Tokens that each row may hold now, int64 [batch, 1]. What was dropped cannot return, so a load that fell is
        taken at its highest."""
        loads = torch.zeros(len(layer.real_seen))
        if self.capacity is not None:
            now = torch.full((len(loads), 1, 1), layer.context.kv_bytes() / self.capacity)
            highest = torch.maximum(now, layer.statistics.get(LOAD, now).cpu())
            layer.statistics[LOAD] = highest.to(layer.device)
            loads = highest[:, 0, 0]
        pairs = zip(layer.real_seen.tolist(), loads.tolist(), strict=True)
        return torch.tensor([[self.kept(seen, load)] for seen, load in pairs])

    @property
    def _keeps_all(self) -> bool:
        return self.budget.is_full and self.capacity is None

    # ---- importance --------------------------------------------------------------------------------------------

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Weighted sum of attention, entropy and gradient, each in [0, 1]: fp32 [batch, kv_heads, n]."""
        return self._importance(self._look(held, evidence, None), held.positions, torch.tensor([keep]))

    def _look(self, held: Stored, evidence: Evidence, previous: torch.Tensor | None) -> Terms:
        """The terms of tokens without holes; the last of `evidence.queries` are those of the last tokens.

        Args:
            previous: output of the query before the block, for a block of one token.
        """
        queries = evidence.queries[:, :, -held.keys.shape[2] :]
        entropy = torch.zeros_like(evidence.columns)
        if self.weights[1]:
            entropy[..., -queries.shape[2] :] = row_entropy(queries, held.keys, evidence.softmax)
        gradient = torch.zeros_like(entropy)
        how = evidence.softmax
        row, output = look_once(queries[:, :, -1], held.keys, held.values, how)
        if queries.shape[2] > 1:
            before = held.keys[:, :, :-1], held.values[:, :, :-1]
            previous = look_once(queries[:, :, -2], *before, how)[1]
        if previous is not None:
            slope = capped_slope(queries[:, :, -1], held.keys, how)
            gradient = output_gradient(row, output, previous, queries[:, :, -1], held.values, how.scale, slope)
        return Terms(evidence.columns, entropy, gradient, output)

    def _importance(self, terms: Terms, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the terms, each brought to [0, 1] over a head's (or the layer's) tokens; see `protect`."""
        real = positions >= 0
        total = torch.zeros_like(terms.attention)
        for weight, term in zip(self.weights, (terms.attention, terms.entropy, terms.gradient), strict=True):
            # Before the scaling: the mean of scaled heads would let an even head count as much as a sharp one.
            if self.heads == "shared":
                term = term.mean(1, keepdim=True).expand(positions.shape)
            total = total + weight * unit(term, real)
        sinks, recent = (keep // 4).clamp(max=self.sinks), (keep // 2).clamp(max=self.recent)
        return protect(unit(total, real), positions, sinks, recent)

    # ---- when --------------------------------------------------------------------------------------------------

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Add the block's attention, entropies and gradient to what is known of the tokens, then cut."""
        if self._keeps_all:
            return
        limits = self._limits(layer)
        held, previous = layer.stored(), self._previous(layer)
        attention, entropy = accumulate(layer, ATTENTION, evidence.columns), layer.statistic(ENTROPY)
        gradient, outputs, visible = torch.zeros_like(entropy), [], evidence.visible(held.positions)
        for row in range(len(held.positions)):
            queries, one = evidence.queries_of(row), slice(row, row + 1)
            if not queries.shape[2]:  # padding alone came
                shape = (1, held.keys.shape[1], -1, layer.head_dim)
                outputs.append(
                    evidence.queries.new_zeros(evidence.queries.shape[1], layer.head_dim).view(shape).float()
                    if previous is None
                    else previous[one]
                )
                continue
            slots = real_slots(visible[row, 0])
            part = Stored(*(x[one, :, slots] for x in (held.keys, held.values, held.positions)))
            how = evidence.softmax.options
            seen = Evidence(queries, tokens=evidence.tokens[one], columns=evidence.columns[one, :, slots], **how)
            terms = self._look(part, seen, None if previous is None else previous[one])
            # Tokens of earlier blocks keep the entropy that they had as queries.
            entropy[row][:, slots] += terms.entropy[0]
            gradient[row][:, slots] = terms.gradient[0]
            outputs.append(terms.output)
        self._settle(layer, Terms(attention, entropy, gradient, torch.cat(outputs)), limits)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """The same for one decoded token."""
        if self._keeps_all:
            return
        limits = self._limits(layer)
        held, previous = layer.stored(), self._previous(layer)
        real = held.positions >= 0
        row = attention_row(layer, query).unflatten(1, (held.keys.shape[1], -1))
        # A hole may hold NaN, and 0 * NaN is NaN.
        values = held.values.float().masked_fill(~real[..., None], 0)
        output = row @ values
        attention, entropy = accumulate(layer, ATTENTION, row.mean(2)), layer.statistic(ENTROPY)
        visible = real.sum(-1).clamp(min=2)
        # Rows that hold fewer tokens than others have their holes behind these.
        newest, own = held.positions.argmax(-1, keepdim=True), torch.special.entr(row).sum(-1).mean(2) / visible.log()
        if layer.came is not None:  # where nothing came, nothing is known anew
            came = (layer.came > 0).to(own.device)[:, None, None]
            own = own[..., None].where(came, entropy.gather(-1, newest))[..., 0]
            output = output if previous is None else output.where(came[..., None], previous)
        entropy.scatter_(-1, newest, own[..., None])
        gradient = torch.zeros_like(entropy)
        if previous is not None:
            keys = held.keys.masked_fill(~real[..., None], 0) if layer.softmax.softcap else held.keys
            slope = capped_slope(query[:, :, 0], keys, layer.softmax)
            gradient = output_gradient(row, output, previous, query[:, :, 0], values, layer.softmax.scale, slope)
        self._settle(layer, Terms(attention, entropy, gradient, output), limits)

    def _settle(self, layer: Layer, terms: Terms, limits: torch.Tensor) -> None:
        """Drops what is above the limits, and puts down what the next step needs."""
        layer.statistics[ENTROPY] = terms.entropy
        # Out of the layer while tokens move: it belongs to a row and to no token.
        load = layer.statistics.pop(LOAD, None)
        if bool((layer.lengths().amax(1, keepdim=True) > limits).any()):
            positions = layer.stored().positions
            keep_best(layer, self._importance(terms, positions, limits[:, 0]), limits)
        if load is not None:
            layer.statistics[LOAD] = load
        if self.weights[2]:
            layer.statistics[OUTPUT] = terms.output.flatten(2)

    def _previous(self, layer: Layer) -> torch.Tensor | None:
        """Output of the last query before this step [batch, kv_heads, group, head_dim], taken out of the layer."""
        known = layer.statistics.pop(OUTPUT, None)
        return None if known is None else known.unflatten(2, (-1, layer.head_dim))


def real_slots(real: torch.Tensor) -> slice | torch.Tensor:
    """Index of the slots at which bool [n] is True: a slice if all are, because indexing by a mask would copy."""
    return slice(None) if bool(real.all()) else real


def unit(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Brings [.., n] linearly to [0, 1] over the slots that are `real`; equal numbers become 0."""
    low = x.masked_fill(~real, float("inf")).amin(-1, keepdim=True)
    high = x.masked_fill(~real, float("-inf")).amax(-1, keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def row_entropy(queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Entropy of each query's attention over the log of the keys it sees: fp32 [batch, kv_heads, m], mean over heads.

    In [0, 1], 0 where only one key is seen. The m x n matrix is never held.

    Args:
        queries: [batch, heads, m, head_dim] of the last m of the keys [batch, kv_heads, n, head_dim].
    """
    kv_heads, n, m = keys.shape[1], keys.shape[2], queries.shape[2]
    if softmax.softcap is None:
        found = _entropy_by_attention(queries, keys, softmax)
    else:
        found = _entropy_by_rows(queries, keys, softmax)
    visible = torch.arange(n - m + 1, n + 1, device=keys.device)
    return found.unflatten(1, (kv_heads, -1)).mean(2) / visible.clamp(min=2).log()


def _entropy_by_attention(queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Without a table of weights p: H = lse - sum_j p_j s_j, and as s_j = scale q . k_j, the sum is q times what
    attention gives when the keys are its values too. Beside a sink the weights are part * p."""
    q, k = queries.float(), keys.float()
    mean_key, lse = decode_attention(q, k, k, scale=softmax.scale, causal=True)
    entropy = (lse - softmax.scale * (q * mean_key).sum(-1)).clamp(min=0)  # a sharp row's may fall a rounding below
    if softmax.sinks is None:
        return entropy
    part = (lse - softmax.sinks.float()[:, None]).sigmoid()
    return part * entropy + torch.special.entr(part)


def _entropy_by_rows(queries: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """From the weights themselves, in tiles: capped scores are no longer linear in the keys."""
    kv_heads, n, m = keys.shape[1], keys.shape[2], queries.shape[2]
    grouped = queries.unflatten(1, (kv_heads, -1)).float()
    rows = max(1, _TILE // (queries.shape[0] * queries.shape[1] * n))
    out = []
    for low in range(0, m, rows):
        tile = grouped[..., low : low + rows, :]
        end = n - m + low + tile.shape[-2]
        unseen = torch.ones(tile.shape[-2], end, dtype=torch.bool, device=keys.device).triu_(n - m + low + 1)
        scores = softmax.scores(tile @ keys[:, :, None, :end].float().mT).masked_fill_(unseen, float("-inf"))
        out.append(torch.special.entr(softmax.weights(scores)).sum(-1))
    return torch.cat(out, -1).flatten(1, 2)


def look_once(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: Softmax
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query [batch, heads, head_dim] to all keys: fp32 row [batch, kv_heads, group, n] and output."""
    scores = softmax.scores(_products(query, keys))
    row = softmax.weights(scores[..., None, :])[..., 0, :]
    return row, row @ values.float()


def capped_slope(query: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor | None:
    """How much of a change of each score a soft cap lets through: fp32 [batch, kv_heads, group, n], None without cap.

    Args:
        query: [batch, heads, head_dim].
    """
    if softmax.softcap is None:
        return None
    return 1 - (softmax.scores(_products(query, keys)) / softmax.softcap).square()


def _products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q . k, fp32 [batch, kv_heads, group, n], of one query [batch, heads, head_dim]."""
    return query.unflatten(1, (keys.shape[1], -1)).float() @ keys.float().mT


def output_gradient(
    row: torch.Tensor,
    output: torch.Tensor,
    previous: torch.Tensor,
    query: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """|dloss/dk|_1 + |dloss/dv|_1 of each token, loss = mean squared change of the output: fp32 [batch, kv_heads, n].

    With row p, output o and g = dloss/do: dv_j = p_j g and dk_j = p_j (g . (v_j - o)) q scale. Summed over the query
    heads of each group, as if each had keys and values of its own.

    Args:
        row: [batch, kv_heads, group, n].
        output, previous: [batch, kv_heads, group, head_dim].
        query: [batch, heads, head_dim].
        values: [batch, kv_heads, n, head_dim].
        slope: see `capped_slope`.
    """
    g = 2 * (output - previous) / output[0].numel()
    toward = g @ values.float().mT - (g * output).sum(-1, keepdim=True)
    toward = toward if slope is None else toward * slope
    reach = query.unflatten(1, (row.shape[1], -1)).float().abs().sum(-1, keepdim=True) * scale
    return (row * (g.abs().sum(-1, keepdim=True) + toward.abs() * reach)).sum(2)
