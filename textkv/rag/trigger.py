"""When to retrieve: the multi-layer attention gradient of ATLAS (arXiv 2504.01281, 2B).

    gate:  p(t_i) < tau, and word i is no stopword, number or punctuation
    score: alpha * G_i * D_i > theta,  D_i = (1 - p(t_i)) * sum_h phi_h a_h

G_i is how much the attention around token i changes from layer to layer, later layers counting more; a_h is the
attention of head h in the last layer, phi_h its share of the entropy. As printed, both sum what EARLIER tokens give to
token i, which a causal mask forbids: the score is 0 for every text (`received(rows, "earlier")`). Two readings work:

- `received`: what LATER tokens of a draft give to token i. It is what DRAGIN computes, which ATLAS extends; a draft
  must be written first.
- `outgoing`: what token i itself gives to others. It needs no draft.

Here rows are fp32 attention [layers, heads, m, n] of m tokens that follow one another. Theta is not given: take a
quantile of the scores of texts of your own (`textkv.rag.atlas.calibrated`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

MODES = ("received", "outgoing")


@dataclass(frozen=True)
class Signal:
    """Of each of m tokens, fp32 [m]: `change`, the paper's G, and `focus`, its sum_h phi_h a_h."""

    change: torch.Tensor
    focus: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """When a word triggers a retrieval.

    Attributes:
        mode: "received" or "outgoing".
        theta: the least score; words of a score below do not trigger.
        tau: words at least as probable do not trigger (0.5 in the paper).
        alpha, decay: alpha_0 and lambda of the load (0.8 and 4 in the paper).
        capacity: bytes of the cache at full load; None = no load. The paper takes 90 % of the GPU's memory, of which
            the weights alone may silence the trigger.

    Raises:
        ValueError: another mode, or a figure out of its range.
    """

    mode: Literal["received", "outgoing"]
    theta: float
    tau: float = 0.5
    alpha: float = 0.8
    decay: float = 4.0
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not known; use {' or '.join(MODES)}")
        if math.isnan(self.theta):
            raise ValueError("theta is no number; use a quantile of scores, or inf to never retrieve")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau} is no probability above 0; use 0.5")
        if self.alpha <= 0 or self.decay < 0:
            raise ValueError(f"alpha={self.alpha}, decay={self.decay}: alpha is positive, decay at least 0")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity={self.capacity}: give the bytes that the cache may hold, or None")

    def weight(self, held: int) -> float:
        """alpha_0 exp(-lambda C / C_max) with `held` bytes in the cache: a full memory retrieves less."""
        return self.alpha * math.exp(-self.decay * held / self.capacity) if self.capacity else self.alpha

    def signal(self, rows: torch.Tensor) -> Signal:
        """Change and focus of the tokens whose rows these are; the last m columns are their own."""
        return outgoing(rows) if self.mode == "outgoing" else received(rows)


def received(rows: torch.Tensor, givers: Literal["later", "earlier"] = "later") -> Signal:
    """By the attention that each of the m tokens gets from the others of them; "earlier" is the printed formula.

    Sums over givers and heads are divided, layer by layer, by the largest of them; a_h is the most that one giver
    gives. The entropy of a head is summed over the rows.
    """
    m = rows.shape[2]
    among = rows[..., -m:]
    side = torch.ones(m, m, dtype=torch.bool, device=rows.device)
    among = among * (side.tril(-1) if givers == "later" else side.triu(1))
    mass = among.sum((1, 2))
    share = mass / mass.amax(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    change = (_growing(len(rows), rows)[:, None] * share.diff(dim=0).abs()).sum(0)
    entropy = torch.special.entr(rows[-1]).sum((1, 2))
    return Signal(change, _shares(entropy) @ among[-1].amax(1))


def outgoing(rows: torch.Tensor) -> Signal:
    """By each token's own row: half the L1 distance of rows, averaged over heads, from layer to layer (their total
    variation, so that G is at most L / 2), and the largest entry of each head in the last layer."""
    change = 0.5 * rows.mean(1).diff(dim=0).abs().sum(-1)
    entropy = torch.special.entr(rows[-1]).sum(-1)
    focus = (_shares(entropy) * rows[-1].amax(-1)).sum(0)
    return Signal((_growing(len(rows), rows)[:, None] * change).sum(0), focus)


def _growing(layers: int, like: torch.Tensor) -> torch.Tensor:
    """eta_j = j / (L - 1) for j = 1 .. L - 1."""
    return torch.arange(1, layers, device=like.device, dtype=like.dtype) / max(1, layers - 1)


def _shares(entropy: torch.Tensor) -> torch.Tensor:
    """Each head's part of the entropy [heads, ..]; equal parts where there is none."""
    total = entropy.sum(0, keepdim=True)
    return torch.where(total > 0, entropy / total.clamp(min=torch.finfo(entropy.dtype).tiny), 1 / len(entropy))
