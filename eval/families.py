"""Which decoder families of transformers the cache serves, and how exactly.

    python -m eval.families --markdown docs/families.md

Builds a tiny random model of every decoder family of the installed transformers and runs methods at the full budget
over uneven forwards against the model's own cache, with windows shorter and longer than the text. For `streaming_llm`
there is an oracle besides: a model of one layer must answer over sinks and last tokens as it answers that shorter text.

`outcome` is "works", "refused" (when the cache is built, in one line), "no config" (no tiny model could be made),
"wrong" (a gap of logits above 1e-4 of their size) or "fails" (an error after the cache was built). The last two are
bugs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from textkv import MethodCache, release
from textkv.command import names, run, write_rows, write_text
from textkv.provenance import run_meta

from .arguments import add_outputs
from .tiny import VOCABULARY, NoConfig, build, families, has_windows

# The text is shorter than what kivi packs at once, so that its cache is exact too.
METHODS = ("full", "snapkv", "adakv", "streaming_llm", "h2o", "kivi(4)")
FORWARDS = (9, 1, 6, 1, 8)
WINDOWS = (None, 6, 64)
BOUND = 1e-4
OUTCOMES = ("works", "refused", "no config", "wrong", "fails")


def check_family(family: str) -> list[dict[str, Any]]:
    """A row for each method: the worst outcome over all windows."""
    rows: dict[str, dict[str, Any]] = {}
    for window in WINDOWS if has_windows(family) else (None,):
        try:
            model = build(family, window)
        except NoConfig as reason:
            found = [_row(family, method, "no config", line=str(reason)) for method in METHODS]
        else:
            found = _checked(model, family)
        for row in found:
            known = rows.get(row["method"])
            if known is None or _rank(row) > _rank(known) or known["outcome"] == "no config":
                rows[row["method"]] = row
    return list(rows.values())


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    order = ("no config", "works", "refused", "wrong", "fails")
    return order.index(row["outcome"]), row["gap"] or 0.0


def _row(family: str, method: str, outcome: str, gap: float | None = None, line: str = "") -> dict[str, Any]:
    return {"family": family, "method": method, "outcome": outcome, "gap": gap, "line": " ".join(line.split())}


def _expected(model: PreTrainedModel) -> torch.Tensor:
    """Logits with the model's own cache.

    Raises:
        NoConfig: the tiny model cannot run even on that.
    """
    try:
        return _logits(model, DynamicCache(config=model.config))
    except Exception as error:  # a guess at its sizes does not fit the family
        raise NoConfig(f"does not run on its own cache: {type(error).__name__}: {str(error)[:120]}") from None


def _checked(model: PreTrainedModel, family: str) -> list[dict[str, Any]]:
    try:
        expected = _expected(model)
    except NoConfig as reason:
        try:
            MethodCache(model, "full")
        except ValueError as error:  # refused all the same
            return [_row(family, method, "refused", line=str(error)) for method in METHODS]
        return [_row(family, method, "no config", line=str(reason)) for method in METHODS]
    return [_check(model, family, method, expected) for method in METHODS]


def _check(model: PreTrainedModel, family: str, method: str, expected: torch.Tensor) -> dict[str, Any]:
    release(model)
    try:
        cache = MethodCache(model, method, 1.0)
    except ValueError as error:
        return _row(family, method, "refused", line=str(error))
    try:
        gap = _gap(_logits(model, cache), expected)
        if method == "streaming_llm":
            gap = max(gap, _stream_gap(family))
    except Exception as error:  # whatever is raised now comes too late, and the table has to say so
        return _row(family, method, "fails", line=f"{type(error).__name__}: {error}")
    return _row(family, method, "works" if gap <= BOUND else "wrong", gap)


def _ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    ids = _ids(sum(FORWARDS))
    return torch.cat([model(part, past_key_values=cache).logits.float() for part in ids.split(FORWARDS, 1)], 1)


def _gap(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


@torch.no_grad()
def _stream_gap(family: str, budget: int = 10, sinks: int = 4, n: int = 26) -> float:
    """A one-layer model's answer through a stream's cache against its answer to the sinks and the last tokens alone."""
    try:
        model = build(family, layers=1, only_full=True)
    except NoConfig:  # nothing to compare; the row of the family itself tells why
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cache = MethodCache(model, "streaming_llm(prefill='exact_stream')", f"{budget}t")
        except ValueError:  # a model of one layer may have no attention at all
            return 0.0
    if cache.context.governed != 1 or len(cache.layers) != 1:
        return 0.0
    ids = _ids(n, seed=1)
    for i in range(n):
        ours = model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
    # The newest token sees sinks, the recent ones before it, and itself.
    recent = budget - sinks + 1
    short = torch.cat([ids[:, :sinks], ids[:, n - recent :]], 1)
    release(model)
    return _gap(ours, model(short, use_cache=False).logits[:, -1])


def markdown(rows: list[dict[str, Any]], meta: dict[str, Any]) -> str:
    """The table: a line per family, a column per method."""
    by_family: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_family.setdefault(row["family"], {})[row["method"]] = row
    totals = Counter(_of_family(of) for of in by_family.values())
    head = [
        "# Decoder families", "",
        f"By `{meta['command']}` with transformers {transformers.__version__}: {len(by_family)} families, "
        + ", ".join(f"{totals.get(name, 0)} {name}" for name in OUTCOMES) + ".",
        "A cell that works shows the largest difference of logits to the model's own cache, as a share of the largest "
        "logit, over uneven forwards, with windows shorter and longer than the text.", "",
        "| family | " + " | ".join(f"`{method}`" for method in METHODS) + " | |",
        "|" + "---|" * (len(METHODS) + 2),
    ]  # fmt: skip
    lines = []
    for family, of in by_family.items():
        cells = [f"{of[m]['gap']:.0e}" if of[m]["outcome"] == "works" else of[m]["outcome"] for m in METHODS]
        said = next((of[m]["line"] for m in METHODS if of[m]["line"]), "")
        lines.append(f"| {family} | " + " | ".join(cells) + f" | {said} |")
    return "\n".join(head + lines) + "\n"


def _of_family(of: dict[str, dict]) -> str:
    """A family's own outcome: the worst, but refused only where every method is."""
    found = [row["outcome"] for row in of.values()]
    for bad in ("fails", "wrong"):
        if bad in found:
            return bad
    return "works" if "works" in found else found[0]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.families", description=__doc__.splitlines()[0])
    p.add_argument("--families", type=names, help="comma-separated model types; all by default")
    add_outputs(p, "markdown")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if any row is wrong or fails, else as `textkv.command.run` says."""
    return run("eval.families", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Sweep and print; 1 if any row is wrong or fails."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    chosen = args.families or families()
    if unknown := sorted(set(chosen) - set(families())):
        raise ValueError(f"families={','.join(unknown)}: no decoder of transformers {transformers.__version__}")
    console, rows = Console(stderr=True), []
    for i, family in enumerate(chosen, 1):
        found = check_family(family)
        rows += found
        bad = [row for row in found if row["outcome"] in ("wrong", "fails")]
        console.print(f"[{i}/{len(chosen)}] {family}: {_of_family({r['method']: r for r in found})}", highlight=False)
        for row in bad:
            console.print(f"    {row['method']}: {row['outcome']} {row['gap'] or ''} {row['line'][:300]}", markup=False)
    meta = run_meta("eval.families", argv, seed=0)
    write_rows(args.json, meta, rows)
    if args.markdown:
        write_text(args.markdown, markdown(rows, meta))
    counts = Counter(row["outcome"] for row in rows)
    console.print(", ".join(f"{counts.get(name, 0)} {name}" for name in OUTCOMES), highlight=False)
    return 1 if counts["wrong"] or counts["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
