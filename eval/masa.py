"""`python -m eval.masa`: what fewer attention weights cost, as perplexity on a text (MASA, arXiv 2508.04581).

python -m eval.masa --model smollm2 --reductions 0.1,0.2,0.33 --text FILE     # converted here, without training
python -m eval.masa --trained runs/full/latest,runs/masa/latest --text FILE   # folders of training.masa.train

A pretrained model is converted two ways at each reduction: `masa`, atoms that groups of layers share with low-rank
rests, and `low-rank`, each layer's own weights at a lower rank in the norm of its inputs (as SVD-LLM does). Calibration
reads the first nine tenths of the text, the perplexity is of the last. Intervals: rows of the text resampled, 95 %;
those of `ratio`, perplexity over that of the full model, with both models' losses of a row together. Every conversion
is written to FILE.jsonl as soon as it is measured; the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from textkv import models
from textkv.command import count, fractions, names, run, some_text, text_file, token_count, write_rows
from textkv.masa import Conversion, Converted, Plan, attach, export, plan
from textkv.masa.command import rows_of
from textkv.masa.projections import find_projections
from textkv.models.atoms import is_atoms, read_atoms
from textkv.provenance import run_meta
from textkv.records import read_fields, read_text

from .arguments import add_outputs
from .bootstrap import resampled
from .outcomes import Store
from .textbench import load_text_model, text_rows

ROWS_AT_ONCE = 4
TOLD = "training.json"
CALIBRATION = (32, 256)  # pieces and tokens of each, as `python -m textkv.masa convert` reads them


@torch.inference_mode()
def losses(model: PreTrainedModel, ids: torch.Tensor, told: str = "reading") -> np.ndarray:
    """Mean negative log-likelihood in nats of each row of `ids` int64 [rows, tokens]; float64 [rows]."""
    parts = []
    for some in track(ids.to(model.device).split(ROWS_AT_ONCE), told, console=Console(stderr=True), transient=True):
        logits = model(some[:, :-1], use_cache=False).logits.float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none").mean(1).double().cpu())
    return torch.cat(parts).numpy()


def row(method: str, parameters: int, plain: int, nll: np.ndarray, tokens: int, **more: Any) -> dict[str, Any]:
    """One row of the table: perplexity with its interval, and the numbers that the attention weights keep."""
    mean, low, high = resampled(nll)
    return {
        "method": method,
        "attention_parameters": parameters,
        "attention_share": parameters / plain,
        "perplexity": math.exp(mean),
        "low": math.exp(low),
        "high": math.exp(high),
        "rows": len(nll),
        "n": len(nll) * (tokens - 1),
    } | more


def attention_parameters(model: PreTrainedModel) -> int:
    """Numbers of the weights of all Q, K, V and O; biases are not counted."""
    return sum(module.weight.numel() for modules in find_projections(model).values() for module in modules.values())


def full_attention_parameters(config: PreTrainedConfig) -> int:
    """The same of a model of this size whose heads all have keys and values of their own."""
    return 4 * config.num_hidden_layers * config.hidden_size * config.num_attention_heads * config.head_dim


@dataclass(frozen=True)
class Measured:
    """Losses of one model on all rows of the text, and the numbers that its attention weights keep."""

    method: str
    reduction: float
    parameters: int
    nll: list[float]

    @property
    def key(self) -> tuple[str, float]:
        """What tells models apart."""
        return self.method, self.reduction


class Losses(Store):
    """What was measured of one pretrained model on one text."""

    kind = Measured


def converted(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of a pretrained model: as it is, then both ways at each reduction. What stands in the file of lines is not
    measured again."""
    model, tokenizer = load_text_model(args.model, args.device)
    ids = text_rows(tokenizer, args.text, args.rows, args.length)
    text = read_text(args.text) if args.text else None
    board = {name: str(getattr(args, name)) for name in ("model", "rows", "length", "atoms", "groups")}
    board["text"] = hashlib.sha256((text or "").encode()).hexdigest()[:16]
    there = Losses(args.json.with_suffix(".jsonl"), board)
    seen, plain = rows_of(tokenizer, text, *CALIBRATION), attention_parameters(model)
    if ("full", 0.0) not in there.done:
        there.add(Measured("full", 0.0, plain, losses(model, ids, "full").tolist()))
    yield _row(there, ("full", 0.0), args, {})
    for method, atoms, groups in (("masa", args.atoms, args.groups), ("low-rank", 0, 1)):
        planned: Plan | None = None
        for reduction in args.reductions:
            if (method, reduction) not in there.done:
                # What a conversion misses is factored once for all reductions.
                wanted = Conversion(atoms=atoms, groups=groups, reduction=reduction)
                planned = planned or plan(model, wanted, seen)
                there.add(_measured(method, reduction, model, planned.at(reduction), ids))
            yield _row(there, (method, reduction), args, {"reduction": reduction, "atoms": atoms, "groups": groups})


def _measured(method: str, reduction: float, model: PreTrainedModel, made: Converted, ids: torch.Tensor) -> Measured:
    changed = copy.deepcopy(model)
    for group in made.groups:
        attach(changed, group)
    # Combined once: otherwise every batch of rows would combine anew.
    nll = losses(export(changed), ids, f"{method} {reduction:.0%}")
    return Measured(method, reduction, made.parameters, nll.tolist())


def _row(there: Losses, key: tuple[str, float], args: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    """The row of a model, with `ratio`: its perplexity over the full model's, paired over the pieces of the text."""
    full, found = there.done["full", 0.0], there.done[key]
    mean, low, high = resampled(np.array(found.nll) - np.array(full.nll))
    ratio = {"ratio": math.exp(mean), "ratio_low": math.exp(low), "ratio_high": math.exp(high)}
    return row(found.method, found.parameters, full.parameters, np.array(found.nll), args.length, **ratio, **more)


def trained(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of folders that `python -m training.masa.train` wrote."""
    for folder in args.trained:
        model, tokenizer = models.load(folder, device=args.device)
        parameters = attention_parameters(model)
        if is_atoms(folder):
            parameters += sum(group.parameters - group.plain_parameters for group in read_atoms(folder)[1])
        ids = text_rows(tokenizer, args.text, args.rows, args.length)
        about = _told(Path(folder))
        plain = full_attention_parameters(model.config)
        yield row(_method(about, folder), parameters, plain, losses(model, ids, folder), args.length, **about)


def _told(folder: Path) -> dict[str, Any]:
    """What the training says of its settings."""
    path = folder / TOLD
    if not path.is_file():
        return {}
    return read_fields(path, {}, {"settings": dict}).get("settings", {})


def _method(about: dict[str, Any], folder: str) -> str:
    """The method's name, as the paper's tables have it; the folder's for a model of unknown making."""
    if not about:
        return folder
    if about["atoms"]:
        kind = {"sequential": "sequential", "repeat": "repeat"}.get(about["coefficients"], "masa")
        return f"{kind}-{about['projections']} S={about['atoms']}"
    if about["rank"]:
        return f"low-rank r={about['rank']}"
    return "full" if about["heads"] == about["kv_heads"] else f"gqa {about['heads']}/{about['kv_heads']}"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Methods down."""
    made = Table("method", "attention weights", "of full", "perplexity", "95 %", title="what fewer weights cost")
    for each in rows:
        within = f"{each['low']:.2f} to {each['high']:.2f}"
        weights, share = f"{each['attention_parameters']:,}", f"{each['attention_share']:.1%}"
        made.add_row(each["method"], weights, share, f"{each['perplexity']:.2f}", within)
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.masa", description=__doc__.split("\n\n")[0])
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--model", type=some_text, default="mini", help="a pretrained model: mini, smollm2, a folder, a hub id"
    )
    what.add_argument("--trained", type=names, help="comma-separated folders of training.masa.train, not --model")
    p.add_argument("--reductions", type=fractions, default="0.1,0.2,0.33", help="shares of the weights that go")
    p.add_argument("--atoms", type=count, default=1, help="matrices of each group and projection (default 1)")
    p.add_argument("--groups", type=count, default=1, help="groups of consecutive layers (default 1)")
    p.add_argument("--text", type=text_file, help="plain text; default: a small grammar's sentences")
    p.add_argument("--rows", type=count, default=32, help="pieces of the text to measure on (default 32)")
    p.add_argument("--length", type=token_count, default=256, help="tokens of a piece (default 256)")
    add_outputs(p, when=", after every model", default="runs/masa.json", beside=(".jsonl",))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.masa", parser(), work, argv, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print; rows are written as they come."""
    if args.length < 2:
        raise ValueError(f"--length {args.length}: a piece needs at least 2 tokens")
    rows: list[dict[str, Any]] = []
    for each in trained(args) if args.trained else converted(args):
        rows.append(each)
        write_rows(args.json, run_meta("eval.masa", argv, 0), rows)
    Console().print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
