"""The ground floor: one file per operation on a KV cache, its torch reference and its Triton kernel side by side.

Importing this package costs nothing: torch and Triton come with the first operation that is asked for. `kernels` is
also the import name of a package of Hugging Face that transformers probes for; `kernels._coexist` says how the two live
together. Where that package is installed, `kernels.__version__` is its version, because its own code reads it there.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from kernels._coexist import find_other, load_other

OPERATIONS = (
    "coded_attention", "compact", "confidence", "decode_attention", "merge", "pack", "packed_attention", "rotate",
    "subspace_residual", "window_mass",
)  # fmt: skip
__all__ = ["OPERATIONS", "__version__", *OPERATIONS]

_VERSION = "0.1.0"
_other = find_other()
if _other is not None:
    __path__.extend(_other.submodule_search_locations)


class _Package(ModuleType):
    """Keeps `kernels.merge` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in OPERATIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in OPERATIONS:
        importlib.import_module(f"{__name__}.{name}")
        return globals()[name]
    dunder = name.startswith("__")  # Python's own probes must not load another package
    if _other is not None and (not dunder or name == "__version__"):
        return getattr(load_other(_other), name)
    if name == "__version__":
        return _VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
