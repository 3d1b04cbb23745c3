"""ST-Lite: tokens that differ from their neighbours, history that differs from the current screen (arXiv 2603.00188).

SnapKV's window score, plus a bonus for tokens of the current screenshot whose hidden state points away from those
around it, minus the tokens of earlier screenshots that look like something on the current one (a gate: they go first).

Paper and released code are two methods. `st-lite` is the paper's, as far as it is known: neither the size of the bonus
nor the frames that get it are told, and as printed it would outrank every word of the prompt; so it sums to `alpha`
over a frame, as GUI-KV's does. `st-lite-official` is the code's: GUI-KV's saliency by norms (with the neighbours' mean
where the number of tokens is a square by chance), and the same gate.

A later turn's screenshot is compared with tokens whose hidden states are gone. Of each stored token of a screenshot a
random projection is kept beside the keys (`sketch` numbers in half precision); a screenshot is judged by these where
any of its history was read before, else by the hidden states themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from agentkv.frames import at_slots, check_fields, norms_in, saliency, singularity, smoothed, without
from textkv.contents import OF_HEAD
from textkv.eviction import Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.scores import fit_window, past_mass, pool, with_window
from textkv.screens import Grid, ScreenStates, Span, inside
from textkv.segments.base import Stored

SKETCH, PLACE = OF_HEAD + "st-lite.sketch", OF_HEAD + "st-lite.place"
_CHUNK = 1024  # history tokens compared at a time: all pairs of five screenshots would be millions of numbers


@register("st-lite")
@dataclass(frozen=True)
class STLite(Eviction):
    """The paper's method. Spans and grids of the screenshots come from `MethodCache.begin`.

    Attributes:
        window: observation window in tokens.
        alpha: what the bonus sums to over a frame; None = 1 - mean cosine itself, as printed; 0 = none.
        kernel: average-pooling width over tokens.
        heads: "kv_mean" one selection per KV head from the group's mean; "per_query_head" stores every query head.
        hidden: which hidden states: "attn_input" (after the norm, as released) or "residual".
        frames: which screenshots get the bonus: the "current" one or "all" that a prompt brings.
        gate: whether earlier screenshots are gated at all.
        sketch: numbers kept of each stored token of a screenshot, for later turns; 0 = none, and what an earlier turn
            read is then never gated.
    """

    window: int = 8
    alpha: float | None = 2.0
    kernel: int = 5
    heads: Literal["kv_mean", "per_query_head"] = "kv_mean"
    hidden: Literal["attn_input", "residual"] = "attn_input"
    frames: Literal["current", "all"] = "current"
    gate: bool = True
    sketch: int = 64

    past: ClassVar[int] = 1
    """Tokens before the window that a budget leaves room for, where it is smaller than the window."""
    grids: ClassVar[bool] = True
    """Whether it asks how a screenshot's tokens lie."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _CHOICES)
        if self.sketch < 0:
            raise ValueError(f"sketch={self.sketch}: give how many numbers to keep of a token, or 0 for none")
        copies = self.heads == "per_query_head"
        object.__setattr__(self, "capabilities", Capabilities(scores=True, stores_query_heads=copies))

    def needs(self) -> Needs:
        """The window's queries, where screenshots are and how they lie, and the hidden states of their tokens."""
        return Needs(window=self.window, hidden=self.hidden, spans=True, grids=self.grids, states=True)

    # ---- what is kept for later turns --------------------------------------------------------------------------

    def learn(self, layer: Layer, evidence: Evidence) -> None:
        """Take down the projections of the tokens of new screenshots."""
        if not (self.gate and self.sketch and evidence.states is not None):
            return
        states, at = evidence.states.states, evidence.states.positions
        onto = _projection(states.shape[-1], self.sketch).to(states.device)
        sketch = (F.normalize(states.float(), dim=-1) @ onto).half()
        if PLACE in layer.statistics:
            old = layer.statistics[PLACE]
            # What was taken back, and read anew since, is told by the new block alone.
            old = old.masked_fill(old >= _begins(evidence)[:, None], -1)
            sketch, at = torch.cat([layer.statistics[SKETCH], sketch], 1), torch.cat([old, at], 1)
        self._note(layer, sketch, at)

    def on_evict(self, layer: Layer, kept: torch.Tensor) -> None:
        """Projections go with their tokens, once no head holds them."""
        if PLACE in layer.statistics:
            at = layer.statistics[PLACE]
            held = torch.stack([torch.isin(x, y) for x, y in zip(at, kept, strict=True)])
            self._note(layer, layer.statistics[SKETCH], at.masked_fill(~held, -1))

    @staticmethod
    def _note(layer: Layer, sketch: torch.Tensor, at: torch.Tensor) -> None:
        used = (at >= 0).any(0)
        layer.statistics[SKETCH], layer.statistics[PLACE] = sketch[:, used], at[:, used]

    # ---- scores ------------------------------------------------------------------------------------------------

    def scores(self, layer: Layer, evidence: Evidence, keep: list[int] | None = None) -> torch.Tensor:
        """The window's attention, pooled, plus the bonus, NEVER where gated: fp32 [batch, stored heads, n]."""
        keep = [self.budget.count(seen) for seen in evidence.remaining.tolist()] if keep is None else keep
        positions = layer.held_positions()
        added = torch.zeros(positions.shape, device=positions.device)
        for row, spans in enumerate(evidence.spans):
            for span, grid in self._favoured(evidence, row):
                share = self._bonus(evidence, row, span, grid)
                if share is not None:
                    added[row] += at_slots(share, span, positions[row])
            if self.gate and len(spans) > 1:
                gone = self._gated(layer, evidence, row, positions[row], keep[row])
                added[row] = without(added[row], torch.isin(positions[row], gone))
        return super().scores(layer, replace(evidence, statistic=added), keep)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Attention of the window plus what `scores` has worked out for whole rows."""
        queries = fit_window(evidence.queries, held.keys.shape[2], keep, self.past)
        mass = pool(past_mass(queries, held.keys, evidence.softmax), self.kernel)
        scores = with_window(mass.unflatten(1, (held.keys.shape[1], -1)).mean(2), queries.shape[2])
        if evidence.statistic is None:
            return scores
        return torch.where(scores.isfinite(), scores + evidence.statistic, scores)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Cut the layer, in a copy per query head where these choose for themselves."""
        group = evidence.queries.shape[1] // layer.lengths().shape[1]
        if self.heads == "per_query_head" and group > 1 and not self.budget.is_full:
            self.learn(layer, evidence)
            layer.repeat_heads(group)
            keep_best(layer, self.scores(layer, evidence), self.counts(layer, None, evidence))
        else:
            super().on_prefill_end(layer, evidence)

    # ---- the bonus ---------------------------------------------------------------------------------------------

    def _favoured(self, evidence: Evidence, row: int) -> list[tuple[Span, Grid | None]]:
        """The screenshots of a row that get a bonus, with their grids."""
        spans = evidence.spans[row]
        grids = evidence.grids[row] if evidence.grids else [None] * len(spans)
        chosen = list(zip(spans, grids, strict=True))
        return [] if self.alpha == 0 else chosen if self.frames == "all" else chosen[-1:]

    def _bonus(self, evidence: Evidence, row: int, span: Span, grid: Grid | None) -> torch.Tensor | None:
        """A frame's bonus, fp32 [tokens of the frame]; None for a frame that came before this block."""
        states = within(evidence.states.row(row), [span])
        if states.positions.shape[1] < span[1] - span[0]:
            return None
        found = singularity(states.states[0], grid)
        if self.alpha is None:
            return found
        total = found.sum()
        # A frame without any contrast has rounding errors for contrasts: all its tokens are alike.
        if float(total) <= 1e-5 * len(found):
            return torch.full_like(found, self.alpha / len(found)) if len(found) > 1 else found
        return self.alpha * found / total

    # ---- the gate ----------------------------------------------------------------------------------------------

    def _states(self, layer: Layer, evidence: Evidence, row: int) -> ScreenStates:
        """What a row's screenshots are compared by: hidden states, or projections of all where any was read before."""
        states = evidence.states.row(row)
        if PLACE in layer.statistics:
            known = ScreenStates(layer.statistics[SKETCH], layer.statistics[PLACE]).row(row)
            # One measure for all: of what was read before there are projections only.
            if bool((known.positions < _begins(evidence)[row]).any()):
                return known
        return states

    def _gated(self, layer: Layer, evidence: Evidence, row: int, held: torch.Tensor, keep: int) -> torch.Tensor:
        """Positions, int32 [k], of tokens of earlier screenshots that must go: those most like the current one."""
        spans, states = evidence.spans[row], self._states(layer, evidence, row)
        history, now = within(states, spans[:-1]), within(states, spans[-1:])
        at = history.positions[0]
        alive = torch.isin(at, held)
        at, old = at[alive], history.states[0, alive]
        # Of everything that earlier screenshots ever held, this much may stay; what a past turn dropped counts as gone.
        whole, seen = sum(end - start for start, end in spans[:-1]), int(evidence.remaining[row])
        count = len(at) - -(-keep * whole // seen)
        if count <= 0 or not now.positions.shape[1]:
            return at[:0]
        order = alike(old, now.states[0]).sort(descending=True, stable=True).indices
        return at[order[:count]]


@register("st-lite-official")
@dataclass(frozen=True)
class STLiteOfficial(STLite):
    """ST-Lite as released: saliency by norms, and a window of at most the budget - 2 tokens.

    Attributes:
        tau: temperature of the saliency softmax; it divides.
    """

    alpha: float | None = 1.0
    tau: float = 1.0

    past: ClassVar[int] = 2
    grids: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None:
            raise ValueError("alpha=None: the released code has no printed form; give the weight of its saliency, 1")

    def _bonus(self, evidence: Evidence, row: int, span: Span, grid: Grid | None) -> torch.Tensor | None:
        norms, _ = norms_in(evidence, row, span)
        return self.alpha * saliency(smoothed(norms), self.tau) if len(norms) == span[1] - span[0] else None


_CHOICES = {
    "heads": ("kv_mean", "per_query_head"),
    "hidden": ("attn_input", "residual"),
    "frames": ("current", "all"),
}


def alike(history: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Largest cosine of each state with any of the current screen's: [n, d], [m, d] -> fp32 [n], 0 for a zero vector.

    To five digits: what differs less is equal, so that ties are told by age and not by rounding.
    """
    now = F.normalize(current.float(), dim=-1).mT
    found = [(F.normalize(part.float(), dim=-1) @ now).amax(1) for part in history.split(_CHUNK)]
    return (torch.cat(found) * 1e5).round() / 1e5


def _begins(evidence: Evidence) -> torch.Tensor:
    """The first position of each row's block, int32 [batch]; beyond all of them for a row that got only padding."""
    at = evidence.norm_positions
    return at.masked_fill(at < 0, torch.iinfo(torch.int32).max).amin(1)


def within(states: ScreenStates, spans: list[Span]) -> ScreenStates:
    """Those of one row that lie in the spans, by ascending position."""
    at = states.positions[0]
    here = inside(at, spans).nonzero()[:, 0]
    here = here[at[here].argsort()]
    return ScreenStates(states.states[:, here], states.positions[:, here])


@lru_cache(maxsize=4)
def _projection(width: int, numbers: int) -> torch.Tensor:
    """The same random directions for every layer and run: fp32 [width, numbers]."""
    return torch.randn(width, numbers, generator=torch.Generator().manual_seed(0)) / numbers**0.5
