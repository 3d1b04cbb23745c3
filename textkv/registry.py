"""Names to classes: what methods, cache policies and unmasking rules are known by in composition strings."""

from __future__ import annotations

import difflib
from collections.abc import Callable


class Registry(dict[str, type]):
    """Classes by name. `kind` says in messages what they are: "method", "cache", "unmasking rule"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

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

    def find(self, name: str) -> type:
        """The class of that name.

        Raises:
            ValueError: unknown name; the message has the nearest ones.
        """
        if name not in self:
            near = difflib.get_close_matches(name, sorted(self), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(self))}"
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}")
        return self[name]
