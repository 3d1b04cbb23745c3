"""Intervals from resampling: how sure a mean is, when what was drawn is drawn again with replacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def interval(values: np.ndarray, weights: np.ndarray, floor: float, ceiling: float = 1.0) -> tuple[float, float, float]:
    """(mean, low, high), 95 %: the weighted mean of `values` [n], units and their weights resampled together.

    With every unit alike the bootstrap would claim certainty, so the interval is never narrower than the rule of three
    allows (3 / n); it stays within `floor` and `ceiling`.
    """
    (mean, low, high), least = resampled(values, weights), 3 / len(values)
    return mean, max(floor, min(low, mean - least)), min(ceiling, max(high, mean + least))


def resampled(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float, float]:
    """(mean, low, high), 95 %, of `values` [n] that are no shares, as losses in nats; `weights` None = all alike."""
    n = len(values)
    weights = np.ones(n) if weights is None else weights
    picked = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    draws = (values * weights)[picked].sum(1) / weights[picked].sum(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float((values * weights).sum() / weights.sum()), float(low), float(high)


def clustered(clusters: Sequence[Sequence[float]], floor: float = 0.0) -> tuple[float, float, float]:
    """(mean, low, high) of scores of `floor` to 1 in clusters that are drawn as wholes, as steps of one task are: the
    mean is over all scores. A single cluster is taken apart, and its interval is of that cluster only.
    """
    parts = [list(cluster) for cluster in clusters if len(cluster)]
    if len(parts) == 1:
        parts = [[score] for score in parts[0]]
    if not parts:
        return 0.0, floor, 1.0
    means = np.array([sum(part) / len(part) for part in parts])
    return interval(means, np.array([float(len(part)) for part in parts]), floor)
