"""What the paths on a CPU share: how many tokens go together, what a turning centre needs of some runs, and the softmax
of scores that are all there, with its log-sum-exp, in the passes of one softmax and two maxima."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=256, typed=True)
def number(x: float) -> torch.Tensor:
    """A plain number as operators take it, fp32 or int32, without dims: they make one of it at every call, by four
    operators more."""
    with torch.inference_mode(False):  # what is made in that mode cannot take part in gradients
        return torch.tensor(x, dtype=torch.int32 if isinstance(x, int) else torch.float32, device="cpu")


def rows_of(q: torch.Tensor, runs: int, scale: float, one_more: bool) -> torch.Tensor:
    """q [B, H, m, D] as scaled fp32 [runs, x, D], and a row of zeros behind the others if `one_more`."""
    rows = q.reshape(runs, -1, q.shape[-1]).float()
    if not one_more:
        return rows * number(scale)
    made = rows.new_zeros(runs, rows.shape[1] + 1, rows.shape[2])
    torch.mul(rows, number(scale), out=made[:, :-1])
    return made


def tokens_together(n: int, about: int, most: int, unit: int = 1) -> int:
    """How many of n tokens to read at a time, a multiple of `unit`: nearly equal parts of `about` so many, for a last
    part of a few tokens costs what a whole one does, and no more than `most`."""
    parts = max(1, round(n / about))
    return max(unit, min(-(-n // (parts * unit)), most // unit) * unit)


def turn_of(turn: tuple, some: slice) -> tuple:
    """What belongs to some of the runs: `turn` (centre, inv_freq, positions, axes) as if there were no others."""
    centre, inv_freq, positions, axes = turn
    runs, (batch, heads) = len(centre), positions.shape[1:3]
    if batch * heads > 1:
        positions = positions.expand(-1, -1, runs // batch, -1).flatten(1, 2)[:, some, None]
    return centre[some], inv_freq[some], positions, axes


def weights_of(
    scores: torch.Tensor, seen: torch.Tensor | None, need_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of the scores.

    Args:
        scores: fp32 [R, x, n]; overwritten.
        seen: bool [R, n], the others get no weight whatever their scores are; None = all.
        need_lse: False spares it where it is work of its own.

    Returns:
        Weights fp32 [R, x, n] and lse [R, x]; 0 and -inf where a query sees nothing.
    """
    if seen is not None:
        scores.masked_fill_(~seen[:, None], -torch.inf)
    elif not need_lse:
        return scores.softmax(-1), None
    top = scores.amax(-1)
    weights = scores.softmax(-1)
    lse = top - weights.amax(-1).log()  # what the largest score has become tells the sum of all
    if seen is not None:  # of a query that sees nothing, all this is NaN
        nothing = top == -torch.inf
        weights, lse = weights.masked_fill_(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    return weights, lse
