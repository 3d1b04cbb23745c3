"""Workers that are actors of Ray: here or on the machines of a cluster, and a killed one costs its job once more."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, suppress
from types import ModuleType, TracebackType
from typing import Any

from textkv.command.ray_cluster import connected
from textkv.command.workers import GRACE, Hand, WorkerFailed

TRIES = 3  # of a job whose worker dies: the third time it is the job that kills


class _Actor(Hand):
    """A hand in a process of Ray's."""

    def __init__(self, open: Callable[..., Any], args: tuple[Any, ...]) -> None:
        # Ctrl-C reaches every process of a terminal; the command decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        super().__init__(open, args)


class RayWorkers:
    """As `textkv.command.workers.Workers`, on Ray: `opened = open(*args)` is called once in each of `number` actors,
    one processor each; a job `f, args` then runs as `f(opened, *args)` in one of them.

    An actor that dies (killed, out of memory, its machine gone) is replaced, and its job is done again from the
    beginning; only the result of the last try is given. Functions and arguments travel by pickle: on other machines
    this toolkit must be installed, and paths must lead to the same files.

    Args:
        address: `local`, or HOST:PORT of a cluster.
        gpu: whether what is opened computes on a GPU: the actors then share those of the cluster in equal parts, and
            each sees its own as `cuda`.
    """

    def __init__(self, number: int, address: str, open: Callable[..., Any], *args: Any, gpu: bool = False) -> None:
        self.number, self.address, self.gpu = number, address, gpu
        self._open, self._args = open, args
        self._stack = ExitStack()
        self._idle: deque[Any] = deque()
        self._all: list[Any] = []
        # Of each that was asked for: done when it is there.
        self._here: dict[int, Future] = {}
        # By the result to come: who does it, with what, and the how manyth try it is.
        self._busy: dict[Future, tuple[Any, tuple[Any, ...], int]] = {}

    def __enter__(self) -> RayWorkers:
        self._ray: ModuleType = self._stack.enter_context(connected(self.address, self.number))
        share = min(1.0, self._ray.cluster_resources().get("GPU", 0.0) / self.number) if self.gpu else 0
        self._actor = self._ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(_Actor)
        return self

    def results(self, job: Callable[..., Any], all_args: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        """(args, `job(opened, *args)`) in the order in which they are done; each of `all_args` once.

        Raises:
            WorkerFailed: what they need could not be opened, or one job's workers died `TRIES` times.
            Exception: what a job raised.
        """
        waiting = deque((args, 1) for args in all_args)
        try:
            self._deal(job, waiting)
            while self._busy:
                # Futures of Python's own: `ray.wait` takes every signal for a Ctrl-C.
                done = next(iter(wait(self._busy, return_when=FIRST_COMPLETED).done))
                actor, args, tries = self._busy.pop(done)
                try:
                    result = done.result()
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    raise (error.cause or WorkerFailed(str(error))) from None
                except self._ray.exceptions.RayError as error:
                    self._kill(actor)
                    if tries == TRIES:
                        raise WorkerFailed(_died(error)) from None
                    waiting.appendleft((args, tries + 1))
                    self._deal(job, waiting)
                    continue
                self._idle.append(actor)
                self._deal(job, waiting)
                yield args, result
        except (KeyboardInterrupt, SystemExit):
            # Ray ends as a whole, or lets go of what this process had: nothing is waited for.
            self._busy.clear()
            raise
        finally:
            # After an error, or for a caller who has seen enough: what is still being done is of no use to anybody.
            while self._busy:
                self._kill(self._busy.popitem()[1][0])

    def _kill(self, actor: Any) -> None:
        """Ends one, also if it is only out of reach: it must not go on beside its successor."""
        self._all.remove(actor)
        self._here.pop(id(actor))
        with suppress(Exception):
            self._ray.kill(actor)

    def _deal(self, job: Callable[..., Any], waiting: deque[tuple[tuple[Any, ...], int]]) -> None:
        """Gives out what waits, as far as there are hands."""
        if not waiting:
            self._take_over(waiting)
        while waiting and (self._idle or len(self._busy) < self.number):
            args, tries = waiting.popleft()
            if not self._idle:
                self._idle.append(self._actor.remote(self._open, self._args))
                self._all.append(self._idle[-1])
                self._here[id(self._idle[-1])] = self._idle[-1].__ray_ready__.remote().future()
            actor = self._idle.popleft()
            self._busy[actor.work.remote(job, args).future()] = actor, args, tries

    def _take_over(self, waiting: deque[tuple[tuple[Any, ...], int]]) -> None:
        """Hands that are idle do the jobs of those that have not come: on a cluster that has lost a machine there may
        never be room for them.
        """
        late = [future for future, (actor, *_) in self._busy.items() if not self._here[id(actor)].done()]
        for future in late[: len(self._idle)]:
            actor, args, tries = self._busy.pop(future)
            self._kill(actor)
            waiting.append((args, tries))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get([actor.close.remote() for actor in self._idle], timeout=GRACE)
        if kind is None or issubclass(kind, Exception):
            # The processors are free for others.
            while self._all:
                self._kill(self._all[-1])
        self._stack.__exit__(kind, error, trace)


def _died(error: Exception) -> str:
    told = f"{type(error).__name__}; killed, or out of memory"
    return f"{TRIES} workers died of the same job ({told}); use fewer, or a smaller model"
