"""The HTTP side: OpenAI's chat completions, models, health and Prometheus metrics, as a FastAPI app.

Prompts and pictures stand in no log and no metric. Errors have OpenAI's form, one line each.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from textkv.records import parse
from textkv.serve import protocol
from textkv.serve.doorkeeper import HereAlone, KeyAsked, Keys
from textkv.serve.interface import Engine, Outcome
from textkv.serve.metrics import Metrics
from textkv.serve.queue import Full, Job, Turns

MOMENT = 1.0  # seconds that answers get when the server is told to stop


@dataclass(frozen=True)
class Limits:
    """What a server takes. bytes: of one request's body. waiting: requests in the queue. seconds: for one answer, the
    time in the queue included.
    """

    bytes: int = 32_000_000
    waiting: int = 64
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limit of {name} is {value}, which lets nothing through; use more than 0")


class Refused(Exception):
    """A request that gets an error instead of an answer: its HTTP status and one line."""

    def __init__(
        self,
        status: int,
        line: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(line)
        self.status, self.body = status, protocol.error_body(line, kind, code, param)


def build_app(
    engine: Engine,
    name: str,
    limits: Limits | None = None,
    keys: Keys = (),
    turns: Any = None,
    here_alone: bool = False,
) -> FastAPI:
    """The app that serves `engine` as the model `name`.

    Args:
        keys: one of them must come as a bearer token with every request; none = no key is asked for.
        turns: what takes jobs to answers, in the form of `textkv.serve.queue.Turns`; None = one thread for the engine.
        here_alone: only requests that were meant for this machine by name are answered, see `HereAlone`.
    """
    routes = _Routes(engine, name, limits or Limits(), turns, bool(keys))
    # Without /docs and /openapi.json: the pages load scripts from elsewhere.
    app = FastAPI(lifespan=routes.lifespan, openapi_url=None)
    app.state.turns, app.state.close_soon = routes.turns, routes.close_soon
    if keys:
        app.add_middleware(KeyAsked, keys=keys)
    if here_alone:
        app.add_middleware(HereAlone)
    app.add_exception_handler(Refused, routes.refuse)
    app.add_exception_handler(HTTPException, routes.unknown)
    for path, answer in (("/health", routes.health), ("/metrics", routes.show), ("/v1/models", routes.models)):
        app.add_api_route(path, answer, response_model=None)
    app.add_api_route("/v1/models/{asked:path}", routes.model, response_model=None)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    return app


class _Routes:
    """What is answered under which path, for one engine."""

    def __init__(self, engine: Engine, name: str, limits: Limits, turns: Any = None, keys: bool = False) -> None:
        self.keys = keys
        self.engine, self.name, self.limits = engine, name, limits
        self.turns = Turns(engine, limits.waiting) if turns is None else turns
        self.metrics, self.started = Metrics(), int(time.time())
        self.closing = asyncio.Event()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Ends the model's thread and lets go of its conversations when the server stops."""
        yield
        await asyncio.to_thread(self.turns.close)
        self.engine.close()

    def close_soon(self) -> None:
        """Told within the event loop that the server stops: what is not answered in a moment gets an error."""
        asyncio.get_running_loop().call_later(MOMENT, self.closing.set)

    async def refuse(self, request: Request, error: Refused) -> Response:
        """An error instead of an answer."""
        self.metrics.refused(error.status)
        return JSONResponse(error.body, error.status)

    async def unknown(self, request: Request, error: HTTPException) -> Response:
        """A path or a verb that is not served."""
        line = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(protocol.error_body(line), error.status_code, error.headers)

    async def health(self) -> dict[str, Any]:
        """That the server lives, and how many wait."""
        return {"status": "ok", "model": self.name, "waiting": len(self.turns)}

    async def show(self) -> Response:
        """Counters and what is held now, as Prometheus reads them."""
        figures = self.engine.figures() | {"requests_waiting": len(self.turns)}
        return Response(generate_latest(self.metrics.with_figures(figures)), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(self.name, self.started)]}

    async def model(self, asked: str) -> dict[str, Any]:
        """The same by name. Raises Refused for another."""
        _check_name(asked, self.name)
        return _model(self.name, self.started)

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as a stream.

        Raises:
            Refused: 400 for what cannot be carried out, 404 for another model, 408 for a body that does not come, 413
                for too large a one, 415 for a packed one, 429 for a full queue, 500 for a failure of the model, 503
                from a server that stops, 504 after the time limit.
        """
        try:
            asked = await self._in_time(_read(request, self.limits))
        except ClientDisconnect:
            self.metrics.gone()
            return Response(status_code=499)
        _check_name(asked.model, self.name)
        # Whoever has another key learns nothing of what others told, not even by what is cached.
        asked.of(hashlib.sha256(_client(request).encode()).hexdigest() if self.keys else "")
        try:
            # Before the work of preparing it, and once more behind that.
            self.turns.check_room()
            prepared = await self._in_time(asyncio.to_thread(self.engine.prepare, asked))
            job = Job(_client(request), prepared, asyncio.get_running_loop(), asked.stream)
            self.turns.add(job)
        except Full as error:
            raise Refused(429, str(error), "rate_limit_error") from None
        except Refused:
            raise
        except Exception as error:
            raise _told(error) from None
        answer = _Reply(request, job, asked, self.metrics, self.limits.seconds, self.closing)
        return await (answer.stream() if asked.stream else answer.whole())

    async def _in_time(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` gives. Raises Refused if the server stops before."""
        doing, closing = asyncio.ensure_future(work), asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait((doing, closing), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise _stops()
            return doing.result()
        finally:
            doing.cancel()
            closing.cancel()


class _Reply:
    """The way of one answer to its client."""

    def __init__(
        self,
        request: Request,
        job: Job,
        asked: protocol.ChatRequest,
        metrics: Metrics,
        seconds: float,
        closing: asyncio.Event,
    ) -> None:
        self.request, self.job, self.asked, self.metrics, self.closing = request, job, asked, metrics, closing
        self.began, self.seconds = time.monotonic(), seconds
        self.coming: asyncio.Future | None = None
        self.left: asyncio.Future | None = None
        self.stops: asyncio.Future | None = None
        self.head = (f"chatcmpl-{uuid.uuid4().hex}", asked.model, int(time.time()))

    async def whole(self) -> Response:
        """The answer as one JSON body."""
        async for piece in self._pieces():
            if isinstance(piece, Outcome):
                return JSONResponse(protocol.completion(*self.head, piece.text, piece.reason, piece.usage()))
        # Whoever asked is not there to read it.
        return Response(status_code=499)

    async def stream(self) -> Response:
        """The answer as server-sent events. What goes wrong before the first piece is an ordinary error."""
        pieces = self._pieces()
        first = await anext(pieces, None)
        return StreamingResponse(self._events(first, pieces), media_type="text/event-stream")

    async def _events(self, first: str | Outcome | None, pieces: AsyncIterator[str | Outcome]) -> AsyncIterator[str]:
        yield _event(protocol.chunk(*self.head, {"role": "assistant", "content": ""}))
        piece = first
        try:
            while isinstance(piece, str):
                yield _event(protocol.chunk(*self.head, {"content": piece}))
                piece = await anext(pieces, None)
        except Refused as error:
            yield _event(error.body)
        if isinstance(piece, Outcome):
            yield _event(protocol.chunk(*self.head, {}, piece.reason))
            if self.asked.tells_usage:
                yield _event(protocol.usage_chunk(*self.head, piece.usage()))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[str | Outcome]:
        """Texts, then the outcome; ends early when the client has gone.

        Raises:
            Refused: the answer failed, or took too long.
        """
        try:
            while True:
                piece = await self._next()
                if piece is None:
                    self.metrics.gone()
                    return
                if isinstance(piece, Exception):
                    raise _told(piece)
                if isinstance(piece, Outcome):
                    self.metrics.answered(piece, time.monotonic() - self.began)
                yield piece
                if isinstance(piece, Outcome):
                    return
        finally:
            # Frees the model within one step, however this ended.
            self.job.gone.set()
            for waiting in filter(None, (self.left, self.coming, self.stops)):
                waiting.cancel()

    async def _next(self) -> str | Outcome | Exception | None:
        """The next piece; None if the client has gone before it came."""
        seconds = self.began + self.seconds - time.monotonic()
        if self.left is None:
            self.left = asyncio.ensure_future(self._leaves())
            self.stops = asyncio.ensure_future(self.closing.wait())
        if self.coming is None:
            self.coming = asyncio.ensure_future(self.job.pieces.get())
        if seconds > 0:
            first = (self.left, self.coming, self.stops)
            await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.left.done():
            return None
        if self.stops.done():
            raise _stops()
        if not self.coming.done():
            raise Refused(504, f"no whole answer within {self.seconds:g} seconds", "timeout_error")
        piece, self.coming = self.coming.result(), None
        return piece

    async def _leaves(self) -> None:
        """Returns when the client has gone: behind a body nothing else is told of it."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


async def _read(request: Request, limits: Limits) -> protocol.ChatRequest:
    """The request in the body. Raises ClientDisconnect if its client has gone."""
    large = f"the request is larger than {limits.bytes:,} bytes; send fewer or smaller pictures"
    coded = request.headers.get("content-encoding", "").strip().lower()
    if coded not in ("", "identity"):
        raise Refused(415, f"a body with content-encoding {coded[:20]!r} is not unpacked; send it as it is")
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limits.bytes:
        raise Refused(413, large)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.bytes:
                    raise Refused(413, large)
    except TimeoutError:
        raise Refused(408, f"the request did not come within {limits.seconds:g} seconds", "timeout_error") from None
    try:
        return protocol.read_request(parse(bytes(body)))
    except ValueError as error:
        raise Refused(400, f"the body is no request: {_line(error)}", **_named(error)) from None


def _told(error: Exception) -> Refused:
    # A template refuses turns that its model was not trained on, two of the same role for example.
    if isinstance(error, ValueError | TemplateError):
        return Refused(400, _line(error), **_named(error))
    # What it was in full is for whoever runs the server; a message of torch may hold tensors of the prompt.
    return Refused(500, f"the answer failed: {type(error).__name__}", "server_error")


def _stops() -> Refused:
    return Refused(503, "the server stops; ask again when it is back", "server_error")


def _named(error: Exception) -> dict[str, str | None]:
    """Which field an error is about, and what clients call it."""
    return {name: getattr(error, name, None) for name in ("param", "code")}


def _check_name(asked: str, name: str) -> None:
    if asked != name:
        line = f"no model {asked!r} here; this server has {name!r}"
        raise Refused(404, line, code="model_not_found", param="model")


def _client(request: Request) -> str:
    """Who shares a turn: the key where there is one, else the address."""
    return request.headers.get("authorization") or (request.client.host if request.client else "")


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "local"}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
