"""The curve of a study: success against the bytes that were really held, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first: there may be no screen
from matplotlib.figure import Figure  # noqa: E402

from textkv.command import write_bytes  # noqa: E402

FULL = "full"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)


def draw_curve(
    rows: Sequence[dict[str, Any]],
    path: Path,
    groups: Sequence[tuple[str, str]] = (("web", "web tasks"), ("memory", "memory pages")),
    figure_name: str = "success",
    module: str = "eval.webtasks",
) -> None:
    """Write a PNG with one panel per group of tasks: x = share of the full cache's bytes (log), y = `figure_name` with
    its 95 % interval; the full cache is a line across.

    rows: flat dicts with method, task, kv_share, `figure_name`, low, high; `groups`: (task, title) per panel; `module`:
    the command that draws.
    """
    width = 1.5 + 4.75 * len(groups)
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(width, 4.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, (group, title) in zip(panels[0], groups, strict=True):
        _panel(panel, [row for row in rows if row["task"] == group], figure_name)
        panel.set(title=title, xscale="log", xlabel="KV bytes at rest, share of the full cache", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
        # A log axis over little more than a decade labels its minor ticks too, on top of one another.
        panel.set_xticks(TICKS, [f"{x:.0%}" for x in TICKS])
        panel.set_xticks([], minor=True)
        panel.set_xlim(*_limits(rows))
    panels[0, 0].set_ylabel(f"{figure_name} (95 % interval)")
    panels[0, -1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path, module)


def save(figure: Figure, path: Path, module: str) -> None:
    """Write the picture, which says that `python -m module` drew it (see `textkv.command.results`)."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format="png", metadata={"Software": f"python -m {module}"})
    write_bytes(path, drawn.getvalue())
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """One line per method. More methods than colours get other dashes, so that no two lines look alike."""
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != FULL]
    for number, method in enumerate(methods):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["kv_share"])
        values = [row[name] for row in points]
        bars = [[row[name] - row["low"] for row in points], [row["high"] - row[name] for row in points]]
        panel.errorbar(
            [row["kv_share"] for row in points], values, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.4,
            linestyle=("-", "--", ":", "-.")[number // 10 % 4], label=method,
        )  # fmt: skip
    for row in rows:
        if row["method"] == FULL:
            panel.axhline(row[name], color="0.4", linestyle="--", linewidth=1, label="full cache")


def _limits(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Where the axis of bytes begins and ends: a little beyond what is drawn, the same in all panels."""
    shares = [row["kv_share"] for row in rows if row["method"] != FULL and "kv_share" in row] or [1.0]
    return 0.9 * min(shares), 1.1 * max(shares)
