"""Living beside the PyPI package `kernels` of Hugging Face, which has the same import name.

transformers asks importlib.metadata whether that package is installed and then takes names from `kernels`, which is us
when our folder comes first on sys.path. So its folder is added to our `__path__` (its submodules import as ever), and
names that we do not define are looked up in its `__init__.py`, which is run the first time such a name is asked for.
The other order, theirs first, hides this package: then `kernels.OPERATIONS` does not exist, which is how to notice.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_OURS = os.path.dirname(os.path.realpath(__file__))
_NAME = "kernels._hugging_face"


def find_other() -> ModuleSpec | None:
    """The `kernels` package that Python would import if ours were not there, or None."""
    parent = os.path.dirname(_OURS)
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if os.path.realpath(entry) != parent])
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None  # nothing, or a bare folder of that name
    second_copy_of_ours = os.path.isfile(os.path.join(spec.submodule_search_locations[0], "decode_attention.py"))
    return None if second_copy_of_ours else spec


def load_other(spec: ModuleSpec) -> ModuleType:
    """Run the `__init__.py` of the other package once, as a plain module of ours, so that `from .x import y` holds."""
    if _NAME in sys.modules:  # perhaps half-way through its own import, as any package seen from its submodules
        return sys.modules[_NAME]
    # no search locations: were it a package of its own, `from .x import y` would load every submodule a second time
    spec = importlib.util.spec_from_file_location(_NAME, spec.origin, submodule_search_locations=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]
        raise
    return module
