"""What answers a request: the interface of engines, what they are opened with, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch

from textkv.serve.protocol import ChatRequest
from textkv.serve.rows import More


@dataclass(frozen=True)
class Outcome:
    """An answer that is over. `cached_tokens` of the prompt were not read again."""

    text: str
    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def usage(self) -> dict[str, Any]:
        """The figures as clients know them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True)
class Opening:
    """What a server is asked to serve.

    Attributes:
        model: a name, folder or hub id.
        method, budget: of the cache; None = the engine's own.
        memory: bytes that conversations may hold between their turns; None = no limit.
        disk: folder for those that do not fit; None = they are dropped.
        host: bytes of the machine's memory for those that do not fit, before they go to disk.
        chat_template: in place of the model's own.
        rows: requests that may be answered together, where an engine can; None = as many as it likes.
    """

    model: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    method: str | None = None
    budget: str | None = None
    memory: int | None = None
    disk: Path | None = None
    chat_template: str | None = None
    rows: int | None = None
    host: int = 0


class Engine(Protocol):
    """One model that answers. `prepare` may be called from any thread, `answer` from one at a time. These two and
    `open` each engine must bring; what the others say here is enough.

    Attributes:
        reads: the `model_type`s of config.json that are this engine's; none = it is taken for all others.
        rows: requests that `answer_rows` takes together; 1 = none.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    rows: int = 1

    @classmethod
    def check(cls, opening: Opening) -> None:
        """Raises ValueError or FileNotFoundError, in one line, for what cannot be served, as far as it is known before
        weights are read.
        """

    @classmethod
    def open(cls, opening: Opening) -> Engine:
        """Loads a model that was checked. Raises ValueError or FileNotFoundError, in one line, for what shows then."""

    def prepare(self, request: ChatRequest) -> Any:
        """What `answer` needs of a request. Raises ValueError for one that this model cannot carry out."""

    def answer(self, prepared: Any, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome:
        """Answers, handing each text that has become final to `give`. Raises Cancelled within one step after
        `cancelled` says so.
        """

    def joins(self, prepared: Any) -> bool:
        """Whether a prepared request can be answered beside others that can."""
        return False

    def answer_rows(self, more: More) -> None:
        """Answers requests together, and those that come meanwhile, until there are none. An engine that says no more
        about it answers one after the other.

        Args:
            more: asked between two steps for those that join, so many at most.
        """
        while asks := more(1):
            for ask in asks:
                try:
                    ask.done(self.answer(ask.prepared, ask.give, ask.cancelled))
                except Exception as error:
                    ask.done(error)

    def figures(self) -> Mapping[str, float]:
        """What it holds now, by name of a metric: `kv_bytes`, `conversations`, ..."""
        return {}

    def close(self) -> None:
        """Lets go of what it holds, memory and disk."""
