"""Which neighbouring layers share atoms: those between which the model's mind changes least (section 3, step B1).

The paper leaves open which way round the divergence goes, whether the final norm is used, and where to cut. Here:
KL(p_l || p_l+1) with the final norm, p averaged over the calibration texts, and the cuts that leave the least drift
inside groups of at least two layers, found by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 2


def drift(log_p: Tensor) -> Tensor:
    """KL(p_l || p_l+1) in nats [layers - 1] of log-probabilities [layers, vocabulary]."""
    return (log_p[:-1].exp() * (log_p[:-1] - log_p[1:])).sum(-1)


def check_groups(groups: int, layers: int, smallest: int = SMALLEST) -> None:
    """Raises ValueError where `layers` do not make `groups` of at least `smallest`."""
    most = layers // smallest
    if most < 1:
        raise ValueError(f"{layers} layers are fewer than the {smallest} of one group; use fewer atoms or more layers")
    if not 1 <= groups <= most:
        least = "a group of one layer" if smallest == SMALLEST else f"a group of fewer than {smallest} layers"
        raise ValueError(f"groups={groups} of {layers} layers would leave {least}; use 1 to {most}")


def cut(drifts: Sequence[float] | Tensor, groups: int, smallest: int = SMALLEST) -> list[tuple[int, int]]:
    """(first, past the last) of each group of layers, so that the drift inside groups is least.

    Args:
        drifts: between neighbours, [layers - 1].
        smallest: layers that every group has at least.

    Raises:
        ValueError: groups that would be smaller, or drifts that are not finite.
    """
    drifts = torch.as_tensor(drifts, dtype=torch.float64)
    layers = len(drifts) + 1
    check_groups(groups, layers, smallest)
    if not bool(drifts.isfinite().all()):
        raise ValueError("drifts are not all finite; the model's own outputs are not, take other weights")
    inside = torch.cat([drifts.new_zeros(1), drifts.cumsum(0)]).tolist()
    # best[n][k]: least drift of the first n layers in k groups, and where the last of them begins.
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for count in range(1, groups + 1):
        for stop in range(count * smallest, layers + 1):
            tried = [
                (best[start, count - 1][0] + inside[stop - 1] - inside[start], start)
                for start in range(stop - smallest + 1)
                if (start, count - 1) in best
            ]
            if tried:
                best[stop, count] = min(tried)
    made, stop = [], layers
    for count in range(groups, 0, -1):
        start = best[stop, count][1]
        made.append((start, stop))
        stop = start
    return made[::-1]
