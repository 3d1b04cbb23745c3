"""GEAR: small integers, a low-rank fit of their error, exact copies of the extreme entries (arXiv 2403.05527).

    X ~ Q + L + S:   Q = KIVI's codes,   L = A P^T fitted to X - Q per head and chunk,   S = what X exceeds Q + L by

A chunk is what is packed at once: the prompt's tokens, or a full buffer. Extreme entries (the largest and smallest
signed ones of each key channel in a chunk, of each token's value over the channels of all KV heads) do not widen the
range of their group, and the fit does not see them. L and S are applied to the query and to the attention weights,
never to rebuilt keys.

Behind an eviction the heads of a row may hold different tokens, and different numbers of them, which the authors never
have: then what the heads hold in the same slot of the chunk is taken together, as far as they hold anything there, so
that the share of exact entries is the same. Heads that are packed apart (`duo_attention`) are taken one by one.

Where the authors' code differs we follow the paper: keys keep floor(chunk * outliers / 2) entries per channel at each
end (their count is for values and would keep nearly everything), a frozen chunk is never packed again, every row of a
batch has factors of its own, and their fused code's factors, which fit a scrambled error, are not repeated. The power
iteration is orthonormalised at every round, so that a large gap between the first directions does not lose the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from textkv.kernels.pack import FLOAT16_MAX, LowRank, Packed, Sparse, pack, unpack
from textkv.layer import Layer
from textkv.method import register
from textkv.packing import Packer
from textkv.segments.block_pool import blocks_of

MAX_RANK = 16
"""What the attention kernel takes: one tile of its smallest size."""


@register("gear")
@dataclass(frozen=True)
class Gear(Packer):
    """Bits per element: bits + 32 / group + 16 rank (n + D) / (n D) + 32 outliers, for a chunk of n tokens.

    The authors recommend bits=2, group=64, residual=64, ranks 4 and 2, outliers 0.02. A vector shorter than
    2 / outliers (100) entries has no extreme one: keys in a chunk of 64 decoded tokens, values of one head of 64.

    Attributes:
        prompt_rank: rank of the fit for tokens packed at the end of a prompt block; 0 = none.
        rank: rank for those packed while decoding.
        outliers: share of entries kept exactly, half of them the largest, half the smallest.
        rounds: of the power iteration.
    """

    prompt_rank: int = 4
    rank: int = 2
    outliers: float = 0.02
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(self.residual, MAX_RANK)
        if not (0 <= self.prompt_rank <= most and 0 <= self.rank <= most):
            raise ValueError(
                f"prompt_rank={self.prompt_rank}, rank={self.rank}: ranks lie in 0..{most} "
                f"(residual={self.residual}, at most {MAX_RANK})"
            )
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers={self.outliers}: a share of entries lies in [0, 0.5]; the authors use 0.02")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: the power iteration needs at least 1")

    def on_start(self, layer: Layer) -> None:
        """Check the groups and ranks against the model.

        Raises:
            ValueError: `channels` does not divide head_dim, or a rank exceeds it.
        """
        super().on_start(layer)
        if max(self.prompt_rank, self.rank) > layer.head_dim:
            raise ValueError(
                f"prompt_rank={self.prompt_rank}, rank={self.rank}: head_dim {layer.head_dim} is the largest rank"
            )

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, prompt: bool, heads: int = 1
    ) -> tuple[Packed, Packed]:
        """Codes, a low-rank fit of their error, and the extreme entries: keys per channel, values per token."""
        rank = self.prompt_rank if prompt else self.rank
        # Along the vector that shares a scale in the paper: a key channel over tokens, a token's value over channels.
        of_keys = extremes(keys, counts, self.outliers, over="tokens")
        of_values = extremes(values, counts, self.outliers, over="channels", heads=heads)
        return (
            self._fitted(keys, of_keys, counts, rank, "channel"),
            self._fitted(values, of_values, counts, rank, "token"),
        )

    def _fitted(
        self, x: torch.Tensor, outside: torch.Tensor | None, counts: torch.Tensor, rank: int, layout: str
    ) -> Packed:
        """x fp32 [runs, n, D] packed, with its corrections; `outside` bool [runs, n, D] are the extreme entries."""
        blocks = blocks_of(x, counts, self.group)
        ignore = None if outside is None else blocks_of(outside, counts, self.group)
        group = self.channels if layout == "token" else None
        packed = pack(blocks, self.bits, layout=layout, group=group, ignore=ignore)
        # Extreme entries do not widen their group's range, so their error is large: exact copies undo it, not the fit.
        error = blocks - unpack(packed)
        if rank:
            seen = error if ignore is None else error.masked_fill(ignore, 0)
            packed = replace(packed, lowrank=_fit(seen, counts // self.group, rank, self.rounds))
        if ignore is not None:
            # Anew: the fit has changed these entries too, and the copies must make up for both.
            error = blocks - unpack(packed)
            packed = replace(packed, sparse=_singles(error, ignore))
        return packed


@register("gear-l")
@dataclass(frozen=True)
class GearL(Gear):
    """GEAR without the extreme entries: all of its arithmetic is dense."""

    outliers: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers:
            raise ValueError(f"outliers={self.outliers}: gear-l keeps none; use gear")


def extremes(
    x: torch.Tensor, counts: torch.Tensor, share: float, over: Literal["tokens", "channels"], heads: int = 1
) -> torch.Tensor | None:
    """The floor(n * share / 2) largest and as many smallest entries of every vector of n.

    Args:
        x: [runs, n, D].
        counts: int64 [runs] on the CPU, tokens of each run.
        share: of the entries of a vector, both ends together.
        over: "tokens" (a vector is one channel of a run's tokens) or "channels" (one slot of `heads` neighbouring
            runs, of those that hold a token there).

    Returns:
        bool [runs, n, D], or None if there are none at all.
    """
    if over == "tokens":
        vectors, sizes = x.mT, counts[:, None]
        real = torch.arange(x.shape[1]) < sizes[..., None]
    else:
        vectors = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
        held = (torch.arange(x.shape[1]) < counts[:, None]).unflatten(0, (-1, heads)).mT
        sizes, real = held.sum(-1) * x.shape[2], held.repeat_interleave(x.shape[2], -1)
    # The tiny addend undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    k = (sizes.double() * share / 2 + 1e-9).long()
    most = int(k.max())
    if not most:
        return None
    found, real = torch.zeros_like(vectors, dtype=torch.bool), real.to(x.device)
    wanted = (torch.arange(most) < k[..., None]).to(x.device).expand(*vectors.shape[:2], most)
    for sign in (1, -1):
        best = (sign * vectors).masked_fill(~real, -torch.inf).topk(most, -1).indices
        found |= torch.zeros_like(found).scatter_(-1, best, wanted)
    if over == "tokens":
        return found.mT
    return found.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)


def low_rank(error: torch.Tensor, rank: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading directions of fp32 [.., n, D] by power iteration: a [.., n, rank], p [.., D, rank], error ~ a @ p^T.

    Each direction's size is shared equally between a and p, so that both stay within float16.
    """
    # The same start for every head: a row of a batch gets what it would get alone.
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(error.shape[-1], rank, generator=generator).to(error.device)
    for _ in range(rounds):
        # The authors do so in the last round alone, where small directions may be gone already.
        p = torch.linalg.qr(p).Q
        a = torch.linalg.qr(error @ p).Q
        p = error.mT @ a
    size = p.norm(dim=-2, keepdim=True).sqrt()
    return a * size, torch.where(size > 0, p / size, 0)


def _fit(error: torch.Tensor, blocks: torch.Tensor, rank: int, rounds: int) -> LowRank:
    """One fit per run that has blocks: error fp32 [N, T, D], run by run; blocks int64 [runs] on the CPU."""
    blocks = blocks[blocks > 0]
    most = int(blocks.max())
    if bool((blocks == most).all()):
        a, p = low_rank(error.unflatten(0, (-1, most)).flatten(1, 2), rank, rounds)
        a = a.unflatten(1, (most, -1)).flatten(0, 1)
    else:  # blocks that a run has not are 0 and take nothing
        real = (torch.arange(most) < blocks[:, None]).to(error.device)
        padded = error.new_zeros(*real.shape, *error.shape[1:])
        padded[real] = error
        a, p = low_rank(padded.flatten(1, 2), rank, rounds)
        a = a.unflatten(1, (most, -1))[real]
    chunk = torch.arange(len(blocks)).repeat_interleave(blocks).to(error.device, torch.int32)
    return LowRank(a.half(), p.half(), chunk)


def _singles(error: torch.Tensor, where: torch.Tensor) -> Sparse:
    """What is left of the error [N, T, D] at the entries `where`, block by block."""
    count = where.sum((1, 2))
    at = where.flatten(1).nonzero()[:, 1]
    delta = error[where].clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    return Sparse((count.cumsum(0) - count).int(), count.int(), at.short(), delta)
