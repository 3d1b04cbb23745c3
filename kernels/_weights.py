"""The softmax of scores that are all there, with its log-sum-exp, in the passes of one softmax and two maxima."""

from __future__ import annotations

import torch


def weights_of(scores: torch.Tensor, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of the scores.

    Args:
        scores: fp32 [R, x, n]; overwritten.
        seen: bool [R, n], the others get no weight whatever their scores are; None = all.

    Returns:
        Weights fp32 [R, x, n] and lse [R, x]; 0 and -inf where a query sees nothing.
    """
    if seen is not None:
        scores.masked_fill_(~seen[:, None], -torch.inf)
    top = scores.amax(-1)
    weights = scores.softmax(-1)
    lse = top - weights.amax(-1).log()  # what the largest score has become tells the sum of all
    if seen is not None:  # of a query that sees nothing, all this is NaN
        nothing = top == -torch.inf
        weights, lse = weights.masked_fill_(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    return weights, lse
