"""What commands of `eval` have in common: methods at one budget, a device, and where rows are written."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from textkv import Budget, resolve_method


def add_methods(p: argparse.ArgumentParser, methods: str, budget: str, *, all_known: bool = False) -> None:
    """`--methods` and `--budget` with these defaults; `all_known`: the word "all" may stand for every method."""
    choice = "all, or comma-separated" if all_known else "comma-separated"
    p.add_argument("--methods", default=methods, help=f"{choice} methods and compositions")
    p.add_argument("--budget", default=budget, help="share of the prompt's tokens to keep, or a number as 64t")


def add_outputs(p: argparse.ArgumentParser, when: str = "") -> None:
    """`--device`, a GPU where there is one, and `--json`; `when` the rows are written, if not once at the end."""
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, help=f"write the rows here{when}")


def checked_budget(methods: Iterable[str], budget: str) -> str:
    """`budget` as methods are told it, after each of `methods` was built with it once.

    Raises:
        ValueError: no such budget or method, or a method that cannot keep it.
    """
    budget = str(Budget.parse(budget))
    for method in methods:
        resolve_method(method, budget)
    return budget
