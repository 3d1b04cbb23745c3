"""Expected Attention: keep what queries that are still to come should look at (arXiv 2510.00636).

The queries before the rotary embedding are taken as normally distributed, with the prompt's mean and covariance. Turned
to the positions that come next (by the mean rotation of these), they give the logarithm of each key's expected
unnormalised attention in closed form: the mean of q.k plus half its variance. A token's score is its share of that
attention times the norm of its value: its part of the layer's output. No prompt query is compared with any key.

The queries are those that the model handed to attention, with the rotation undone: what a scaled RoPE multiplies in
stays in, as it does in real future queries. kvpress counts future positions from the length of the current forward; we
count from the last token's rotary position, so later turns and M-RoPE continue where they should. Under M-RoPE an
image's queries are turned back by the temporal axis alone: where that is most wrong, in the quick frequencies, the mean
rotation over hundreds of positions leaves nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.eviction import PROTECTED, Eviction
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.positions import RotarySpec
from textkv.segments.base import Stored

_BLOCK = 4096  # keys scored at a time: the quadratic form holds this many rows per query head in fp32


@register("expected")
@dataclass(frozen=True)
class Expected(Eviction):
    """Compresses at the end of each prompt block, by that block's queries; decoded tokens are all kept.

    Attributes:
        future: how many positions ahead the queries are averaged over; 512 in the paper.
        sinks: first tokens of each row, always kept and left out of the statistics; 4 in the paper.
        covariance: whether the spread of the queries counts, not only their mean.
        vnorm: whether the norm of the value counts.
        epsilon: added to the share of attention before the value's norm multiplies it; 0.01 as in most of the paper's
            tables. With 0, the default of the authors' code, a few keys take all of the expected softmax, and among all
            others noise decides.
    """

    heads_apart = True

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    vnorm: bool = True
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"future={self.future}: at least 1 position must lie ahead; the paper uses 512")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: cannot be negative; the paper keeps 4")
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon={self.epsilon}: give a number of at least 0, such as 0.01")

    def needs(self) -> Needs:
        """Mean and covariance of the block's queries, without the sinks', and rotary positions."""
        return Needs(rope=True, query_moments=self.sinks)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """(mean over the group of softmax(expected logits) + epsilon) * |value|; sinks are PROTECTED."""
        # A budget that the sinks fill would leave nothing else to read.
        sinks = held.positions < min(self.sinks, keep - 1)
        logits = self._expected_logits(held.keys, evidence, layer.rotary)
        shares = logits.masked_fill(sinks[:, :, None], float("-inf")).softmax(-1).mean(2)
        scores = shares + self.epsilon
        if self.vnorm:
            scores = scores * held.values.float().norm(dim=-1)
        return scores.masked_fill(sinks, PROTECTED)

    def _expected_logits(self, keys: torch.Tensor, evidence: Evidence, rotary: RotarySpec) -> torch.Tensor:
        """log E[exp(scale * q.k)] over the queries to come: fp32 [batch, kv_heads, group, n]."""
        moments, kv_heads, scale = evidence.moments, keys.shape[1], evidence.scale
        turn = mean_rotation(evidence.rope_positions[:, -1] + 1, self.future, rotary)
        mean = (moments.mean @ turn.mT).unflatten(1, (kv_heads, -1))
        spread = None
        if self.covariance:
            spread = (turn[:, None] @ moments.covariance @ turn.mT[:, None]).unflatten(1, (kv_heads, -1))
        parts = []
        for part in keys.split(_BLOCK, 2):
            k = part.float()
            logits = scale * (mean @ k.mT)
            if spread is not None:
                k = k[:, :, None]
                logits += 0.5 * scale**2 * ((k @ spread) * k).sum(-1)
            parts.append(logits)
        return torch.cat(parts, -1)


def mean_rotation(first: torch.Tensor, future: int, rotary: RotarySpec) -> torch.Tensor:
    """Mean of the rotary matrices of positions first .. first + future - 1: fp32 [batch, dim, dim].

    Args:
        first: int64 [batch].
        rotary: how the layer's keys turn; what it does not turn (partial rotary) stays as it is.
    """
    ahead = first[:, None] + torch.arange(future, device=first.device)
    inv_freq, low, high = (x.to(first.device) for x in (rotary.inv_freq, rotary.first, rotary.second))
    angle = ahead[..., None].double() * inv_freq.double()  # [batch, future, R / 2]
    cos, sin = angle.cos().mean(1).float(), angle.sin().mean(1).float()
    turn = torch.eye(rotary.head_dim, device=first.device).repeat(len(first), 1, 1)
    turn[:, low, low], turn[:, high, high] = cos, cos
    turn[:, low, high], turn[:, high, low] = -sin, sin
    return turn
