"""GUI-KV: which screenshot tokens a GUI agent may forget (arXiv 2510.00536).

SnapKV's window score, plus a bonus for salient tokens of the current screenshot, minus the tokens of earlier
screenshots that the current one's keys already span (a gate: they go first). Uniform over layers.

Two presets. `gui-kv` is the method mended: one selection per KV head, a real principal subspace (SVD), fp32.
`gui-kv-official` is what was released: the subspace of the FIRST 32 visual tokens (QR without pivoting), and one copy
of the cache per query head, which at group 7 takes more memory than no compression above a budget of 1/7. Where paper
and released code differ (tau divides; hidden state after the norm), we follow the code and say so at the field.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from agentkv.frames import bonus, check_fields, without
from textkv.eviction import Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.kernels import subspace_residual
from textkv.layer import Layer
from textkv.method import Capabilities, register
from textkv.scores import fit_window, past_mass, pool, with_window
from textkv.screens import inside
from textkv.segments.base import Stored

Basis = Literal["svd", "qr_first", "qr_pivot"]


@register("gui-kv")
@dataclass(frozen=True)
class GuiKV(Eviction):
    """The corrected method. Spans of the screenshots come from `MethodCache.begin`; without screenshots it is SnapKV.

    Attributes:
        window: observation window in tokens; 8 in the authors' scripts.
        alpha: weight of the saliency bonus (2 in the scripts; 0 = off).
        tau: temperature of the saliency softmax; it divides, as in the code (the paper prints a product).
        rank: dimension of the current screenshot's key subspace; None = a quarter of head_dim, the paper's 32 at
            128 (a fixed 32 would be everything for heads of 32, and no key could stand out of it).
        kernel: average-pooling width over tokens.
        basis: "svd" (principal), "qr_pivot" (pivoted), "qr_first" (the first `rank` tokens, as released).
        heads: "kv_mean" one selection per KV head from the group's mean; "head0" the choice of each group's first
            query head; "per_query_head" stores every query head (as released for UI-TARS).
        saliency: whose norm is saliency: "attn_input" (after the norm: the code) or "residual" (the paper).
        gate: whether earlier screenshots are gated at all.
    """

    heads_apart = True

    window: int = 8
    alpha: float = 2.0
    tau: float = 3.5
    rank: int | None = None
    kernel: int = 5
    basis: Basis = "svd"
    heads: Literal["kv_mean", "head0", "per_query_head"] = "kv_mean"
    saliency: Literal["attn_input", "residual"] = "attn_input"
    gate: bool = True

    past: ClassVar[int] = 1
    """Tokens before the window that a budget leaves room for, where it is smaller than the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _CHOICES)

    def needs(self) -> Needs:
        """The window's queries, the screenshots' spans and, for the saliency, hidden states."""
        return Needs(window=self.window, hidden=self.saliency if self.alpha else None, spans=True)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The window's attention, pooled, plus alpha times the saliency of the last screenshot; NEVER where gated.

        fp32 [batch, kv_heads, n], or [batch, heads, n] where each query head chooses for itself.
        """
        queries = fit_window(evidence.queries, held.keys.shape[2], keep, self.past)
        width, kv_heads = queries.shape[2], held.keys.shape[1]
        mass = pool(past_mass(queries, held.keys, evidence.softmax), self.kernel)
        scores = with_window(self._reduce(mass, kv_heads), width)
        group = scores.shape[1] // kv_heads
        positions = held.positions.repeat_interleave(group, 1)
        for row in range(len(scores)):
            spans = evidence.spans[row] if evidence.spans else []
            if not spans:
                continue
            if self.alpha:
                scores[row] += self.alpha * bonus(evidence, row, spans[-1], positions[row], self.tau)
            if self.gate and len(spans) > 1:
                dropped = self._gated(held, row, spans, keep / int(evidence.remaining[row]))
                scores[row] = without(scores[row], dropped.repeat_interleave(group, 0))
        return scores

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Cut the layer, in a copy per query head where these choose for themselves (the released code)."""
        if self.heads == "per_query_head" and not self.budget.is_full:
            self._per_query_head(layer, evidence)
        else:
            super().on_prefill_end(layer, evidence)

    def _per_query_head(self, layer: Layer, evidence: Evidence) -> None:
        """Every query head becomes a stored head, and selects for itself."""
        group = evidence.queries.shape[1] // layer.lengths().shape[1]
        if group > 1:
            layer.repeat_heads(group)
        keep_best(layer, self.scores(layer, evidence), self.counts(layer, None, evidence))

    def _reduce(self, mass: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Query-head scores [batch, heads, n] -> stored-head scores."""
        grouped = mass.unflatten(1, (kv_heads, -1))
        return grouped[:, :, 0] if self.heads == "head0" else grouped.mean(2)

    def _gated(self, held: Stored, row: int, spans: list[tuple[int, int]], share: float) -> torch.Tensor:
        """Which earlier-screenshot tokens the current one's keys make redundant: bool [kv_heads, n]."""
        positions, keys = held.positions[row], held.keys[row]
        current, earlier = inside(positions, spans[-1:]), inside(positions, spans[:-1])
        # Of everything that earlier screenshots ever held, this much may stay; what a past turn dropped counts as gone.
        history = sum(end - start for start, end in spans[:-1])
        stay = history - int((1 - share) * history + 1e-9)
        gated = torch.zeros_like(earlier)
        alike = bool((positions == positions[:1]).all())
        for heads in [slice(0, len(keys))] if alike else [slice(h, h + 1) for h in range(len(keys))]:
            frame, slots = current[heads][0].nonzero()[:, 0], earlier[heads][0].nonzero()[:, 0]
            count = len(slots) - stay
            if not len(frame) or count <= 0:
                continue
            basis = orthobasis(keys[heads][:, frame].float(), self.rank or keys.shape[2] // 4, self.basis)
            energy = subspace_residual(keys[None, heads][:, :, slots], basis[None])[0]
            first = slots[energy.sort(dim=-1, stable=True).indices[:, :count]]
            gated[heads] = gated[heads].scatter(1, first, True)
        return gated


_CHOICES = {
    "basis": ("svd", "qr_first", "qr_pivot"),
    "heads": ("kv_mean", "head0", "per_query_head"),
    "saliency": ("attn_input", "residual"),
}


@register("gui-kv-official")
@dataclass(frozen=True)
class GuiKVOfficial(GuiKV):
    """GUI-KV as released: first-tokens subspace, every query head stored (mind the bytes), and a window of at most the
    budget - 2 tokens. (Theirs breaks where that leaves none; ours then has one token.)"""

    heads_apart = False

    rank: int | None = 32
    basis: Basis = "qr_first"
    heads: Literal["kv_mean", "head0", "per_query_head"] = "per_query_head"

    past: ClassVar[int] = 2
    capabilities: ClassVar[Capabilities] = replace(GuiKV.capabilities, stores_query_heads=True)


def orthobasis(keys: torch.Tensor, rank: int, basis: Basis) -> torch.Tensor:
    """Orthonormal columns [kv_heads, head_dim, r] that span the frame's keys [kv_heads, n, head_dim].

    r = min(rank, n, head_dim).
    """
    r = min(rank, *keys.shape[1:])
    if basis == "svd":
        return torch.linalg.eigh(keys.mT @ keys).eigenvectors[..., -r:]
    # Without pivoting the first r columns of Q depend on the first r keys alone.
    chosen = keys[:, :r] if basis == "qr_first" else torch.stack([head[_pivots(head, r)] for head in keys])
    return torch.linalg.qr(chosen.mT).Q


def _pivots(keys: torch.Tensor, r: int) -> list[int]:
    """The r keys that column-pivoted QR takes first: each time the one farthest from the span of those before."""
    rest, chosen = keys.clone(), []
    for _ in range(r):
        best = int((rest**2).sum(-1).argmax())
        chosen.append(best)
        direction = torch.nn.functional.normalize(rest[best], dim=0)
        rest = rest - (rest @ direction)[:, None] * direction
    return chosen
