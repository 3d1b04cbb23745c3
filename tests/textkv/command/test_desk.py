"""One who does things for many: in the order they came, together where they fit, and each hears its own error."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from textkv.command.desk import Desk


class Able:
    """Doubles numbers; even ones together, negative ones not at all. The first waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.go = Event(), Event()

    def one(self, asked):
        self.calls.append([asked])
        self.begun.set()
        self.go.wait(5)
        if asked < 0:
            raise LookupError(f"{asked} is no number")
        return 2 * asked

    def several(self, asked):
        self.calls.append(list(asked))
        if min(asked) < 0:
            raise ValueError("one of them")
        return [2 * one for one in asked]

    def joins(self, together, other):
        return all(one % 2 == 0 for one in (*together, other))


def test_what_waits_together_and_fits_is_done_together():
    able = Able()
    desk = Desk(able, 3)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(desk.ask, 1)
        able.begun.wait(5)
        rest = []
        for number in (2, 3, 4, 6, 8, 5):
            rest.append(pool.submit(desk.ask, number))
            while len(desk._waiting) < len(rest):
                time.sleep(0.001)
        able.go.set()
        assert first.result() == 2 and [one.result() for one in rest] == [4, 6, 8, 12, 16, 10]
    assert able.calls == [[1], [2, 4, 6], [3], [8], [5]]


def test_each_hears_its_own_error_and_the_next_is_done():
    able = Able()
    desk = Desk(able, 4)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(desk.ask, 1)
        able.begun.wait(5)
        rest = [pool.submit(desk.ask, number) for number in (2, -2, 4)]
        while len(desk._waiting) < 3:
            time.sleep(0.001)
        able.go.set()
        assert first.result() == 2 and rest[0].result() == 4 and rest[2].result() == 8
        with pytest.raises(LookupError, match="-2 is no number"):
            rest[1].result()
    assert desk.ask(5) == 10


def test_many_threads_lose_nothing():
    able = Able()
    able.go.set()
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(Desk(able, 4).ask, range(500))) == [2 * n for n in range(500)]
    assert sorted(n for call in able.calls for n in call) == list(range(500))
