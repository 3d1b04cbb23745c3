"""Which of a layer's tokens in host memory a query is to see; one file per kind of index."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
