"""The tables of text methods on a real model."""

from __future__ import annotations

from collections import defaultdict

from table_rows import Row, markdown, rows

AT = "0.25"
LENGTHS = {1024: "", 2048: "-2048", 4096: "-4096"}


def _found(name: str) -> dict[str, dict[str, Row]]:
    """Of each method at a quarter, or of one without a budget: the row of all tasks, by how it was asked."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows(name):
        if row["task"] == "all" and "recall" in row and row["budget"] in (AT, "1.0"):
            cells.setdefault(row["method"], {})[row["asked"]] = row
    return cells


def board() -> str:
    """SmolLM2 at a quarter of the cache, the question known and unknown; methods without a budget too."""
    lines = []
    for method, asked in sorted(
        _found("text-board-smollm2.json").items(), key=lambda cell: -cell[1]["known"]["recall"]
    ):
        known = asked["known"]
        shares = [f"{asked[kind]['recall']:.2f}" if kind in asked else "-" for kind in ("known", "unknown")]
        host = known.get("host_bytes", 0) / known["kv_bytes_full"]
        told = [f"{known['low']:.2f} to {known['high']:.2f}", str(known["n"]), f"{known['kv_share']:.2f}"]
        lines.append([f"`{method}`", *shares, *told, f"{host:.2f}" if host else ""])
    heads = ["method at 0.25", "known", "unknown", "95 % (known)", "questions", "bytes of full", "on the host"]
    return markdown(heads, lines)


def lengths() -> str:
    """SmolLM2 at a quarter of the cache and three lengths of the prompt: the question known / unknown."""
    at = {n: _found(f"text-board-smollm2{end}.json") for n, end in LENGTHS.items()}
    methods = sorted(at[4096], key=lambda method: -at[4096][method]["known"]["recall"])
    lines = []
    for method in methods:
        pairs = [
            " / ".join(f"{cells[method][kind]['recall']:.2f}" for kind in ("known", "unknown")) for cells in at.values()
        ]
        last = at[4096][method]["known"]
        lines.append([f"`{method}`", *pairs, f"{last['low']:.2f} to {last['high']:.2f}", f"{last['kv_share']:.2f}"])
    counts = {n: next(iter(cells.values()))["known"]["n"] for n, cells in at.items()}
    heads = [f"{n:,} tokens, n {counts[n]}" for n in at]
    return markdown(["method at 0.25", *heads, "95 % (4,096, known)", "bytes of full"], lines)


def streams() -> str:
    """Perplexity by stretch of a stream of 32,768 tokens through 512 slots."""
    found = rows("text-stream-smollm2.json")
    ends = sorted({row["to"] for row in found})
    shown = [ends[i] for i in (0, 1, 3, 7, 11, 15)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in found):
        at = {row["to"]: row for row in found if row["method"] == method}
        lines.append([f"`{method}`", *(f"{at[end]['perplexity']:.4g}" for end in shown)])
        lines[-1].append(f"{at[ends[-1]]['kv_bytes'] / 1e6:.1f}")
    return markdown(["method", *(f"to {end:,}" for end in shown), "MB held at the end"], lines)


def prose() -> str:
    """Perplexity of what follows a prompt of real prose and the error of attention's outputs, by what was kept."""
    at: dict[str, dict] = defaultdict(dict)
    for row in rows("text-prose-smollm2.json"):
        if row["task"] == "text":
            at[row["method"]][row["budget"]] = row
    lines = []
    for method, of in sorted(at.items(), key=lambda x: x[1].get(AT, x[1].get("1.0"))["perplexity"]):
        # A method that drops nothing is the same at every budget.
        held = [of.get(budget, of.get("1.0")) for budget in ("0.5", AT, "0.1")]
        lines.append([f"`{method}`", *(f"{row['perplexity']:.2f} ({row['error']:.3f})" for row in held)])
        lines[-1] += [f"{held[1]['kv_bits']:.1f}", f"{held[1]['kv_share']:.2f}"]
    heads = ["method", "at 0.5", "at 0.25", "at 0.1", "bits per element at 0.25", "bytes of full at 0.25"]
    return markdown(heads, lines)
