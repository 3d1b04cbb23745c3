"""A function of an object that asks another one first, for as long as somebody wants it: how a model's own parts are
changed without a trace when it is over, also where several threads use the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_LOCK = threading.Lock()
_USERS: WeakKeyDictionary[Any, dict[str, list[Any]]] = WeakKeyDictionary()


@contextmanager
def stands_in(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Meanwhile `owner.name` is `make(what it was)`. Threads may enter at once: the first one's stand-in serves all, so
    it asks its own thread what to do; the last to leave puts back what was there.
    """
    with _LOCK:
        users = _USERS.setdefault(owner, {})
        if name not in users:
            # Another library may have set one already (accelerate does, to spread a model over devices).
            users[name] = [0, vars(owner).get(name)]
            setattr(owner, name, make(getattr(owner, name)))
        users[name][0] += 1
    try:
        yield
    finally:
        with _LOCK:
            users[name][0] -= 1
            if not users[name][0]:
                _, before = users.pop(name)
                delattr(owner, name)  # the class's own shows again
                if before is not None:
                    setattr(owner, name, before)
