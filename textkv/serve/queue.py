"""One model, many clients: requests wait in turn, are answered on a thread of their own, and may be given up."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from textkv.serve.interface import Cancelled, Engine, Outcome


class Full(Exception):
    """More requests wait than may."""


@dataclass
class Job:
    """A request on its way. `pieces` brings texts if it is a `stream`, and then an Outcome or an exception."""

    client: str
    prepared: Any
    loop: asyncio.AbstractEventLoop
    stream: bool = True
    pieces: asyncio.Queue[str | Outcome | Exception] = field(default_factory=asyncio.Queue)
    gone: Event = field(default_factory=Event)

    def tell(self, piece: str | Outcome | Exception) -> None:
        """Hands a piece over to the event loop that waits for it; a loop that is closed waits for nothing."""
        # Each hand-over costs both threads a turn at the interpreter: none for texts that nobody reads yet.
        if isinstance(piece, str) and not self.stream:
            return
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Turns:
    """Jobs of several clients, one at a time, or several where the engine can: clients take turns, the jobs of each in
    the order they came.

    Args:
        engine: what answers.
        limit: jobs that may wait.
    """

    def __init__(self, engine: Engine, limit: int = 64) -> None:
        self.engine, self.limit = engine, limit
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._ready, self._open = Condition(), True
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in list(self._waiting.values()))

    def add(self, job: Job) -> None:
        """Puts a job at the end of its client's row.

        Raises:
            Full: as many as may wait do so already.
        """
        with self._ready:
            self.check_room()
            self._waiting.setdefault(job.client, deque()).append(job)
            self._ready.notify()

    def check_room(self) -> None:
        """Raises Full if as many wait as may."""
        if len(self) >= self.limit:
            raise Full(f"{self.limit} requests wait already; try again later")

    def close(self, patience: float = 5.0) -> None:
        """Ends the thread; what waits is given up, and what is being answered ends at its next step."""
        with self._ready:
            self._open = False
            for job in (job for jobs in self._waiting.values() for job in jobs):
                job.gone.set()
            self._ready.notify()
        self._thread.join(patience)

    def _beside(self, first: Job) -> list[Job]:
        """Waiting jobs that can be answered with `first`, each client's next one, clients in turn."""
        found: list[Job] = []
        with self._ready:
            for client in [*self._waiting] if self.engine.rows > 1 else ():
                jobs = self._waiting[client]
                if len(found) + 1 < self.engine.rows and not jobs[0].gone.is_set():
                    if self.engine.joins([first.prepared, *(job.prepared for job in found)], jobs[0].prepared):
                        found.append(jobs.popleft())
                        if not jobs:
                            del self._waiting[client]
        return found

    def _next(self) -> Job | None:
        with self._ready:
            self._ready.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                # Behind all others: one client with many requests does not hold up the rest.
                self._waiting[client] = jobs
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.gone.is_set():
                others = self._beside(job)
                if others:
                    self._rows([job, *others])
                else:
                    job.tell(self._answer(job.prepared, job.tell, self._gone(job)))

    def _gone(self, job: Job) -> Callable[[], bool]:
        return lambda: job.gone.is_set() or not self._open

    def _rows(self, jobs: list[Job]) -> None:
        """Several jobs together; what goes wrong before a row is over is that row's end."""
        left = dict(enumerate(jobs))

        def done(number: int, end: Outcome | Exception) -> None:
            left.pop(number).tell(end)

        try:
            prepared, gives = [job.prepared for job in jobs], [job.tell for job in jobs]
            self.engine.answer_rows(prepared, gives, [self._gone(job) for job in jobs], done)
            error: Exception = RuntimeError("a row did not end")
        except Exception as problem:
            error = problem
        for job in left.values():
            job.tell(error)

    def _answer(self, prepared: Any, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome | Exception:
        try:
            return self.engine.answer(prepared, give, cancelled)
        except Cancelled as gone:
            return gone
        # Whatever goes wrong belongs to this request: the thread must live for the next one.
        except Exception as error:
            return error
