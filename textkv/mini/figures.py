"""What a `--json` carries besides its rows: the record of the run; and the interval of a share."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from math import sqrt
from typing import Any

import torch

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution: a two-sided 95 % interval


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of a share (Wilson 1927): (low, high) within 0..1; (0, 1) when n is 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is outside 0..{n}; pass how many of the {n} were right")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, Z95 * Z95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * sqrt(share * (1 - share) / n + spread / (4 * n))
    # At 0 and n the bound is 0 or 1 exactly; rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def run_meta(module: str, argv: Sequence[str], seed: int, device: str) -> dict[str, Any]:
    """Command, versions, hardware and first seed of `python -m module argv`."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    there = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": f"{there}, {os.cpu_count()} CPU cores",
        "seed": seed,
    }
