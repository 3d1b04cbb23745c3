"""Names to classes: what methods, cache policies, unmasking rules, segments and agents are known by.

A class from outside is known by its name once its package is imported, by an entry point of the registry's group
without any import, or as "package.module:Class" in any place that takes a name:

    [project.entry-points."agentkv.methods"]
    mine = "mypkg.mine:Mine"
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points


class Registry(dict[str, type]):
    """Classes by name. `kind` says in messages what they are: "method", "cache", "unmasking rule".

    Args:
        group: of entry points through which installed packages add to it; None = none may.
        base: the class that all of them are made from, as "package.module.Class", checked where one comes from outside;
            None = any. By its place, so that a stranger's class of the same name is not taken for it.
        own: methods of the base that say nothing yet: each class has to bring its own.
    """

    def __init__(self, kind: str, group: str | None = None, base: str | None = None, own: Sequence[str] = ()) -> None:
        super().__init__()
        self.kind, self.group, self.base, self.own = kind, group, base, tuple(own)

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: makes a class known by `name`, which becomes its attribute `name`.

        Raises:
            ValueError: the name belongs to another class.
        """

        def add(cls: type) -> type:
            known = self.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} name {name!r} is taken by {known.__module__}.{known.__qualname__}")
            cls.name = name
            self[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, sorted: those of classes that are known, and of entry points that nobody has asked for yet."""
        return sorted({*self, *(point.name for point in self._points())})

    def find(self, name: str) -> type:
        """The class of that name, or the one that "package.module:Class" says, which is imported.

        Raises:
            ValueError: unknown name (the message has the nearest ones), or no such class, or one of another kind.
        """
        if name not in self:
            self._add_from_outside(name)
        if name not in self:
            names = self.names()
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}")
        return self[name]

    def _points(self) -> list:
        return [] if self.group is None else list(_installed(self.group, tuple(_seen(place) for place in sys.path)))

    def _add_from_outside(self, name: str) -> None:
        told = name if ":" in name else next((point.value for point in self._points() if point.name == name), None)
        if told is None or self.group is None:
            return
        module, _, attribute = told.partition(":")
        try:
            cls = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: ".a:B", relative to nothing
            raise ValueError(f"{self.kind} {name!r}: cannot import {told!r}: {type(error).__name__}: {error}") from None
        self._check(cls, f"{self.kind} {name!r}: {told!r}")
        # By the name that finds it again in another process: that is what a saved cache writes down.
        if cls not in self.values():
            cls.name = name
        self.setdefault(name, cls)

    def _check(self, cls: object, told: str) -> None:
        """Raises ValueError for what is not made from the base, or leaves out what it must bring."""
        bases = inspect.getmro(cls)[1:] if inspect.isclass(cls) else ()
        # A checkout's rooms are known by two paths (`eval`, `agentkv.eval`): the end of it counts.
        made = any(f".{one.__module__}.{one.__qualname__}".endswith(f".{self.base}") for one in bases)
        if not bases or (self.base is not None and not made):
            what = self.base.rpartition(".")[2] if self.base else "class"
            where = f" of {self.base.rpartition('.')[0]}" if bases and self.base else ""
            raise ValueError(f"{told} is no {what}{where}; {_one(self.kind)} is made from it")
        # By name: what a classmethod gives is a new object each time.
        bare = self.base.rpartition(".")[2] if self.base else ""
        missing = [name for name in self.own if getattr(cls, name).__qualname__ == f"{bare}.{name}"]
        if missing:
            raise ValueError(f"{told} says nothing of its own for {' and '.join(missing)}; write what {bare} asks for")


@lru_cache(maxsize=16)
def _installed(group: str, places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read again when `places` change: that opens a file of every installed package (17 ms
    for a hundred and seventy), and a name that is misspelt asks twice.
    """
    return tuple(entry_points(group=group))


def _seen(place: str) -> tuple[str, int]:
    """A place of packages, with the time at which something was last installed there."""
    try:
        return place, os.stat(place or ".").st_mtime_ns
    except OSError:
        return place, 0


def _one(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
