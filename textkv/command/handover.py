"""Commands that only a checkout has: trainers are no part of the installed package, which must not know them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence


def hand_over(module: str, argv: Sequence[str]) -> int:
    """Runs the command of a module of the checkout, as `python -m module` does, and returns its exit code.

    Raises:
        ValueError: there is no checkout here.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(f"the trainer is in the repository only; run `python -m {module}` at the root of a checkout")
    return importlib.import_module(module).main(argv)
