"""Provenance: what every `--json` carries besides its figures, the record that makes them repeatable (command, commit,
versions, hardware, seed).
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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
