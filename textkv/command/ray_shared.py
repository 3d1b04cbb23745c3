"""Something dear that workers on Ray share instead of opening it each: an actor with a desk, or several."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from textkv.command.desk import Desk
from textkv.command.ray_cluster import connected
from textkv.command.workers import WorkerFailed

TRIES = 3  # of what was asked of an actor that died: the third time it is the question that kills
CALLERS = 1024  # that may wait at one desk


class _Shared:
    """The actor. A failure to open is kept and told to whoever asks first."""

    def __init__(self, open: Callable[..., Any], args: tuple[Any, ...], rows: int) -> None:
        # As for workers: the command decides what a Ctrl-C means.
        with suppress(ValueError):  # of a thread that is not the first
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._failed = ""
        try:
            self._desk = Desk(open(*args), rows)
        except Exception as error:
            self._failed = str(error) or type(error).__name__

    def ask(self, asked: Any) -> Any:
        """See `Desk.ask`. Raises WorkerFailed if there is nothing to do it with."""
        if self._failed:
            raise WorkerFailed(self._failed)
        return self._desk.ask(asked)


class Ask:
    """What a worker is given: `ask(asked)`, answered by one of the actors in turn. Travels by pickle.

    Raises:
        WorkerFailed: what they share could not be opened, or actors keep dying.
        Exception: what the work raised.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def __call__(self, asked: Any) -> Any:
        """The answer."""
        import ray

        try:
            return ray.get(next(self._turn).ask.remote(asked))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or WorkerFailed(str(error))) from None
        except ray.exceptions.RayError as error:
            told = f"{type(error).__name__}; killed, or out of memory"
            raise WorkerFailed(f"what the workers share died {TRIES} times ({told}); use a smaller model") from None

    @property
    def _turn(self) -> Iterator[Any]:
        # Each worker begins elsewhere, else all would ask the same one at a time.
        if not hasattr(self, "_order"):
            first = random.randrange(len(self._actors))
            self._order = itertools.cycle(self._actors[first:] + self._actors[:first])
        return self._order

    def __reduce__(self) -> tuple[type[Ask], tuple[list[Any]]]:
        return Ask, (self._actors,)


@contextmanager
def shared(
    number: int, address: str, workers: int, open: Callable[..., Any], *args: Any, rows: int = 1, gpu: bool = False
) -> Iterator[Ask]:
    """A context in which `number` actors each have `open(*args)`, an `Able`, and share it with `workers`.

    An actor that dies is started again, and what it was doing is done again.

    Args:
        address: of Ray: `local`, or HOST:PORT.
        rows: how many are done together at most.
        gpu: whether they compute on GPUs: they get those of the cluster in equal parts.

    Raises:
        ValueError: Ray has too few processors for them and the workers.
    """
    with connected(address, number + workers) as ray:
        share = min(1.0, ray.cluster_resources().get("GPU", 0.0) / number) if gpu else 0
        kind = ray.remote(
            num_cpus=1, num_gpus=share, max_restarts=-1, max_task_retries=TRIES - 1, max_concurrency=CALLERS
        )(_Shared)
        actors = [kind.remote(open, args, rows) for _ in range(number)]
        try:
            yield Ask(actors)
        except (KeyboardInterrupt, SystemExit):
            actors = []  # Ray ends as a whole, or lets go of what this process had
            raise
        finally:
            for actor in actors:
                with suppress(Exception):
                    ray.kill(actor)
