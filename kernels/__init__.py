"""The ground floor: one file per operation on a KV cache, its torch reference and its Triton kernel side by side.

This folder is imported as `textkv.kernels`. The bare name belongs to a package of Hugging Face that transformers looks
for: where the root of the checkout leads the path, whoever asks for `kernels` gets that package, if it is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

OPERATIONS = (
    "coded_attention", "compact", "confidence", "decode_attention", "merge", "pack", "packed_attention",
    "paged_attention", "rotate", "subspace_residual", "window_mass",
)  # fmt: skip
__all__ = ["OPERATIONS", *OPERATIONS]

if TYPE_CHECKING:  # a type checker does not run `__getattr__`: it would take each name for the file
    from .coded_attention import coded_attention as coded_attention
    from .compact import compact as compact
    from .confidence import confidence as confidence
    from .decode_attention import decode_attention as decode_attention
    from .merge import merge as merge
    from .pack import pack as pack
    from .packed_attention import packed_attention as packed_attention
    from .paged_attention import paged_attention as paged_attention
    from .rotate import rotate as rotate
    from .subspace_residual import subspace_residual as subspace_residual
    from .window_mass import window_mass as window_mass


class _Package(ModuleType):
    """Keeps `kernels.merge` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in OPERATIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    if name in OPERATIONS:
        # By its one name, whichever way the folder was reached: there is no second copy.
        return getattr(importlib.import_module(f"textkv.kernels.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _handed_over() -> bool:
    """Puts the installed package `kernels` in place of this folder; returns whether there is one. Nothing of ours that
    needs transformers is imported: it may be transformers that asks, half-way through its own import."""
    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.loader is None or spec.origin is None:
        # Nothing, or a bare folder of that name: the files here are known by their one name.
        from ._bare import Bare

        sys.meta_path.insert(0, Bare("kernels", "textkv.kernels"))
        return False
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return True


if __name__ != "kernels" or not _handed_over():
    sys.modules[__name__].__class__ = _Package
