"""The curve of a study: success against the bytes that were really held, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first: there may be no screen

GROUPS = (("web", "web tasks"), ("memory", "memory pages"))


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with one panel per group of tasks: x = share of the full cache's bytes (log), y = success with its
    95 % interval; the full cache is a line across.

    rows: flat dicts with method, task ("web" or "memory"), kv_share, success, low, high.
    """
    figure, panels = pyplot.subplots(1, len(GROUPS), figsize=(11, 4.4), sharey=True, layout="constrained")
    for panel, (group, title) in zip(panels, GROUPS, strict=True):
        mine = [row for row in rows if row["task"] == group]
        for method in dict.fromkeys(row["method"] for row in mine):
            points = sorted((row for row in mine if row["method"] == method), key=lambda row: row["kv_share"])
            if method == "full":
                panel.axhline(points[0]["success"], color="0.4", linestyle="--", linewidth=1, label="full cache")
                continue
            success = [row["success"] for row in points]
            bars = [[row["success"] - row["low"] for row in points], [row["high"] - row["success"] for row in points]]
            shares = [row["kv_share"] for row in points]
            panel.errorbar(shares, success, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.4, label=method)
        panel.set(title=title, xscale="log", xlabel="KV bytes at rest, share of the full cache", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("success (95 % interval)")
    panels[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
