"""Differences between methods that met the same problems, with intervals that use the pairing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000


def difference(ours: Mapping[Any, bool], theirs: Mapping[Any, bool], seed: int = 0) -> tuple[float, float, float, int]:
    """Success of `ours` minus `theirs` on the problems that both met, with its paired-bootstrap 95 % interval.

    Keys name the problems (task, seed). Returns (difference, low, high, n), all in -1..1; (0, -1, 1, 0) without a
    common problem. With every pair alike the bootstrap would claim certainty, so the interval is never narrower than
    the rule of three allows (3 / n).
    """
    common = sorted(set(ours) & set(theirs))
    if not common:
        return 0.0, -1.0, 1.0, 0
    pairs = np.array([int(ours[key]) - int(theirs[key]) for key in common])
    draws = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = np.percentile(pairs[draws].mean(1), [2.5, 97.5])
    mean, least = float(pairs.mean()), 3 / len(pairs)
    return mean, max(-1.0, min(float(low), mean - least)), min(1.0, max(float(high), mean + least)), len(pairs)
