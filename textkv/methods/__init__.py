"""One file per method. Importing this package registers all of them; a new file is all that a new method needs."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
