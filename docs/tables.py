"""`python docs/tables.py` (`make tables`): tables of results.md, rag.md and serving.md from the rows of JSON files.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; `TABLES` says how it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from table_rows import HERE, Row, markdown, rows
from tables_dlm import batch_rows, decoding, decoding_hard, dlm_frozen, dlm_loop, fast_dllm
from tables_text import board, lengths, prose, streams

PAGES = (HERE / "results.md", HERE / "rag.md", HERE / "serving.md")
_PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def agents() -> str:
    """Success at a tenth of the cache, over all tasks, best first."""
    note = {"gui-kv-official": " (a copy per query head)"}
    over_all = [row for row in rows("agent-budget-0.1.json") if row["task"] == "all"]
    full, *others = over_all
    lines = [
        [
            f"`{row['method']}`",
            f"{row['success']:.0%} ({row['low']:.0%} to {row['high']:.0%})".replace("%", " %").replace(" % to", " to"),
            f"{100 * row['kv_share']:.1f} %{note.get(row['method'], '')}",
        ]
        for row in [full, *sorted(others, key=lambda row: -row["success"])]
    ]
    return markdown(["method", "success", "bytes held, of the full cache"], lines)


def curves() -> str:
    """Step accuracy on recorded screens at each budget, best at a twentieth first; what it costs at a tenth."""
    found = [row for row in rows("agent-curves.json") if (row["protocol"], row["type"]) == ("gui_kv", "all")]
    cells = {(row["method"], row["budget"]): row for row in found if row["method"] != "replay"}
    budgets = sorted({budget for _, budget in cells} - {1.0})
    methods = sorted({method for method, _ in cells} - {"full"}, key=lambda x: -cells[x, budgets[0]]["accuracy"])
    full = cells["full", 1.0]  # of no budget, so the same at all
    told = [_within(full, "accuracy", "low", "high")] * len(budgets)
    lines = [["`full`", *told, "", f"{full['kv_bytes'] / 1e3:.0f}"]]
    for method in methods:
        at = [cells[method, budget] for budget in budgets]
        change = _within(at[1], "change", sign="+") if "change" in at[1] else ""
        lines.append([f"`{method}`", *(_within(row, "accuracy", "low", "high") for row in at), change])
        lines[-1].append(f"{at[1]['kv_bytes'] / 1e3:.0f}")
    heads = [f"at {budget:.0%}".replace("%", " %") for budget in budgets]
    return markdown(["method", *heads, "at 10 %, less the first", "KB at 10 %"], lines)


def persistent() -> str:
    """Episodes of forty steps: a cache that lives from step to step beside one that is filled anew."""
    lines = [
        [
            f"`{row['method']}`", row["cache"], str(row["n"]),
            f"{row['success']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            f"{row['prefill_ratio']:.2f}", f"{row['seconds_ratio']:.2f}", f"{row['kv_bytes'] / 1e6:.2f}",
        ]
        for row in sorted(rows("agent-persistent.json"), key=lambda row: row["method"])
        if "step" not in row
    ]  # fmt: skip
    heads = ["method", "cache", "episodes", "success", "tokens read, of the new ones", "seconds from step 5", "MB"]
    return markdown(heads, lines)


def cost() -> str:
    """A decoded token and a prompt beside transformers' own cache."""
    found = rows("text-decode.json")
    lines = []
    for method in dict.fromkeys(row["method"] for row in found):
        at = {row["tokens_seen"]: row for row in found if row["method"] == method}
        decode = [f"{at[n]['decode_ratio']:.2f}" if n in at else "" for n in (1024, 8192, 32768)]
        prompt = f"{at[8192]['prefill_ratio']:.2f}" if 8192 in at else ""
        lines.append([f"`{method}`", f"{at[min(at)]['calls_ratio']:.2f}", *decode, prompt])
    heads = [
        "method, budget 0.5", "operations, x", "decode at 1k, x", "at 8k, x", "at 32k, x",
        "prompt in chunks, 8k, x",
    ]  # fmt: skip
    return markdown(heads, lines)


def masa() -> str:
    """Perplexity against attention weights."""
    lines = [
        [
            f"`{row['method']}`",
            f"{row['attention_parameters']:,}",
            f"{row['attention_share']:.0%}".replace("%", " %"),
            f"{row['perplexity']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        ]
        for row in rows("masa-trained.json")
    ]
    return markdown(["method", "attention weights", "of full", "perplexity"], lines)


def masa_converted() -> str:
    """What fewer attention weights cost SmolLM2 without training."""
    lines = []
    for row in rows("masa-converted.json"):
        within = f"{row['perplexity']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        share = f"{row['attention_share']:.0%}".replace("%", " %")
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        lines.append([f"`{row['method']}`", f"{row['attention_parameters']:,}", share, within, ratio])
    return markdown(["method", "attention weights", "of full", "perplexity", "times full"], lines)


def rag() -> str:
    """Answers by each way of searching, and how they differ from a search every so many tokens."""
    lines = []
    for row in rows("rag.json"):
        told = [f"`{row['method']}`", _within(row, "accuracy", "low", "high"), f"{row['retrievals']:.2f}"]
        told += [f"{row['tokens']:.0f}", f"{row['seconds']:.1f}"]
        for name in ("accuracy_change", "retrievals_change"):
            told.append(_within(row, name, sign="+") if name in row else "")
        lines.append(told)
    heads = [
        "method", "accuracy", "retrievals", "tokens", "seconds", "accuracy less `fixed`",
        "retrievals less `fixed`",
    ]  # fmt: skip
    return markdown(heads, lines)


def porag() -> str:
    """Reward and exact match before and after training, all seeds together."""
    lines = [
        [
            f"`{row['method']}`",
            str(row["seeds"]),
            f"{row['steps']:.0f}",
            f"{row['seconds']:.0f}",
            _within(row, "reward"),
            _within(row, "exact_match"),
            ", ".join(f"{value:.2f}" for value in row["exact_match_of_seeds"]),
        ]
        for row in rows("porag.json")
    ]
    return markdown(["method", "seeds", "steps", "seconds", "reward", "exact match", "of each seed"], lines)


def _within(row: Row, name: str, low: str = "", high: str = "", sign: str = "") -> str:
    """A figure with its interval."""
    figures = (row[name], row[low or f"{name}_low"], row[high or f"{name}_high"])
    mean, least, most = (f"{value:{sign}.2f}" for value in figures)
    return f"{mean} ({least} to {most})"


def peers() -> str:
    """kvpress and ours on the same prompts, a line each way."""
    found = [row for row in rows("peers.json") if "recall" in row]
    cells: dict[tuple[str, float], dict[str, Row]] = {}
    for row in found:
        cells.setdefault((row["method"], row["budget"]), {})[row["library"]] = row
    lines = []
    for (method, budget), by in cells.items():
        if not {"ours", "kvpress"} <= set(by):
            continue
        sides = [by["ours"], by["kvpress"]]
        shared = sides[0].get("overlap")
        told = [
            " / ".join(f"{side[what]:.2f}" for side in sides) for what in ("recall", "digits", "kv_share", "step_ratio")
        ]
        lines.append([f"`{method}`", f"{budget:g}", *told, "" if shared is None else f"{shared:.3f}"])
    heads = [
        "method", "budget", "right, ours / kvpress", "digits", "bytes of full", "a token's seconds, of full",
        "same tokens kept",
    ]  # fmt: skip
    return markdown(heads, lines)


def retrieval() -> str:
    """What indexes find and compare, for drawn keys and those of a real model."""
    found = [row for row in rows("text-retrieval.json") if row["index"] != "exact"]
    datas = list(dict.fromkeys(row["data"] for row in found))
    lines = []
    for index, effort in dict.fromkeys((row["index"], row["effort"]) for row in found):
        at = {row["data"]: row for row in found if (row["index"], row["effort"]) == (index, effort)}
        lines.append([f"`{index}`", str(effort)])
        for data in datas:
            row = at[data]
            lines[-1].append(f"{row['recall']:.2f} at {100 * row['scanned']:.1f} % ({row['error']:.2f})")
    return markdown(["index", "effort", *(f"{data.split()[0]}, {_keys(found, data):,} keys" for data in datas)], lines)


def _keys(found: Sequence[Row], data: str) -> int:
    return next(row["keys"] for row in found if row["data"] == data)


def conversations() -> str:
    """Answers about long conversations under a fixed budget."""
    return _conversations("text-conversations.json")


def conversations_flat() -> str:
    """The same under a budget in tokens, as conversations grow longer."""
    return _conversations("text-conversations-flat.json")


def _conversations(file: str) -> str:
    return markdown(
        ["method", "budget", "tokens", "questions", "right (95 %)", "digits", "MB held", "MB at most", "full, MB"],
        [
            [
                f"`{row['method']}`",
                row["budget"],
                f"{row['tokens']:,}",
                str(row["n"]),
                f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
                f"{row['score']:.2f}",
                *(f"{row[name] / 1e6:.1f}" for name in ("kv_bytes", "kv_bytes_peak", "kv_bytes_full")),
            ]
            for row in rows(file)
        ],
    )


def teams() -> str:
    """What sharing texts between agents saves and changes: a team of three, and one of five."""
    whole = [row for row in rows("text-multiagent.json") if row["agents"] == 5]
    return _teams([*rows("text-team.json"), *whole, *rows("text-crossover.json")])


def thresholds() -> str:
    """The same by the entropy up to which a text is estimated from others."""
    return _teams(rows("text-gamma.json"))


def _teams(found: Sequence[Row]) -> str:
    lines = []
    for row in found:
        short, gamma = row["ttft_ratio_reused"], row.get("gamma")
        lines.append(
            [
                f"`{row['method']}`" + ("" if gamma is None else f" {gamma:g}"),
                str(row["agents"]),
                f"{row['shared']:,}",
                str(row["calls"]),
                f"{row['reuse']:.2f}",
                f"{row['unchanged']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
                f"{row['ttft_ratio']:.2f}",
                "" if short is None else f"{short:.2f}",
            ]
        )
    heads = ["method", "agents", "shared tokens", "calls", "short way", "answers unchanged (95 %)"]
    return markdown([*heads, "first token, x faster", "of calls on the short way"], lines)


def sentences_pool() -> str:
    """SentenceKV with its pool and with all tokens on the host, by whether the question was known."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows("text-sentences-pool.json"):
        if row["task"] in ("needle", "multikey"):
            cells.setdefault((row["method"], row["budget"]), {})[f"{row['asked']} {row['task']}"] = row
    names = [f"{asked} {task}" for asked in ("known", "unknown") for task in ("needle", "multikey")]
    lines = [[f"`{m}`", b, *(f"{at[name]['recall']:.2f}" for name in names)] for (m, b), at in cells.items()]
    heads = [f"{task}, {asked}" for asked, task in (name.split() for name in names)]
    return markdown(["method", "budget", *heads], lines)


def sentences() -> str:
    """SentenceKV by budget, at three lengths: what is found, and the bytes on either side."""
    lengths = (1024, 2048, 4096)
    at = [[row for row in rows(f"text-sentences-{n}.json") if row["task"] == "all"] for n in lengths]
    lines = []
    for cell in zip(*at, strict=True):
        told = [" / ".join(f"{row[name]:.2f}" for row in cell) for name in ("recall", "digits")]
        for name in ("kv_bytes", "host_bytes"):
            told.append(" / ".join(f"{row.get(name, 0) / 1e6:.1f}" for row in cell))
        lines.append([f"`{cell[0]['method']}`", cell[0]["budget"], *told])
    heads = ["method", "budget", "right, 1,024 / 2,048 / 4,096", "digits", "MB on the device", "MB on the host"]
    return markdown(heads, lines)


def served() -> str:
    """Many conversations through one server: what is read again, where turns find their cache."""
    lines = []
    for row in (row for row in rows("serving.json") if row["what"] == "many"):
        found = [f"{row[name]:.0%}".replace("%", " %") for name in ("found_memory", "found_disk")]
        lines.append([_method(row), "yes" if row["disk"] else "no", f"{row['prefill_tokens']:,}", found[0]])
        lines[-1] += [found[1] if row["disk"] else "", f"{row['answers_equal']:,} of {row['n']:,}"]
        lines[-1] += [f"{row['kv_bytes_peak'] / row['memory']:.1%}".replace("%", " %")]
    heads = ["method", "disk tier", "tokens read", "found in memory", "found on disk"]
    return markdown([*heads, "answers equal to the library's", "peak, of the limit"], lines)


def load() -> str:
    """Requests a second and waits of several clients at once, beside the peer."""
    found = [row for row in rows("serving.json") if row["what"] == "load"]
    servers = list(dict.fromkeys(_method(row) for row in found))
    cells = {
        (row["clients"], _method(row)): f"{row['requests_per_second']:.1f}, {row['p50']:.2f} / {row['p95']:.2f}"
        for row in found
    }
    clients = sorted({at for at, _ in cells})
    return markdown(["clients", *servers], [[str(at), *(cells[at, one] for one in servers)] for at in clients])


def _method(row: Row) -> str:
    method = row.get("method") or row["server"]
    return f"`{method}`" + (f" {row['budget']}" if method not in ("full", row.get("server")) else "")


_MADE = (agents, curves, persistent, board, decoding, decoding_hard, dlm_loop, dlm_frozen, fast_dllm, batch_rows, cost)
_MADE += (masa, masa_converted, rag, porag, peers, retrieval, conversations, teams, sentences, served, load)
_MADE += (conversations_flat, thresholds, sentences_pool, lengths, streams, prose)
TABLES: dict[str, Callable[[], str]] = {made.__name__.replace("_", "-"): made for made in _MADE}


def renewed(page: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table that `TABLES` does not know."""
    return _PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
