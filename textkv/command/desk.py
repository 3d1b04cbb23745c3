"""One who does things for many: what waits together and fits together is done together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from threading import Condition
from typing import Any, Protocol

from textkv.command.ending import one_line


class Able(Protocol):
    """What a desk is opened with."""

    def one(self, asked: Any) -> Any:
        """Does one thing."""

    def several(self, asked: Sequence[Any]) -> Sequence[Any]:
        """Does several that join each other; the results in their order."""

    def joins(self, together: Sequence[Any], other: Any) -> bool:
        """Whether another may be done beside those."""


class _Waiting:
    """What one caller asks, and then how it ended."""

    def __init__(self, asked: Any) -> None:
        self.asked, self.over = asked, False
        self.result: Any = None
        self.error: Exception | None = None


class Desk:
    """Takes what any number of threads ask, first come first served; whoever is first in the row does the work.

    Args:
        able: does it, one call at a time.
        rows: how many are done together at most.
    """

    def __init__(self, able: Able, rows: int = 1) -> None:
        self.able, self.rows = able, rows
        self._waiting: list[_Waiting] = []
        self._changed, self._busy = Condition(), False

    def ask(self, asked: Any) -> Any:
        """The result. Raises what the work raised for this one."""
        mine = _Waiting(asked)
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: mine.over or (not self._busy and self._waiting[0] is mine))
            together = [] if mine.over else self._taken()
            self._busy = self._busy or bool(together)
        if together:
            try:
                self._do(together)
            finally:
                with self._changed:
                    self._busy = False
                    for one in together:
                        one.over = True
                    self._changed.notify_all()
        if mine.error is not None:
            raise mine.error
        return mine.result

    def _taken(self) -> list[_Waiting]:
        """The first that waits, and those behind it that join it."""
        found = [self._waiting.pop(0)]
        for other in list(self._waiting):
            if len(found) < self.rows and self.able.joins([one.asked for one in found], other.asked):
                found.append(other)
                self._waiting.remove(other)
        return found

    def _do(self, together: list[_Waiting]) -> None:
        if len(together) > 1:
            try:
                results = self.able.several([one.asked for one in together])
                for one, result in zip(together, results, strict=True):
                    one.result = result
                return
            except Exception as error:
                # Of one of them, nobody knows which: each hears its own.
                told = f"{len(together)} that were asked together are done one by one"
                print(f"{told}: {one_line(error)}", file=sys.stderr)
        for one in together:
            try:
                one.result = self.able.one(one.asked)
            except Exception as error:
                one.error = error
