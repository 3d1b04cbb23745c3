"""Intervals of shares: how sure a success rate of n episodes is."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution: a two-sided 95 % interval


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927): (low, high), both in 0..1; (0, 1) when nothing was played.

    Raises ValueError when `successes` is not within 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is outside 0..{n}; pass the number of episodes that succeeded")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the bound is 0 or 1 exactly; rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)
