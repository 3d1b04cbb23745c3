"""One model, many clients: requests wait in turn, are answered on a thread of their own, and may be given up."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from textkv.serve.interface import Cancelled, Engine, Outcome
from textkv.serve.rows import Ask


class Full(Exception):
    """More requests wait than may."""


@dataclass(eq=False)
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
    """Jobs of several clients, one at a time, or together where the engine can: clients take turns, the jobs of each in
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

    def _beside(self, places: int) -> list[Job]:
        """Waiting jobs that can be answered beside others, each client's next one, clients in turn."""
        found: list[Job] = []
        with self._ready:
            while self._waiting and len(found) < places and self._open:
                client = next(iter(self._waiting))
                job = self._waiting[client][0]
                # One that must be answered alone has its turn when those before it are through.
                if not job.gone.is_set() and not self.engine.joins(job.prepared):
                    break
                self._pop(client)
                if not job.gone.is_set():
                    found.append(job)
        return found

    def _pop(self, client: str) -> Job:
        """A client's next job; the client goes to the end: one with many requests does not hold up the rest."""
        jobs = self._waiting.pop(client)
        job = jobs.popleft()
        if jobs:
            self._waiting[client] = jobs
        return job

    def _next(self) -> Job | None:
        with self._ready:
            self._ready.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            return self._pop(next(iter(self._waiting)))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.gone.is_set():
                if self.engine.rows > 1 and self.engine.joins(job.prepared):
                    self._together(job)
                else:
                    job.tell(self._answer(job.prepared, job.tell, self._gone(job)))

    def _gone(self, job: Job) -> Callable[[], bool]:
        return lambda: job.gone.is_set() or not self._open

    def _together(self, first: Job) -> None:
        """A job and all that join it meanwhile; what goes wrong before one is over is its end."""
        begun = [first]
        left: list[Job] = []

        def ask(job: Job) -> Ask:
            left.append(job)
            return Ask(job.prepared, job.tell, self._gone(job), lambda end: (left.remove(job), job.tell(end)))

        def more(places: int) -> list[Ask]:
            jobs = [*begun, *self._beside(places - len(begun))]
            begun.clear()
            return [ask(job) for job in jobs]

        try:
            self.engine.answer_rows(more)
            error: Exception = RuntimeError("a row did not end")
        except Exception as problem:
            error = problem
        for job in left:
            job.tell(error)

    def _answer(self, prepared: Any, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome | Exception:
        try:
            return self.engine.answer(prepared, give, cancelled)
        except Cancelled as gone:
            return gone
        # Whatever goes wrong belongs to this request: the thread must live for the next one.
        except Exception as error:
            return error
