"""Processes that each open something dear once (a model, a browser) and do jobs with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any, ClassVar

from textkv.command.ending import TERMINATED

GRACE = 0.8  # seconds in which a worker may close what it has open: Ctrl-C is answered within three


class WorkerFailed(ValueError):
    """A worker could not be opened, and the message is that of its error; or it ended on its own."""


class Workers:
    """A context of `number` processes. `opened = open(*args)` is called once in each; a job `f, args` then runs as
    `f(opened, *args)` in one of them.

    They end with this process, whatever ends it: an error, a signal, and a kill that nothing can catch. What they have
    opened is closed then by its `close()`, if it has one.
    """

    def __init__(self, number: int, open: Callable[..., Any], *args: Any) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(number, context, _Here.begin, (open, args))

    def __enter__(self) -> Workers:
        return self

    def results(self, job: Callable[..., Any], all_args: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        """(args, `job(opened, *args)`) in the order in which they are done.

        Raises:
            WorkerFailed: what they need could not be opened, or one of them ended on its own.
        """
        try:
            with _unheard():
                waiting: dict[Future, tuple] = {self._pool.submit(_Here.work, job, args): args for args in all_args}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool:
            raise WorkerFailed(
                f"a worker ended on its own (killed, or out of memory); use fewer than {self.number}"
                if self.number > 1
                else "the worker ended on its own (killed, or out of memory)"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._pool.shutdown()
            return
        # An error here: nobody waits for what is still being done.
        mine = multiprocessing.active_children()
        for process in mine:
            process.terminate()
        end = time.monotonic() + GRACE
        for process in mine:
            process.join(max(end - time.monotonic(), 0))
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _unheard() -> Iterator[None]:
    """Ctrl-C waits: it reaches every process of a terminal, and one that is started meanwhile never hears it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Hand:
    """What one worker has opened. A failure is kept and told by the first job: a pool would only say that it is
    broken.
    """

    def __init__(self, open: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.opened: Any = None
        self.failed = ""
        try:
            self.opened = open(*args)
        except Exception as error:
            self.failed = str(error) or type(error).__name__

    def work(self, job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """One job. Raises WorkerFailed if there is nothing to do it with."""
        if self.failed:
            raise WorkerFailed(self.failed)
        return job(self.opened, *args)

    def close(self) -> None:
        """Close what is open, if it has a `close`; an end goes on whatever that says."""
        with suppress(Exception):
            getattr(self.opened, "close", lambda: None)()


class _Here:
    """The hand of this process."""

    hand: ClassVar[Hand | None] = None

    @classmethod
    def begin(cls, open: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Open it."""
        # Ctrl-C reaches every process of a terminal; the parent decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, cls.end)
        end_with_parent()
        cls.hand = Hand(open, args)

    @classmethod
    def end(cls, number: int, frame: FrameType | None) -> None:
        """Close what is open and go. The pool would take an exception for the result of a job, and go on."""
        # What was interrupted in the middle may never let itself be closed.
        late = threading.Timer(GRACE, os._exit, (TERMINATED,))
        late.daemon = True
        late.start()
        if cls.hand is not None:
            cls.hand.close()
        os._exit(TERMINATED)

    @classmethod
    def work(cls, job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """One job."""
        assert cls.hand is not None
        return cls.hand.work(job, args)


def end_with_parent() -> None:
    """In a worker: from now on it ends when the process that started it has gone, whatever it is doing."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    # First as a signal that closes what is open. A worker that is stuck in a call does not hear it, and goes later.
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(2 * GRACE)
    os._exit(TERMINATED)
