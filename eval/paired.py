"""Differences between methods that met the same problems, with intervals that use the pairing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .bootstrap import interval


def difference(ours: Mapping[Any, bool], theirs: Mapping[Any, bool]) -> tuple[float, float, float, int]:
    """Success of `ours` minus `theirs` on the problems that both met, with its paired-bootstrap 95 % interval.

    Keys name the problems (task, seed). Returns (difference, low, high, n), all in -1..1; (0, -1, 1, 0) without a
    common problem.
    """
    common = sorted(set(ours) & set(theirs))
    if not common:
        return 0.0, -1.0, 1.0, 0
    pairs = np.array([int(ours[key]) - int(theirs[key]) for key in common])
    return *interval(pairs, np.ones(len(pairs)), -1.0), len(pairs)
