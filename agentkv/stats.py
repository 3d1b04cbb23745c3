"""Rows of figures from finished episodes: success with its interval, tokens, KV bytes, seconds per step.

Input is what the traces hold (one dict per step, see `agentkv.trace`), so a summary can be drawn again from a run
folder without playing anything. Nothing here touches a model, a browser or the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from textkv.intervals import wilson

# What is averaged over the steps of all episodes; the names are the ones that every command's --json uses.
STEP_MEANS = (
    "prefill_tokens",
    "decode_tokens",
    "tokens_seen",
    "tokens_stored",
    "kv_bytes",
    "kv_bytes_full",
    "seconds_prefill",
    "seconds_decode",
    "seconds_browser",
)

UNITS = {
    "success": "share of episodes with raw reward 1; low, high: Wilson 95 % interval",
    "steps": "mean per episode",
    "prefill_tokens, decode_tokens, tokens_seen, tokens_stored": "mean per step; tokens_stored also over heads",
    "kv_bytes": "bytes held right after the prompt was compressed, mean per step",
    "kv_bytes_full": "bytes of the uncompressed cache at the same moment, mean per step",
    "kv_share": "kv_bytes / kv_bytes_full",
    "kv_bytes_peak": "most bytes held at any moment of any step",
    "seconds_prefill, seconds_decode, seconds_browser": "mean per step; seconds: their sum",
    "parse_failures, stops": "count over all episodes",
}


def summarise(episodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per method and task, and one per method with task "all", in order of first appearance.

    An episode is a dict with "method", "budget", "task", "success", "stop", "crashes" and "steps" (a list of step
    dicts). Steps of a policy without a model (an oracle) have no figures of tokens and bytes: they count as 0.
    """
    rows = []
    for method in dict.fromkeys(e["method"] for e in episodes):
        mine = [e for e in episodes if e["method"] == method]
        for task in dict.fromkeys(e["task"] for e in mine):
            rows.append(_row(method, task, [e for e in mine if e["task"] == task]))
        rows.append(_row(method, "all", mine))
    return rows


def _row(method: str, task: str, episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = [s for e in episodes for s in e["steps"]]
    won = sum(bool(e["success"]) for e in episodes)
    low, high = wilson(won, len(episodes))
    row: dict[str, Any] = {"method": method, "budget": episodes[0]["budget"], "task": task, "n": len(episodes)}
    row |= {"success": won / len(episodes), "low": low, "high": high}
    row["steps"] = fmean(len(e["steps"]) for e in episodes)
    row |= {name: fmean(s.get(name, 0) for s in steps) if steps else 0.0 for name in STEP_MEANS}
    row["kv_share"] = row["kv_bytes"] / row["kv_bytes_full"] if row["kv_bytes_full"] else 0.0
    row["kv_bytes_peak"] = max((s.get("kv_bytes_peak", 0) for s in steps), default=0)
    row["seconds"] = row["seconds_prefill"] + row["seconds_decode"] + row["seconds_browser"]
    row["parse_failures"] = sum(bool(s.get("parse_error")) for s in steps)
    row["crashes"] = sum(e.get("crashes", 0) for e in episodes)
    for stop in dict.fromkeys(e["stop"] for e in episodes):
        row[f"stop_{stop.replace(' ', '_')}"] = sum(e["stop"] == stop for e in episodes)
    return row
