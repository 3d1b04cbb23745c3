"""STaR-KV: GUI-KV's scores, weighed by what heads know of places and by the age of screenshots (arXiv 2606.01790).

One selection per layer, shared by its heads: the mean over heads of the window's attention and of the current
screenshot's saliency. A token counts more if the KV head that looks at it most tells much about places on the screen
(mutual information), and less the older its screenshot is. Both go by the steps of an agent: what was learned is kept
for each row (`Layer.trajectory`) until `MethodCache.new_trajectory`.

The paper's third part, a temperature from the entropy of the scores, cannot act: x ** (1 / T) is increasing and comes
last, so that the same tokens are kept at every T. `aeb="layer"` computes it all the same; `aeb="per_head"` sharpens
each query head before the mean, which can act and is ours.

Two presets. `star-kv` takes the grid that a screenshot has, and fewer position bins where it is small. As released
(`star-kv-official`) the grid is guessed, and the state is thrown away before every prompt: the first step is all there
ever is, in which heads weigh the same. Both store one copy per KV head: since heads share a selection, the released
copies per query head add bytes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from agentkv.frames import bonus, check_fields
from agentkv.positional import MOST_BINS, bins_for, cells, guessed_grid, mutual_information, weights
from textkv.eviction import HIDDEN, NEVER, PROTECTED, Eviction, blocks
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.scores import fit_window, past_mass, pool, with_window
from textkv.screens import Grid, Span, inside
from textkv.segments.base import Stored

STEPS, GAIN, PATTERN, STABLE = (f"star-kv.{name}" for name in ("steps", "gain", "pattern", "stable"))


@register("star-kv")
@dataclass(frozen=True)
class StarKV(Eviction):
    """The method mended. Spans and grids of the screenshots come from `MethodCache.begin`.

    Attributes:
        window: observation window in tokens.
        alpha: weight of the saliency bonus; 0 = off.
        tau: temperature of the saliency softmax; it divides.
        kernel: average-pooling width over tokens.
        saliency: whose norm is saliency: "attn_input" (after the norm, as released) or "residual".
        strength: of the heads' weights, in [0, 1]; the lambda of the paper.
        start: steps of a trajectory before heads are weighed at all.
        ramp: steps in which the strength grows to its whole.
        memory: share of what was known that a step leaves, of information and of patterns.
        tau_heads: temperature of the softmax over heads.
        grid: "true" as the screenshot has it, or "guessed" nearly square, as released.
        bins: position bins along each side; None = 12, or fewer so that each has nine tokens.
        decay: how fast a screenshot's tokens lose, per screenshot that came after; 0 = not at all.
        least: what is left of them however old they are.
        unstable: decay of heads that look elsewhere at every step, as a share of the decay of steady ones.
        aeb: "off", "layer" (the paper's temperature, which changes nothing) or "per_head" (ours).
        coldest: temperature where attention is on one token.
        warmest: temperature where it is the same everywhere.
    """

    window: int = 8
    alpha: float = 2.0
    tau: float = 3.5
    kernel: int = 5
    saliency: Literal["attn_input", "residual"] = "attn_input"
    strength: float = 0.5
    start: int = 5
    ramp: int = 10
    memory: float = 0.9
    tau_heads: float = 1.0
    grid: Literal["true", "guessed"] = "true"
    bins: int | None = None
    decay: float = 0.1
    least: float = 0.0
    unstable: float = 0.0
    aeb: Literal["off", "layer", "per_head"] = "off"
    coldest: float = 0.75
    warmest: float = 1.25

    past: ClassVar[int] = 1
    """Tokens before the window that a budget leaves room for, where it is smaller than the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _CHOICES)
        for name in ("strength", "memory", "least", "unstable"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share lies in [0, 1]")
        for name in ("start", "ramp", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if min(self.tau_heads, self.coldest, self.warmest) <= 0:
            raise ValueError(
                f"tau_heads={self.tau_heads}, coldest={self.coldest}, warmest={self.warmest}: temperatures are positive"
            )
        if self.bins is not None and not 1 <= self.bins <= 64:
            raise ValueError(f"bins={self.bins}: use 1 to 64 along each side, or None to choose by the frame's size")

    @property
    def remembers(self) -> bool:
        """Yes: heads are weighed by what the steps before have shown."""
        return True

    def needs(self) -> Needs:
        """The window's queries, where screenshots are and how they lie, and hidden states, which also tell whose tokens
        a block brought."""
        return Needs(window=self.window, hidden=self.saliency, spans=True, grids=self.grid == "true")

    # ---- one step of a trajectory ------------------------------------------------------------------------------

    def learn(self, layer: Layer, evidence: Evidence) -> None:
        """A block that brings a screenshot is a step: what it tells of heads and patterns is added to what is known."""
        if not self.remembers:
            return
        held = layer.stored()
        for row, spans in enumerate(evidence.spans):
            at = evidence.norm_positions[row]
            if spans and bool(inside(at, spans[-1:]).any()):
                keep = self.budget.count(int(evidence.remaining[row]))
                attention, positions = self._attention(held, evidence, row, keep)
                groups = self._groups(attention.masked_fill(attention == PROTECTED, 0), layer.kv_heads)
                here = inside(positions, spans[-1:]) & (attention[0] != PROTECTED)
                grid = self._grid(evidence, row, spans[-1])
                self._step(layer, row, groups[:, here], positions[here] - spans[-1][0], spans[-1], grid)

    def _grid(self, evidence: Evidence, row: int, span: Span) -> Grid:
        return evidence.grids[row][-1] if self.grid == "true" else guessed_grid(span[1] - span[0])

    def _step(self, layer: Layer, row: int, looks: torch.Tensor, offsets: torch.Tensor, span: Span, grid: Grid) -> None:
        """One more step of a row: `looks` [kv_heads, k] at the current screenshot's tokens at `offsets`."""
        size = span[1] - span[0]
        bins = bins_for(size) if self.bins is None else self.bins
        gain = mutual_information(looks, cells(offsets.long(), grid, bins), bins * bins).float()
        pattern = looks.new_zeros(len(looks), size)
        pattern[:, offsets.long()] = looks
        pattern = pattern / pattern.sum(1, keepdim=True).clamp(min=1e-12)
        steps, known, before = self._known(layer, row, size)
        if steps:
            gain = self.memory * known + (1 - self.memory) * gain
        # A screen of another size has another pattern: that one is begun anew.
        mean = pattern if before is None else self.memory * before + (1 - self.memory) * pattern
        stable = F.cosine_similarity(pattern, mean, dim=1).clamp(0, 1)
        rows = len(layer.real_seen)
        for name, value in ((STEPS, gain.new_tensor(steps + 1.0)), (GAIN, gain), (PATTERN, mean), (STABLE, stable)):
            layer.trajectory[name] = _with_row(layer.trajectory.get(name), rows, row, value)

    def _known(self, layer: Layer, row: int, size: int) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
        """Steps so far, the heads' information, and their patterns if they are of a screen of `size` tokens."""
        known = layer.trajectory
        steps = int(known[STEPS][row]) if STEPS in known else 0
        if not steps:
            return 0, None, None
        pattern = known[PATTERN][row]
        width = int((~pattern[0].isnan()).sum())
        return steps, known[GAIN][row], pattern[:, :size] if width == size else None

    # ---- scores ------------------------------------------------------------------------------------------------

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Of one row whose heads hold the same tokens, fp32 [1, kv_heads, n]; `scores` is for whole layers."""
        return self._row(layer, held, evidence, 0, keep)

    def scores(self, layer: Layer, evidence: Evidence, keep: list[int] | None = None) -> torch.Tensor:
        """One score per token of a row, the same in all heads: fp32 [batch, kv_heads, n], NEVER at holes."""
        held, tokens = layer.stored(), evidence.remaining.tolist()
        keep = [self.budget.count(seen) for seen in tokens] if keep is None else keep
        return torch.cat([self._row(layer, held, evidence, row, keep[row]) for row in range(len(tokens))])

    def _row(self, layer: Layer, held: Stored, evidence: Evidence, row: int, keep: int) -> torch.Tensor:
        attention, positions = self._attention(held, evidence, row, keep)
        guarded = (attention == PROTECTED).any(0)
        spans = evidence.spans[row] if evidence.spans else []
        looks = attention.masked_fill(guarded, 0)
        if self.aeb == "per_head":
            looks = looks ** (1 / self.temperature(looks[:, ~guarded]))[:, None]
        shared = self.weighed(looks, held.keys.shape[1], positions, spans, self._learned(layer, row))
        if self.aeb == "layer":
            shared = shared ** (1 / self.temperature(looks.mean(0)[~guarded]))
        shared = shared.masked_fill(guarded, PROTECTED)
        at, seen = held.positions[row], evidence.visible(held.positions)[row]
        if not len(positions):  # a row that has not begun, or sees nothing of what it holds
            return torch.full(at.shape, NEVER, device=at.device).masked_fill(at >= 0, HIDDEN)[None]
        slots = torch.searchsorted(positions, at.contiguous()).clamp(max=len(positions) - 1)
        return shared[slots].masked_fill(~seen, HIDDEN).masked_fill(at < 0, NEVER)[None]

    def _attention(self, held: Stored, evidence: Evidence, row: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a row's query heads look at, fp32 [heads, p], the bonus included and PROTECTED in the window, and the
        positions int32 [p] of tokens that any head holds and the mask did not hide. A token that a head has dropped
        gets nothing of it."""
        at = held.positions[row]
        positions = at[evidence.visible(held.positions)[row]].unique()
        found = torch.zeros(evidence.queries.shape[1], len(positions), device=at.device)
        one = slice(row, row + 1)
        alone = Stored(held.keys[one], held.values[one], held.positions[one])
        group = len(found) // len(at)
        for _, heads, _, part, seen in blocks(alone, evidence.part(row, None, len(at), slice(None))):
            queries = fit_window(seen.queries, part.keys.shape[2], keep, self.past)
            mass = pool(past_mass(queries, part.keys, seen.softmax), self.kernel)
            slots = torch.searchsorted(positions, part.positions[0, 0].contiguous())
            rows = slice((heads.start or 0) * group, heads.stop * group)
            found[rows, slots] = with_window(mass, queries.shape[2])[0]
        spans = evidence.spans[row] if evidence.spans else []
        if self.alpha and spans:
            found += self.alpha * bonus(evidence, row, spans[-1], positions[None], self.tau)
        return found, positions

    def weighed(
        self, looks: torch.Tensor, kv_heads: int, positions: torch.Tensor, spans: list[Span], learned: Learned
    ) -> torch.Tensor:
        """The mean over heads, by what the head that looks most knows and by age: looks [heads, p] -> [p]."""
        groups = self._groups(looks, kv_heads)
        governing = groups.argmax(0)
        factor = 1 - learned.strength + learned.strength * kv_heads * learned.weights[governing]
        if len(spans) > 1 and self.decay:
            age = looks.new_zeros(len(positions))
            for back, span in enumerate(reversed(spans)):
                age += back * inside(positions, [span])
            steady = self.unstable + (1 - self.unstable) * learned.stable[governing]
            factor = factor * (self.least + (1 - self.least) * torch.exp(-self.decay * age * steady))
        return looks.mean(0) * factor

    def _learned(self, layer: Layer, row: int) -> Learned:
        """What is known of a row's heads at its current step."""
        heads, known = layer.kv_heads, layer.trajectory
        steps = int(known[STEPS][row]) if STEPS in known else 0
        even = torch.full((heads,), 1 / heads, device=layer.device)
        if not steps:
            return Learned(0.0, even, torch.ones_like(even))
        return Learned(self.strength_at(steps), weights(known[GAIN][row], self.tau_heads), known[STABLE][row])

    def strength_at(self, step: int) -> float:
        """How much heads' weights count at a step, counted from 1."""
        past = step - self.start
        return 0.0 if past <= 0 else self.strength * min(1.0, past / max(1, self.ramp))

    @staticmethod
    def _groups(looks: torch.Tensor, kv_heads: int) -> torch.Tensor:
        return looks.unflatten(0, (kv_heads, -1)).mean(1)

    def temperature(self, scores: torch.Tensor) -> torch.Tensor:
        """By the entropy of non-negative scores [..., p] over their p tokens: [...] between `coldest` and `warmest`."""
        share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy = -(share * (share + 1e-8).log()).sum(-1) / log(max(2, scores.shape[-1]))
        return self.coldest + (self.warmest - self.coldest) * entropy.clamp(0, 1)


@dataclass(frozen=True)
class Learned:
    """What a trajectory taught of a layer's heads in one row: how much their `weights` count, these fp32 [kv_heads]
    (sum 1), and how `stable` their patterns are, fp32 [kv_heads] in [0, 1]."""

    strength: float
    weights: torch.Tensor
    stable: torch.Tensor


_CHOICES = {
    "saliency": ("attn_input", "residual"),
    "grid": ("true", "guessed"),
    "aeb": ("off", "layer", "per_head"),
}


@register("star-kv-official")
@dataclass(frozen=True)
class StarKVOfficial(StarKV):
    """STaR-KV as its scripts run it: a guessed grid, a temperature that changes nothing, and a state that ends with
    every prompt. What is left is GUI-KV's saliency, one selection per layer, and the discount of older screenshots."""

    grid: Literal["true", "guessed"] = "guessed"
    bins: int | None = MOST_BINS
    aeb: Literal["off", "layer", "per_head"] = "layer"

    past: ClassVar[int] = 2

    @property
    def remembers(self) -> bool:
        """No: as released, every prompt begins anew."""
        return False


def _with_row(known: torch.Tensor | None, rows: int, row: int, value: torch.Tensor) -> torch.Tensor:
    """A tensor [rows, ...] with one row set, in a new storage; rows of other widths are filled up with NaN."""
    known = value.new_zeros(rows, *value.shape) if known is None else known
    width = 0 if value.ndim == 0 else value.shape[-1] - known.shape[-1]
    known = F.pad(known, (0, width), value=torch.nan) if width > 0 else known.clone()
    known[row] = value if width >= 0 else F.pad(value, (0, -width), value=torch.nan)
    return known
