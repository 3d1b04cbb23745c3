"""What commands of `eval` have in common: methods at one budget, a device, and where rows are written."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from textkv import Budget, arguments, command, resolve_method

DTYPES = ("float32", "bfloat16", "float16")


def add_methods(p: argparse.ArgumentParser, methods: str, budget: str, *, all_known: bool = False) -> None:
    """`--methods` and `--budget` with these defaults; `all_known`: the word "all" may stand for every method."""
    choice = "all, or comma-separated" if all_known else "comma-separated"
    p.add_argument(
        "--methods",
        type=arguments.methods(*all_known * ["all"]),
        default=methods,
        help=f"{choice} methods and compositions",
    )
    p.add_argument(
        "--budget",
        type=arguments.budget,
        default=budget,
        help="share of the prompt's tokens to keep, or a number as 64t",
    )


def add_outputs(
    p: argparse.ArgumentParser, *names: str, when: str = "", default: str | None = None, beside: Sequence[str] = ()
) -> None:
    """`--device`, a GPU where there is one, `--json`, and the further files `names`: "markdown", "plot".

    Args:
        when: the rows are written, if not once at the end.
        default: the file of `--json` that is written if none is named.
        beside: suffixes of files that are written beside that of `--json`.
    """
    module = p.prog.removeprefix("python -m ").partition(" ")[0]
    written, rows = command.results_file(module), command.results_file(module, beside)
    p.add_argument(
        "--device", type=arguments.device, default="", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)"
    )
    p.add_argument("--json", type=rows, default=default, help=f"write the rows here{when}")
    told = {"markdown": "write the table here too", "plot": "write a picture here, as PNG"}
    for name in names:
        p.add_argument(f"--{name}", type=written, help=told[name])


def add_dtype(p: argparse.ArgumentParser) -> None:
    """`--dtype`."""
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 else")


def add_choice(p: argparse.ArgumentParser, name: str, known: Sequence[str], told: str = "") -> None:
    """`--name`: comma-separated, each one of `known`, all by default."""
    p.add_argument(
        f"--{name}", type=command.choices(*known), default=",".join(known), help=f"of {', '.join(known)}{told}"
    )


def checked_budget(methods: Iterable[str], budget: str) -> str:
    """`budget` as methods are told it, after each of `methods` was built with it once.

    Raises:
        ValueError: no such budget or method, or a method that cannot keep it.
    """
    budget = str(Budget.parse(budget))
    for method in methods:
        resolve_method(method, budget)
    return budget
