"""The tables of diffusion language models."""

from __future__ import annotations

from table_rows import Row, markdown, rows


def decoding() -> str:
    """What a rule and a cache save, at two lengths."""
    lengths = [{_arm(row): row for row in rows(f"dlm-{length}.json")} for length in (256, 1024)]
    lines = []
    for arm in lengths[0]:
        pair = [found[arm] for found in lengths if arm in found]
        told = [" / ".join(f"{100 * row['accuracy']:.0f}" for row in pair) + " %"]
        for what in ("forwards", "query_tokens", "seconds"):
            told.append(" / ".join(_times(row[f"{what}_ratio"]) for row in pair))
        lines.append([arm, *told])
    return markdown(["cache + rule", "right, 256 / 1,024", "forwards", "query tokens", "seconds"], lines)


def decoding_hard() -> str:
    """The same arms on problems that the guide knows, and on longer ones that it does not."""
    easy, hard = ({_arm(row): row for row in rows(f"dlm-{name}.json")} for name in ("256", "hard"))
    lines = []
    for arm in (one for one in hard if one in easy):
        pair = easy[arm], hard[arm]
        told = [" / ".join(f"{100 * row['accuracy']:.0f}" for row in pair) + " %"]
        told += [f"{100 * hard[arm]['low']:.0f} to {100 * hard[arm]['high']:.0f} %"]
        told += [" / ".join(f"{100 * row['equal']:.0f}" for row in pair) + " %"]
        for what in ("forwards", "query_tokens", "seconds"):
            told.append(" / ".join(_times(row[f"{what}_ratio"]) for row in pair))
        lines.append([arm, *told])
    heads = ["cache + rule", "right, easy / hard", "hard, 95 %", "answers of `none`"]
    return markdown([*heads, "forwards", "query tokens", "seconds"], lines)


def dlm_loop() -> str:
    """What a step costs outside of the model."""
    lines = []
    for row in rows("dlm-loop.json"):
        told = [f"{row['model']}, {row['layers']} layers", f"`{row['method']}`", f"{row['calls']:.0f}"]
        told += [f"{1000 * row['seconds_outside']:.2f}", f"{1000 * row['seconds_forward']:.1f}"]
        lines.append([*told, f"{row['overhead']:.1%}".replace("%", " %")])
    return markdown(["model", "cache", "operations outside", "ms outside", "ms of a forward", "share"], lines)


def dlm_frozen() -> str:
    """What reading frozen slots costs that a method holds."""
    lines = []
    for row in rows("dlm-frozen-read.json"):
        told = [f"{row['model']}, {row['layers']} layers", f"`{row['method']}`", f"{row['calls_forward']:,.0f}"]
        lines.append([*told, f"{1000 * row['seconds_forward']:,.1f}", f"{row.get('frozen_ratio', 1):.2f}"])
    return markdown(["model", "cache", "operations in a forward", "ms of a forward", "x of `freecache`"], lines)


def _arm(row: Row) -> str:
    """The arm's name, the same at every length."""
    if row["steps"] == row["gen_length"]:
        return f"`{row['arm']}`"
    # A quarter of 50 steps is 12.
    return f"`none`, {1 / round(row['gen_length'] / row['steps']):.0%} of the steps".replace("%", " %")


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def fast_dllm() -> str:
    """The authors' Fast-dLLM and ours on the same weights, in turns."""
    found = rows("dlm-peer.json")
    theirs = {(row["model"], row["method"]): row for row in found if row["library"] != "ours"}
    lines = []
    for row in found:
        if row["library"] == "ours":
            pair = [row, theirs[row["model"], row["method"]]]
            told = [" / ".join(f"{one[what]:,.0f}" for one in pair) for what in ("calls_forward", "calls")]
            told += [" / ".join(f"{1000 * one['seconds_step']:,.1f}" for one in pair)]
            told += [f"{row[what]:.2f}" for what in ("forward_ratio", "step_ratio", "equal_tokens")]
            told += [f"{row['overhead']:.1%}".replace("%", " %")]
            lines.append([f"{row['model']}, {row['layers']} layers", f"`{row['method']}`", *told])
    heads = ["model", "cache", "operations in a forward, ours / theirs", "outside", "ms a step"]
    return markdown([*heads, "forward, x", "step, x", "equal tokens", "ours outside"], lines)


def batch_rows() -> str:
    """Sixteen rows of very different lengths together and one by one."""
    lines = []
    for row in rows("dlm-rows.json"):
        told = [f"{row['query_tokens']:,} / {row['needed_tokens']:,}", f"{row['excess']:.3f}"]
        told += [f"{row['seconds']:.1f} / {row['seconds_alone']:.1f}", f"{row['seconds_ratio']:.2f}"]
        equal = f"{row['equal']:.0%}".replace("%", " %")
        lines.append([f"`{row['method']}`", f"{row['forwards']} / {row['forwards_alone']}", *told, equal])
    heads = [
        "cache + rule", "forwards, batch / alone", "query tokens, computed / needed", "x",
        "seconds, batch / alone",
    ]  # fmt: skip
    return markdown([*heads, "times faster", "rows equal"], lines)
