"""Exact tokens beside packed ones: on a CPU in the same softmax, which costs a decoded token less than an attention of
their own and a merge; elsewhere that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._backend import FLOATS, check_tensor
from .decode_attention import decode_attention
from .merge import merge
from .window_mass import window_mass

_CAST = 256  # tokens that are made fp32 for it, at most, at every call

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Exact:
    """Exact tokens that all queries see beside the packed ones, and what is asked for.

    Attributes:
        pairs: keys and values [B, G, r, D] in the queries' dtype, pair by pair.
        q: [B, H, m, D] that these keys are multiplied with, where packed keys are balanced and need other queries; None
            = the queries of the packed tokens.
        lse: False spares making it where it costs anything; None may come back in its place.
        row: return as well what the last query looked at of the last pair: weights fp32 [B, H, r].
    """

    pairs: Pairs
    q: torch.Tensor | None = None
    lse: bool = True
    row: bool = False


@dataclass(frozen=True)
class Beside(Exact):
    """The same for a CPU's path.

    Attributes:
        centre: fp32 [B * G, D], what the packed keys lack; its dims before `still` turn, and are taken care of.
    """

    centre: torch.Tensor | None = None
    still: int = 0

    @property
    def is_cheap(self) -> bool:
        """Whether little has to be made fp32 for it."""
        keys = self.pairs[0][0]
        return keys.dtype == torch.float32 or sum(keys.shape[2] for keys, _ in self.pairs) <= _CAST

    def at(self, rows: torch.Tensor, exact: torch.Tensor) -> Tokens:
        """For scaled queries fp32 [runs, x, D], those of the packed tokens and of these."""
        tokens = [(k.flatten(0, 1).float(), v.flatten(0, 1).float()) for k, v in self.pairs]
        shift = None
        if self.centre is not None and self.still < rows.shape[2]:
            shift = torch.bmm(rows[..., self.still :], self.centre[:, self.still :, None])
        return Tokens(exact, tokens, shift)


@dataclass(frozen=True)
class Tokens:
    """Exact tokens as they are multiplied.

    Attributes:
        rows: fp32 [runs, x, D], scaled queries.
        pairs: keys and values fp32 [runs, r, D].
        shift: fp32 [runs, x, 1] or None, what the scores of the packed tokens lack, and hence these must.
    """

    rows: torch.Tensor
    pairs: Pairs
    shift: torch.Tensor | None

    def scores(self) -> list[torch.Tensor]:
        """fp32 [runs, x, r] of each pair."""
        found = [torch.bmm(self.rows, keys.mT) for keys, _ in self.pairs]
        return found if self.shift is None else [x.sub_(self.shift) for x in found]

    def add(self, out: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds the values of all pairs, by weights fp32 [runs, x, sum of r], to out fp32 [runs, x, D]."""
        first = 0
        for _, values in self.pairs:
            out.baddbmm_(weights[..., first : first + values.shape[1]], values)
            first += values.shape[1]


def merge_exact(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, exact: Exact, scale: float, softcap: float | None
) -> tuple[torch.Tensor, ...]:
    """Attention over other tokens, `out` [B, H, m, D] and `lse` fp32 [B, H, m], with that over the exact ones: out and
    lse, and the weights of the last query if `exact.row` asks for them."""
    pairs, q = exact.pairs, q if exact.q is None else exact.q
    outs, lses = [out], [lse]
    for keys, values in pairs:
        own = decode_attention(q, keys, values, scale=scale, softcap=softcap)
        outs, lses = [*outs, own[0]], [*lses, own[1]]
    out, lse = merge(outs, lses)
    if not exact.row:
        return out, lse
    mass = window_mass(q[:, :, -1:], pairs[-1][0], scale=scale, softcap=softcap)
    return out, lse, mass * (lses[-1] - lse)[..., -1:].exp()


def check_beside(pairs: Pairs, q: torch.Tensor, groups: int) -> None:
    """Raise ValueError on bad exact keys and values."""
    shape = (q.shape[0], groups, "r", q.shape[3])
    for i, (keys, values) in enumerate(pairs):
        check_tensor(f"beside[{i}][0]", keys, shape, FLOATS, q)
        check_tensor(f"beside[{i}][1]", values, tuple(keys.shape), (q.dtype,), q)
        if keys.dtype != q.dtype:
            raise ValueError(f"beside[{i}][0] is {keys.dtype} and q is {q.dtype}; give keys of q's dtype")
