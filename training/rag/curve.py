"""The curve of trainings by reward: reward and exact match of the answers drawn, against seconds of CPU time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first: there may be no screen

_SMOOTH = 9  # steps that a point is the mean of


def draw(
    curves: dict[str, list[list[dict]]], rows: Sequence[dict[str, Any]], path: Path, module: str, method: str = "porag"
) -> None:
    """Write a PNG: a thin line for each seed of `method`, and what was measured on held-out tasks as levels.

    Args:
        curves: logged steps by method and seed, with `plain_reward`, `exact_match` and `cpu_seconds`.
        rows: means by method, with `reward` and `exact_match`.
        module: the command that draws.
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = (("plain_reward", "reward", "reward"), ("exact_match", "exact_match", "exact match"))
    for panel, (logged, measured, title) in zip(panels, shown, strict=True):
        for number, steps in enumerate(curves.get(method, [])):
            values = np.array([step[logged] for step in steps if logged in step])
            clock = np.array([step["cpu_seconds"] for step in steps if logged in step])
            width = max(1, min(_SMOOTH, len(values)))
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            panel.plot(clock[width - 1 :], smooth, linewidth=1.2, label=f"{method}, drawn, run {number + 1}")
        for place, row in enumerate(rows):
            panel.axhline(
                row[measured], linestyle="--", linewidth=1, color=f"C{5 + place}", label=f"{row['method']}, held out"
            )
        panel.set(title=title, xlabel="seconds of CPU time", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png", metadata={"Software": f"python -m {module}"})
    part.replace(path)
    pyplot.close(figure)
