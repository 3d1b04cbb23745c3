"""What every `--json` carries besides its figures: the record that makes them repeatable (command, commit, versions,
hardware, seed), and the interval of a share.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from math import sqrt
from pathlib import Path
from typing import Any

import torch

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution: a two-sided 95 % interval
PACKAGES = ("agentkv", "torch", "transformers", "triton", "optimum-quanto", "hqq", "playwright", "gymnasium", "miniwob")


def run_meta(module: str, argv: Sequence[str], seed: int, **more: Any) -> dict[str, Any]:
    """The "meta" of a run of `python -m module argv`, plus whatever the command adds."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
        "hardware": _hardware(),
        "seed": seed,
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD of the checkout that this file lies in, with "+changes" when the tree differs; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if head.returncode == 0 else None


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"{_cpu_name()}, {os.cpu_count()} CPU cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


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
