"""The ground floor: one file per operation on a KV cache, its torch reference and its Triton kernel side by side.

Importing this package costs nothing: torch and Triton come with the first operation that is asked for. `kernels` is also
the import name of a package of Hugging Face that transformers probes for; `kernels._coexist` says how both live together.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"
_OPERATIONS = ("compact", "decode_attention", "merge", "rotate", "subspace_residual", "window_mass")
__all__ = ["__version__", *_OPERATIONS]


class _Package(ModuleType):
    """Keeps `kernels.merge` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OPERATIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _OPERATIONS:
        importlib.import_module(f"{__name__}.{name}")
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
