"""DuoAttention: some KV heads keep the whole context, all others only sinks and a recent window (arXiv 2410.10819).

Which heads need everything is a property of the model, learned once and kept in a pattern file:

    python -m textkv.methods.duo_attention identify --model FOLDER      # writes FOLDER/duo_attention.json
    MethodCache(model, "duo_attention(pattern='FOLDER', sparsity=0.5)")

Keys stay at their positions. Streaming heads read each forward of several tokens densely on top of what they hold, as
the authors' code does, so a prompt in one forward is exact. The authors permute the weights until full heads lie
together and split at a quantile of noisy gates; we pick heads by index and take an exact number of them, ties by seed.

Without a pattern the prompt itself decides, by the training-free head score of NVIDIA's kvpress (`duo.far_score`) on
the prompt's own queries and keys, where theirs averages over fifty books. For models whose keys cannot be turned back
there is `ranking="last_queries"`: the attention that the prompt's end pays to what a streaming head would have dropped.
It misses heads that fetch what an answer needs and look at nothing far before it is asked for.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from textkv.collector import rope_of
from textkv.context import Context
from textkv.duo.far_score import far_score
from textkv.duo.pattern import Pattern, full_heads
from textkv.eviction import NEVER
from textkv.evidence import Evidence, Needs
from textkv.kernels import window_mass
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.scores import group_mean
from textkv.segments.dense import DenseSegment
from textkv.segments.split import ChunkedRing, Part, SplitSegment, dense_part, ring_part

# `python -m` warns about a module that its package has imported already, unless the module looks like a package.
__path__: list[str] = []


@dataclass(frozen=True)
class Sizes:
    """What one row keeps: `full` heads of the whole model keep everything, the others `sinks` + `recent` tokens."""

    full: int
    sinks: int
    recent: int


@register("duo_attention")
@dataclass(frozen=True)
class DuoAttention(Method):
    """Full and streaming heads; streaming heads go on evicting while decoding.

    How many heads are full follows from `sparsity`, or else from the budget, a mean over all heads and layers: at the
    prompt's end as many as leave the streaming heads their window. A window larger than a quarter of the budget shrinks
    towards that quarter, sinks and recent tokens alike. A share of the budget fixes the heads at the first prompt; a
    budget in tokens turns more of them to streaming in later turns.

    Attributes:
        pattern: file or folder with the gates, "mini" or "smollm2" for those of these models; None = the prompt
            decides.
        sparsity: share of heads that stream. The paper uses 0.5 with grouped queries, 0.75 without; None = by budget.
        sinks: first tokens that a streaming head keeps; 64 in the paper's long-context runs, 16 nearly as good.
        recent: last tokens that a streaming head keeps; 256 there, 64 nearly as good.
        prefill: "full_then_trim" frees bytes when a prompt block ends; "chunks" after every chunk of an announced block
            too (the paper; needs `pattern` and `sparsity`).
        ranking: "mean_qk" or "last_queries", what ranks the heads where there is no pattern.
        window: last queries of the prompt that "last_queries" goes by.
        seed: breaks ties between gates.
    """

    pattern: str | None = None
    sparsity: float | None = None
    sinks: int = 64
    recent: int = 256
    prefill: Literal["full_then_trim", "chunks"] = "full_then_trim"
    ranking: Literal["mean_qk", "last_queries"] = "mean_qk"
    window: int = 32
    seed: int = 0

    capabilities: ClassVar[Capabilities] = Capabilities(
        per_head=True, decode_eviction=True, crop=False, whole_heads=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.sinks, self.recent, self.window) < 1:
            raise ValueError(
                f"sinks={self.sinks}, recent={self.recent}, window={self.window}: each needs at least 1 token"
            )
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity}: a share of heads lies in [0, 1]; use e.g. 0.5")
        if self.sparsity is not None and not self.budget.is_full:
            raise ValueError(f"sparsity={self.sparsity} and budget={self.budget} both say how much to keep; give one")
        if self.prefill not in ("full_then_trim", "chunks"):
            raise ValueError(f"prefill={self.prefill!r}: use 'full_then_trim' or 'chunks'")
        if self.ranking not in ("mean_qk", "last_queries"):
            raise ValueError(f"ranking={self.ranking!r}: use 'mean_qk' or 'last_queries'")
        if self.prefill == "chunks" and (self.pattern is None or self.sparsity is None):
            raise ValueError("prefill='chunks' divides the heads before the prompt: give pattern=... and sparsity=...")
        # Read once, here, so that a wrong file is told before a model runs. Not a field: the path is what is saved.
        object.__setattr__(self, "_gates", Pattern.load(self.pattern).gates if self.pattern is not None else None)

    def needs(self) -> Needs:
        """What ranks the heads where no pattern does: the mean of the prompt's queries, or its last ones."""
        if not self._ranks:
            return Needs()
        return Needs(rope=True, query_centres=True) if self.ranking == "mean_qk" else Needs(window=self.window)

    def sizes(self, seen: int, heads: int) -> Sizes:
        """What a row of `seen` tokens keeps in a model of `heads` KV heads over all layers."""
        if self.sparsity is not None:
            # Half goes up: Python's own round makes 2 of 2.5 and 4 of 3.5.
            return Sizes(heads - math.floor(self.sparsity * heads + 0.5), self.sinks, self.recent)
        keep, whole = self.budget.count(seen), self.sinks + self.recent
        if keep == seen:
            return Sizes(heads, self.sinks, self.recent)
        # As many full heads as leave the streaming ones this much; what does not make a full head widens the window.
        least = min(whole, max(1, keep // 4))
        full = heads * (keep - least) // (seen - least)
        window = min(whole, (heads * keep - full * seen) // (heads - full))
        sinks = window * self.sinks // whole
        return Sizes(full, sinks, window - sinks)

    def on_start(self, layer: Layer) -> None:
        """Check the pattern against the model; with prefill="chunks" divide the heads before the first token.

        Raises:
            ValueError: the pattern is of another shape than the model.
        """
        if self._gates is None:
            return
        shape = (layer.context.governed, layer.kv_heads)
        if tuple(self._gates.shape) != shape:
            raise ValueError(
                f"pattern {self.pattern!r} holds gates of {tuple(self._gates.shape)} (layers, KV heads), the model has "
                f"{shape}; identify the heads of this model"
            )
        if self.prefill == "chunks":
            sizes = [self.sizes(0, self._gates.numel())] * len(layer.real_seen)
            layer.segments = [_split(layer, self._by_pattern(layer, sizes), sizes)]

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Divide the heads: by the pattern now, or by the prompt when all layers are through."""
        stays = self._stays(layer, evidence)
        if bool(stays.all()):
            return
        heads = layer.context.governed * layer.kv_heads
        sizes = [self.sizes(int(seen), heads) for seen in evidence.tokens]
        if all(row.full == heads for row in sizes):
            return
        if self._gates is None:
            layer.notes["duo_attention"] = self._rated(layer, evidence, sizes), sizes, stays
        else:
            layer.replace([_split(layer, self._by_pattern(layer, sizes), sizes, stays)])

    def _stays(self, layer: Layer, evidence: Evidence) -> torch.Tensor:
        """Rows that the block leaves divided as they are, bool [batch] on the CPU: those to which nothing came, and,
        once divided, all those with a share. It was taken of a row's first prompt; only a budget in tokens has
        something to say in later turns."""
        stays = torch.zeros(len(layer.real_seen), dtype=torch.bool) if evidence.came is None else evidence.came == 0
        if self.budget.tokens is not None or not isinstance(layer.segments[0], SplitSegment):
            return stays
        begins = self.prefill == "full_then_trim" and evidence.came is not None
        return stays | (evidence.tokens > evidence.came) if begins else torch.ones_like(stays)

    def on_finish(self, context: Context) -> None:
        """Without a pattern: rank all heads of the model by how far they look, and divide every layer."""
        notes = [layer.notes.pop("duo_attention", None) for layer in context.layers]
        if None in notes:
            return
        scores, (_, sizes, stays) = torch.stack([far for far, *_ in notes], 1), notes[0]
        # Ranked over the whole model, as the gates' quantile is: a layer may get no full head, or nothing else.
        full = torch.stack([full_heads(row, n.full, self.seed) for row, n in zip(scores, sizes, strict=True)])
        for layer in context.layers:
            layer.replace([_split(layer, full[:, layer.index], sizes, stays)])

    def _rated(self, layer: Layer, evidence: Evidence, sizes: list[Sizes]) -> torch.Tensor:
        """What ranks this layer's heads, fp32 [batch, kv_heads] on the CPU; none does where all of them stream."""
        if not self._ranks:
            return torch.zeros(len(sizes), layer.kv_heads)
        return _far_scores(layer, evidence) if self.ranking == "mean_qk" else _far_mass(layer, evidence, sizes)

    @property
    def _ranks(self) -> bool:
        """Whether the prompt ranks the heads: no pattern does, and some of them stream while others do not."""
        some = not self.budget.is_full if self.sparsity is None else 0 < self.sparsity < 1
        return self.pattern is None and some

    def _by_pattern(self, layer: Layer, sizes: list[Sizes]) -> torch.Tensor:
        return torch.stack([full_heads(self._gates, row.full, self.seed)[layer.index] for row in sizes])


def _full_now(layer: Layer) -> torch.Tensor:
    """Which heads still hold everything: bool [batch, kv_heads] on the CPU."""
    segment, rows = layer.segments[0], len(layer.real_seen)
    if not isinstance(segment, SplitSegment):
        return torch.ones(rows, layer.kv_heads, dtype=torch.bool)
    full = torch.zeros(rows, layer.kv_heads, dtype=torch.bool)
    for part in segment.parts:
        full[part.row.cpu(), part.head.cpu()] = not isinstance(part.segment, ChunkedRing)
    return full


def _window_now(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and recent tokens of each row's streaming heads, int64 [batch] on the CPU; 0 where a row has none."""
    sinks, recent = torch.zeros(2, len(layer.real_seen), dtype=torch.int64)
    parts = layer.segments[0].parts if isinstance(layer.segments[0], SplitSegment) else []
    for part in parts:
        if isinstance(part.segment, ChunkedRing):
            sinks[part.row.cpu()], recent[part.row.cpu()] = part.segment.sinks, part.segment.recent.cpu()
    return sinks, recent


def _far_scores(layer: Layer, evidence: Evidence) -> torch.Tensor:
    """How far back each head's mean query of the block would look among its mean keys: fp32 [batch, kv_heads] in 0..1,
    on the CPU; 0 in a row to which the block brought nothing. A head that streams already has NEVER.
    """
    full, held = _full_now(layer), layer.stored()
    scores = torch.full(full.shape, NEVER).masked_fill(full, 0)
    # Heads that keep everything hold the same tokens.
    at = held.positions[torch.arange(len(full)), full.int().argmax(1)]
    rope, known = rope_of(at, evidence), evidence.norm_positions
    for row in range(len(full)):
        real = known[row][known[row] >= 0]
        if not (bool(full[row].any()) and len(real)):
            continue
        heads = full[row].nonzero()[:, 0].to(layer.device)
        slots = (at[row] >= real[0]).nonzero()[:, 0]
        keys = held.keys[row, heads][None, :, slots].float()
        mean = layer.rotary.turn(keys, -rope[row, slots][None]).mean(2)[0]
        queries = evidence.centres.mean[row].unflatten(0, (layer.kv_heads, -1))[heads].flatten(0, 1)
        scores[row, full[row]] = far_score(queries, mean, layer.rotary, evidence.scale).cpu()
    return scores


def _far_mass(layer: Layer, evidence: Evidence, sizes: list[Sizes]) -> torch.Tensor:
    """Attention of the prompt's last queries to what a streaming head would have dropped: fp32 [batch, kv_heads], CPU.

    Sinks do not count: every head looks at them, and every head keeps them. A head that streams already has NEVER.
    """
    full = _full_now(layer)
    if not bool(full.any()):
        return torch.full(full.shape, NEVER)
    held = layer.stored()
    at = held.positions
    queries = evidence.queries[:, :, -at.shape[-1] :]
    mass = window_mass(queries, held.keys, valid=evidence.visible(at), **evidence.softmax.options)
    mass = group_mean(mass, layer.kv_heads)
    first, last = (
        torch.tensor(bounds, device=at.device)[:, None, None]
        for bounds in (
            [row.sinks for row in sizes],
            [int(seen) - row.recent for seen, row in zip(evidence.tokens, sizes, strict=True)],
        )
    )
    return mass.masked_fill((at < first) | (at >= last), 0).sum(-1).cpu().masked_fill(~full, NEVER)


def _split(layer: Layer, full: torch.Tensor, sizes: list[Sizes], stays: torch.Tensor | None = None) -> SplitSegment:
    """What the layer holds (nothing yet, in an empty layer), divided: `full` bool [batch, kv_heads] keep everything,
    but in rows that are to stay as they are, bool [batch].

    Rows with windows of their own size share one ring as long as they have as many sinks.
    """
    # What a streaming head dropped cannot come back: it streams on, whatever it is ranked now.
    full, now = full & _full_now(layer), _full_now(layer)
    held = layer.stored() if layer.seen else None
    sinks, recent = torch.tensor([n.sinks for n in sizes]), torch.tensor([n.recent for n in sizes])
    if stays is not None:
        full[stays] = now[stays]
        sinks, recent = (torch.where(stays, x, y) for x, y in zip(_window_now(layer), (sinks, recent), strict=True))
    parts = []
    for count in (None, *sinks.unique().tolist()):
        units = (full if count is None else ~full & (sinks == count)[:, None]).nonzero()
        if not len(units):
            continue
        row, head = units.to(layer.device).unbind(1)
        of_units = recent[units[:, 0]]
        # Before the first token there is nothing to take over; the parts fill up as the prompt is read.
        if held is None:
            segment = DenseSegment() if count is None else ChunkedRing(count, of_units)
        elif count is None:
            segment = dense_part(held, row, head)
        else:
            segment = ring_part(held, row, head, count, of_units, layer.softmax.scale)
        parts.append(Part(row.contiguous(), head.contiguous(), segment))
    return SplitSegment(parts, len(full), layer.kv_heads)


if __name__ == "__main__":
    from textkv.duo.identify import main

    sys.exit(main())
