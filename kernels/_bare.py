"""A folder that is imported under a longer name, reached by its bare one: where the root of a checkout leads the path.

Both names then give the same modules: no class exists twice. Nothing of ours is imported before it is asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


class Bare(MetaPathFinder, Loader):
    """Finds `bare.x` as `real.x`; `python -m bare.x` runs the same file.

    Args:
        bare, real: names of one package, such as "envs" and "agentkv.envs".
    """

    def __init__(self, bare: str, real: str) -> None:
        self.bare, self.real = bare, real

    def _real(self, name: str) -> str:
        return self.real + name[len(self.bare) :]

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A spec under the bare name for a module that is there under the real one."""
        if not name.startswith(f"{self.bare}."):
            return None
        found = importlib.util.find_spec(self._real(name))
        if found is None:
            return None
        spec = ModuleSpec(name, self, origin=found.origin, is_package=found.submodule_search_locations is not None)
        spec.has_location = found.has_location
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The real module itself."""
        module = importlib.import_module(self._real(spec.name))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it has run. It keeps the spec of its real name."""
        module.__spec__ = self._spec

    def get_code(self, name: str) -> CodeType:
        """The code of the file, for `python -m`."""
        real = self._real(name)
        return importlib.util.find_spec(real).loader.get_code(real)


def alias(bare: str, real: str) -> None:
    """From now on `bare` and all below it are `real`, which is imported."""
    sys.meta_path.insert(0, Bare(bare, real))
    sys.modules[bare] = importlib.import_module(real)
