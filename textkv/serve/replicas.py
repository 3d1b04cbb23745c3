"""Several copies of one model behind one door, on Ray Serve: a conversation is answered where its cache lies.

The door is the app of every server (keys, limits, metrics, streaming); instead of a model's thread it has replicas,
each with the model, its conversations and its own fair queue. A replica that dies is replaced by Ray Serve; what it was
answering is asked again of another, which reads the prompt afresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from textkv.command.ray_cluster import LOCAL, connected
from textkv.serve.engine import ENGINES
from textkv.serve.folders import OwnFolder
from textkv.serve.interface import Engine, Opening, Outcome
from textkv.serve.placing import key_of
from textkv.serve.protocol import ChatRequest, Wrong
from textkv.serve.queue import Full, Job, Turns

APP = "agentkv"
TRIES = 3  # of a request whose replica dies
BEAT = 0.25  # seconds after which a replica says that it still works
MANY = 1_000_000  # requests at one replica; the door's own limit is what counts


class Replica:
    """One process's engine; what Ray Serve deploys."""

    def __init__(self, engine: str, opening: Opening) -> None:
        self.engine = ENGINES.find(engine).open(opening)
        self.turns = Turns(self.engine, MANY)

    async def answer(self, client: str, request: ChatRequest) -> AsyncIterator[str | Outcome | Exception]:
        """An answer in pieces, the outcome or what went wrong last; "" while there is nothing to say."""
        try:
            prepared = await asyncio.to_thread(self.engine.prepare, request)
        except Exception as error:
            yield _plain(error)
            return
        job = Job(client, prepared, asyncio.get_running_loop(), request.stream)
        self.turns.add(job)
        piece: str | Outcome | Exception = ""
        try:
            while isinstance(piece, str):
                try:
                    piece = await asyncio.wait_for(job.pieces.get(), BEAT)
                except TimeoutError:
                    piece = ""
                yield _plain(piece) if isinstance(piece, Exception) else piece
        finally:
            # Also when the door has closed its end: the model is free within one step.
            job.gone.set()


class Spread:
    """In place of `Turns` at the door: each job goes to its conversation's replica at once, and waits there in turn.

    Args:
        handle: of the deployment.
        replicas: how many answer at a time.
        limit: jobs that may wait.
    """

    def __init__(self, handle: Any, replicas: int, limit: int) -> None:
        self.handle, self.replicas, self.limit = handle, replicas, limit
        self._tasks: set[asyncio.Task] = set()

    def __len__(self) -> int:
        return max(0, len(self._tasks) - self.replicas)

    def add(self, job: Job) -> None:
        """Sends a job on its way. Raises Full if as many as may wait do so already."""
        self.check_room()
        task = asyncio.get_running_loop().create_task(self._forward(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_room(self) -> None:
        """Raises Full if as many wait as may."""
        if len(self) >= self.limit:
            raise Full(f"{self.limit} requests wait already; try again later")

    def close(self, patience: float = 5.0) -> None:
        """Nothing to wait for: jobs end with the door's loop."""

    async def _forward(self, job: Job) -> None:
        """Hands the pieces over, from another replica if one dies."""
        from ray.exceptions import RayError

        for attempt in range(1, TRIES + 1):
            given = False
            try:
                async for piece in self._pieces(job):
                    given = given or bool(piece)
                    if piece:
                        job.tell(piece)
                return
            except RayError:
                # What a stream has given out cannot be taken back, and another replica may go on otherwise.
                if job.gone.is_set() or attempt == TRIES or (given and job.prepared.stream):
                    job.tell(RuntimeError("the replica ended"))
                    return

    async def _pieces(self, job: Job) -> AsyncIterator[str | Outcome | Exception]:
        there = self.handle.options(stream=True, session_id=key_of(job.prepared))
        answer = there.answer.remote(job.client, job.prepared)
        try:
            async for piece in answer:
                yield piece
                if job.gone.is_set():
                    return
        finally:
            with suppress(Exception):
                answer.cancel()


class Door(Engine):
    """In place of an engine at the door: requests are prepared where they are answered."""

    def prepare(self, request: ChatRequest) -> ChatRequest:
        """See `Engine`."""
        return request

    def figures(self) -> Mapping[str, float]:
        """See `Engine`: what replicas hold is theirs."""
        return {}

    def close(self) -> None:
        """See `Engine`."""


@contextmanager
def replicas(number: int, address: str, engine: str, opening: Opening, limit: int) -> Iterator[Spread]:
    """A context in which `number` replicas serve; gives what takes jobs to them.

    Args:
        address: of Ray: `local`, or HOST:PORT.
        engine: its name, see `ENGINES`.
        limit: requests that may wait.

    Raises:
        ValueError: the model cannot be opened, or Ray has too few processors.
    """
    with connected(address, number), _on_disk(opening) as opening:
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        gpu = {"num_gpus": 1} if "cuda" in opening.device else {}
        deployment = serve.deployment(
            num_replicas=number,
            max_ongoing_requests=MANY,
            ray_actor_options={"num_cpus": 1} | gpu,
            request_router_config=RequestRouterConfig(request_router_class="textkv.serve.affinity:ByConversation"),
            health_check_period_s=1,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )(Replica)
        # What it says of its doings is nothing to whoever started a server.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # The door is ours: Serve's own would listen beside it.
        serve.start(proxy_location="Disabled")
        try:
            try:
                handle = serve.run(deployment.bind(engine, opening), name=APP, route_prefix=None)
            except RuntimeError as error:
                said = [line for line in str(error).splitlines() if line.strip()]
                raise ValueError(f"the replicas could not be opened: {said[-1] if said else error}") from None
            yield Spread(handle, number, limit)
        finally:
            # Ray here ends as a whole, and at once; on a cluster the replicas would stay.
            if address != LOCAL:
                with suppress(Exception):
                    serve.delete(APP, _blocking=False)


@contextmanager
def _on_disk(opening: Opening) -> Iterator[Opening]:
    """The opening with a folder of its own below the given one: a replica that is killed cannot tidy up."""
    if opening.disk is None:
        yield opening
        return
    own = OwnFolder(opening.disk.absolute(), "replicas-")
    try:
        yield replace(opening, disk=own.path)
    finally:
        own.close()


def _plain(error: Exception) -> Exception:
    """An error that any process can read: of its kind if the client is to know it, else by its name alone."""
    if isinstance(error, Wrong):
        return error
    return ValueError(str(error)) if isinstance(error, ValueError) else RuntimeError(type(error).__name__)
