"""TriAttention: what queries to come will look at, told without a query (arXiv 2604.04921).

Before the rotary embedding, the queries of a head lie around a centre that hardly depends on the text. So the logit
that a stored key may expect from later queries follows from the key, the distance and the centre alone:

    trig(k) = mean over offsets d of <R(t + d) E q, k>          norm(k) = sum_f (E|q_f| - |E q_f|) |k_f|

t is the next position, f runs over the pairs of channels that RoPE turns together, k is the key as it is stored: the
turned centre meets the turned key, so nothing is turned back and no position of a key is asked for. Every `interval`
decoded tokens all stored tokens are scored by trig + norm and the best stay.

    python -m textkv.tri_attention calibrate --model FOLDER --text FILE     # writes FOLDER/tri_attention.safetensors
    MethodCache(model, "tri_attention(centres='FOLDER')", "2048t")

Without a calibration the centres are those of the prompt's own queries, kept in the cache: one vector for each query
head, and for each row its own.

Where we differ from the authors' code: centres include any norm of queries; channels that do not turn (partial rotary)
add their part of the dot product, where theirs pairs them with others; the prompt competes and is cut too, unless
`pin_prompt`, under which theirs, if the prompt fills the budget, drops all that is newer and we refuse; ties go to the
lower index and not by noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from textkv.contents import OF_HEAD
from textkv.context import Context
from textkv.decode_eviction import accumulate
from textkv.eviction import PROTECTED, keep_best
from textkv.evidence import Evidence, Needs, QueryCentres
from textkv.interval_eviction import IntervalEviction
from textkv.layer import Layer
from textkv.method import register
from textkv.positions import RotarySpec
from textkv.segments.base import Stored
from textkv.tri_attention.centres import COMMAND, Centres

QUERIES = OF_HEAD + "tri_attention.queries"
"""Statistic per row, fp32 [batch, heads, head_dim + R / 2 + 1]: mean, lengths and count of all prompts' queries."""
SHIFT = OF_HEAD + "tri_attention.shift"
"""Statistic per row, int64 [batch, 1, 1]: by how much the newest token's rotary position exceeds its index."""
PIN = "tri_attention.prompt"
"""Statistic per stored token: 1 for tokens of a prompt, under `pin_prompt`."""
_BLOCK = 4096  # keys scored at a time: their fp32 copy is this long
_LEAST = 1e-6  # of a spread that scores are divided by


@register("tri_attention")
@dataclass(frozen=True)
class TriAttention(IntervalEviction):
    """Cuts at the end of each prompt block, and each time `interval` decoded tokens have come on top of the budget.

    Attributes:
        centres: "prompt" (its own queries), "mini" (the embedded text model's), or a file or folder of a calibration.
        mode: "per_layer_perhead", each KV head chooses for itself; "per_head" (the paper's runs), each KV head keeps
            the same tokens in all layers, by the mean of its scores there; "union", one choice for the whole model, by
            the highest score of any head. The last two need all layers together and give a wrapper no scores.
        group: how the query heads of a KV head share it: "max" (all modes of the paper) or "mean" (the first mode).
        sinks: first tokens that always stay; 4, as ports of the method have it. The authors pin the whole prompt.
        window: newest tokens that always stay; 0 in the authors' code, 128 in ports.
        pin_prompt: prompts stay as they are and only decoded tokens compete. Needs a budget in tokens beyond them.
        offsets: distances looked ahead, 1, 2, 4 .. 2^(offsets - 1); 17 in the authors' code.
        over: "mean" over the offsets or "max".
        normalise: whether each query head's scores are brought to mean 0 and spread 1 before heads are compared.
        trig: whether `trig` counts; False is an ablation of the authors.
        mlr: whether lengths weigh as the part of the queries that the centre leaves out; False = by E|q_f|, another.
    """

    centres: str = "prompt"
    mode: Literal["per_layer_perhead", "per_head", "union"] = "per_layer_perhead"
    group: Literal["max", "mean"] = "max"
    sinks: int = 4
    window: int = 0
    pin_prompt: bool = False
    offsets: int = 17
    over: Literal["mean", "max"] = "mean"
    normalise: bool = True
    trig: bool = True
    mlr: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()
        if self.together or self.pin_prompt:
            object.__setattr__(self, "capabilities", replace(self.capabilities, scores=False))
        # Read once, here, so that a wrong file is told before a model runs. Not a field: the path is what is saved.
        object.__setattr__(self, "_given", None if self.centres == "prompt" else Centres.load(self.centres))

    def _check(self) -> None:
        known = {
            "mode": ("per_layer_perhead", "per_head", "union"), "group": ("max", "mean"), "over": ("mean", "max"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(values)}")
        if min(self.sinks, self.window) < 0:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: neither may be negative; 0 protects none")
        if not 1 <= self.offsets <= 24:
            raise ValueError(f"offsets={self.offsets}: 1 to 24 powers of two; the authors use 17, up to 65,536")
        if self.group == "mean" and self.together:
            raise ValueError(f"group='mean' with mode={self.mode!r}: this mode takes the maximum of a group; use 'max'")
        if self.pin_prompt and self.budget.tokens is None and not self.budget.is_full:
            raise ValueError(
                f"pin_prompt=True with budget={self.budget}: a prompt is larger than any share of itself; give a "
                'budget in tokens, such as "2048t"'
            )

    @property
    def together(self) -> bool:
        """Whether all layers are judged together."""
        return self.mode != "per_layer_perhead"

    def needs(self) -> Needs:
        """How keys turn; without a calibration also where the prompt's queries lie."""
        return Needs(rope=True, query_centres=self._given is None)

    # ---- the score ---------------------------------------------------------------------------------------------

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The group's highest (or mean) rating of each key, brought to one scale; what must stay is PROTECTED."""
        n, kv_heads = held.positions.shape[-1], held.keys.shape[1]
        window = min(self.window, keep - 1)
        guarded = held.positions < min(self.sinks, keep - 1 - window)
        guarded = guarded | (torch.arange(n, device=guarded.device) >= n - window)
        if evidence.statistic is not None:
            guarded = guarded | (evidence.statistic > 0)
        ratings = self._rate(held.keys, self._centres(layer, evidence), _next(evidence), layer.rotary)
        ratings = ratings.unflatten(1, (kv_heads, -1))
        if self.normalise:
            ratings = standardised(ratings, ~guarded[:, :, None])
        shared = ratings.amax(2) if self.group == "max" else ratings.mean(2)
        return shared.masked_fill(guarded, PROTECTED)

    def _rate(self, keys: torch.Tensor, centres: QueryCentres, at: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
        """trig + norm of each query head, fp32 [batch, heads, n].

        Args:
            keys: [batch, kv_heads, n, head_dim], as they are stored.
            at: int64 [batch], the next rotary position.
        """
        kv_heads = keys.shape[1]
        ahead = turned_ahead(centres.mean, at, self.offsets, rotary)
        # The mean of the products is the product with the mean: one vector for each query head.
        ahead = ahead.mean(2, keepdim=True) if self.over == "mean" else ahead
        ahead = ahead.unflatten(1, (kv_heads, -1))
        weights = centres.lengths - rotary.lengths(centres.mean) if self.mlr else centres.lengths
        weights = weights.unflatten(1, (kv_heads, -1))
        parts = []
        for part in keys.split(_BLOCK, 2):
            k = part.float()
            rated = weights @ rotary.lengths(k).mT
            if self.trig:
                rated = rated + (ahead @ k[:, :, None].mT).amax(3)
            parts.append(rated)
        return torch.cat(parts, -1).flatten(1, 2)

    def _centres(self, layer: Layer, evidence: Evidence) -> QueryCentres:
        """The centres of the query heads that the evidence is of."""
        if self._given is None:
            return evidence.centres
        size = evidence.queries.shape[1]
        given = self._fitting(layer, size if evidence.head is None else size * layer.kv_heads)
        if evidence.head is not None:
            given = given.part(slice(None), slice(evidence.head * size, (evidence.head + 1) * size))
        device = evidence.queries.device
        return QueryCentres(given.count.to(device), given.mean.to(device), given.lengths.to(device))

    def _fitting(self, layer: Layer, heads: int | None) -> QueryCentres:
        """The calibration of a layer.

        Args:
            heads: query heads of the layer; None = not known yet.

        Raises:
            ValueError: it is of another model.
        """
        given, pairs = self._given.layers.get(layer.kind.number), layer.rotary.inv_freq.numel()
        found = None if given is None else (*given.mean.shape[1:], given.lengths.shape[2])
        wanted = (found[0] if found and heads is None else heads, layer.head_dim, pairs)
        if found == wanted:
            return given
        told = "nothing" if found is None else f"(heads, head_dim, pairs) = {found}"
        raise ValueError(
            f"centres={self.centres!r} holds {told} for layer {layer.kind.number}, the model has "
            f"{(heads or '?', layer.head_dim, pairs)}; make them for this model with `{COMMAND}`"
        )

    # ---- when --------------------------------------------------------------------------------------------------

    def on_start(self, layer: Layer) -> None:
        """Check the calibration against the model, as far as a layer is known before it attends.

        Raises:
            ValueError: it is of another model.
        """
        if self._given is not None:
            self._fitting(layer, None)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Add the block's queries to what is known of them, then cut: now, or when all layers are through."""
        if self.budget.is_full:
            return
        self._remember(layer, evidence)
        if self.together:
            self.note_base(layer, evidence)
            return
        known = self.recall(layer, evidence.queries)
        super().on_prefill_end(layer, replace(evidence, centres=known.centres, statistic=known.statistic))

    def on_finish(self, context: Context) -> None:
        """A prompt block is through all layers: cut them together."""
        if not self.together or self.budget.is_full:
            return
        lengths = context.layers[0].lengths().amax(1)
        counts = torch.minimum(lengths, self._limits(context.layers[0]))
        if bool((counts < lengths).any()):
            self._cut_together(context.layers, counts)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Have a round, or, where all layers are judged together, one when the last has its token."""
        if not self.together or layer is layer.context.layers[-1]:
            super().on_decode_end(layer, query)

    def cut(self, layer: Layer, query: torch.Tensor, counts: torch.Tensor) -> None:
        """One round of this layer, or of all together; see `IntervalEviction`."""
        if self.together:
            self._cut_together(layer.context.layers, counts)
        else:
            super().cut(layer, query, counts)

    def _cut_together(self, layers: list[Layer], counts: torch.Tensor) -> None:
        """Keeps the `counts` best tokens of each row, int64 [batch] on the CPU, the same in all layers.

        Raises:
            ValueError: layers with different numbers of KV heads under mode="per_head".
        """
        device = layers[0].device
        scores = [self.scores(x, self.recall(x), counts.tolist()).to(device) for x in layers]
        if self.mode == "union":
            # The best of any head's own best are the best by the maximum over all heads: no head has to nominate.
            shared = torch.stack([x.amax(1, keepdim=True) for x in scores]).amax(0)
        elif len({x.shape[1] for x in scores}) == 1:
            shared = torch.stack(scores).mean(0)
        else:
            heads = sorted({x.shape[1] for x in scores})
            raise ValueError(f"mode='per_head': layers have {heads} KV heads, which cannot be paired; use mode='union'")
        for layer in layers:
            keep_best(layer, shared.to(layer.device).expand(-1, layer.kv_heads, -1), counts[:, None])

    # ---- what is put down --------------------------------------------------------------------------------------

    def _remember(self, layer: Layer, evidence: Evidence) -> None:
        """Puts down where the prompt's queries lie, how far rotary positions are ahead, and what is pinned."""
        if self._given is None:
            new = evidence.centres
            if QUERIES in layer.statistics:
                new = _unpacked(layer.statistics[QUERIES], layer.head_dim) + new
            layer.statistics[QUERIES] = _packed(new)
        logical = evidence.norm_positions
        last = logical.argmax(1, keepdim=True)
        shift = (evidence.rope_positions - logical).gather(1, last)[..., None].long()
        idle = (logical.amax(1) < 0)[:, None, None]  # a row that got only padding knows nothing new
        known = layer.statistics.get(SHIFT, torch.zeros_like(shift))
        layer.statistics[SHIFT] = torch.where(idle, known, shift)
        if self.pin_prompt:
            self._pin(layer, evidence)

    def _pin(self, layer: Layer, evidence: Evidence) -> None:
        came = evidence.rope_positions.shape[1] if evidence.came is None else evidence.came
        before = (evidence.tokens - came).to(layer.device).view(-1, 1, 1)
        pinned = accumulate(layer, PIN, (layer.held_positions() >= before).float())
        most, budget = int((pinned > 0).sum(-1).max()), self.budget.tokens
        if most + self.window >= budget:
            raise ValueError(
                f"layer {layer.index}: a pinned prompt of {most} tokens and window={self.window} leave nothing to "
                f"choose in a budget of {budget} tokens; use {most + self.window + 1}t or more, or pin_prompt=False"
            )

    def recall(self, layer: Layer, query: torch.Tensor | None = None) -> Evidence:
        """What is put down about a layer, as evidence; see `IntervalEviction`. Nothing of the query is used.

        Raises:
            ValueError: centres="prompt", and the layer has seen no prompt end (it was frozen).
        """
        if self._given is not None:
            centres = self._given.layers[layer.kind.number]
        elif QUERIES in layer.statistics:
            centres = _unpacked(layer.statistics[QUERIES], layer.head_dim)
        else:
            raise ValueError(
                f"layer {layer.index}: centres='prompt' has seen no prompt end in this cache (was it frozen?); give a "
                f"calibration instead, made by `{COMMAND}`"
            )
        newest = layer.real_seen.to(layer.device)[:, None] - 1
        shift = layer.statistics.get(SHIFT)
        return Evidence(
            # No query: only how many heads there are is read off.
            torch.zeros(len(newest), centres.mean.shape[1], 0, layer.head_dim, device=layer.device),
            layer.softmax.scale,
            layer.real_seen,
            norm_positions=newest,
            rope_positions=newest if shift is None else newest + shift[:, 0],
            centres=centres if self._given is None else None,
            statistic=layer.statistic(PIN) if self.pin_prompt else None,
        )


def _packed(centres: QueryCentres) -> torch.Tensor:
    """Centres as one mark, fp32 [batch, heads, head_dim + R / 2 + 1]: rows of a batch move it as they move."""
    count = centres.count[:, None, None].expand(*centres.mean.shape[:2], 1)
    return torch.cat([centres.mean, centres.lengths, count], -1)


def _unpacked(mark: torch.Tensor, head_dim: int) -> QueryCentres:
    """The centres that were `_packed`."""
    return QueryCentres(mark[:, 0, -1], mark[..., :head_dim], mark[..., head_dim:-1])


def _next(evidence: Evidence) -> torch.Tensor:
    """The rotary position behind the newest token of each row, int64 [batch]."""
    last = evidence.norm_positions.argmax(1, keepdim=True)
    return evidence.rope_positions.gather(1, last)[:, 0].long() + 1


def turned_ahead(mean: torch.Tensor, at: torch.Tensor, offsets: int, rotary: RotarySpec) -> torch.Tensor:
    """Centres [batch or 1, heads, head_dim] as queries at positions at + 1, at + 2, at + 4 ..: fp32 [batch, heads,
    offsets, head_dim]. Channels that do not turn stay.

    Args:
        at: int64 [batch].
    """
    positions = at[:, None] + 2 ** torch.arange(offsets, device=at.device)
    inv_freq, first, second = (x.to(at.device) for x in (rotary.inv_freq, rotary.first, rotary.second))
    # In double: at position 65,536 a product of single precision is off by a hundredth of a radian.
    angle = positions[:, None, :, None].double() * inv_freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    x, y = mean[..., None, first], mean[..., None, second]
    out = mean[:, :, None].expand(len(at), -1, offsets, -1).clone()
    out[..., first], out[..., second] = x * cos - y * sin, y * cos + x * sin
    return out


def standardised(x: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """x [.., n] less its mean, over its spread, both over the tokens where `among` (broadcastable bool) is True."""
    count = among.sum(-1, keepdim=True).clamp(min=1)
    centred = x - x.masked_fill(~among, 0).sum(-1, keepdim=True) / count
    spread = (centred.square().masked_fill(~among, 0).sum(-1, keepdim=True) / count).sqrt()
    return centred / spread.clamp(min=_LEAST)
