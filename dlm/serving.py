"""The engine of diffusion language models behind a server: each request a row of a canvas, given out from the left as
it is final. Requests that wait and are decoded alike share a canvas.

No cache outlives a request: what a diffusion model has read of a prompt depends on the answer that it was written with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dlm.cache import resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import Piece, stream
from dlm.models.loading import MODELS
from dlm.prompts import check_config, check_prompt, pad_left, prompt_ids
from dlm.sources import model_info, open_model
from textkv.serve import Cancelled, Engine, Opening, Outcome
from textkv.serve.protocol import ChatRequest, too_long
from textkv.serve.rows import Ask, More

LONGEST = 2**31  # tokens, where a model names no limit
ROWS = 16  # requests that share a canvas
ANSWER = 128  # tokens, where a request names no limit


@dataclass(frozen=True)
class Asked:
    """A prompt's ids, and how it is decoded."""

    ids: list[int]
    config: DecodingConfig
    seed: int | None


class DiffusionEngine(Engine):
    """A model of `dlm.models` behind the server.

    Args:
        cache: a cache policy, see `dlm.cache`; None = the model's own.
        rows: requests that may share a canvas; None = `ROWS`.
    """

    reads = tuple(MODELS)

    def __init__(self, model: Any, tokenizer: Any, cache: str | None = None, rows: int | None = None) -> None:
        _check(cache)
        self.rows = ROWS if rows is None else rows
        self.model, self.tokenizer, self.cache = model, tokenizer, cache

    @classmethod
    def check(cls, opening: Opening) -> None:
        """See `Engine`; `method` is a cache policy of this wing."""
        if opening.budget is not None:
            raise ValueError("a budget belongs into a diffusion model's cache policy: --method 'freecache+snapkv(0.4)'")
        for name in (name for name in ("memory", "disk", "host") if getattr(opening, name)):
            raise ValueError(f"--{name}: a diffusion model keeps nothing from one request to the next; leave it out")
        _check(opening.method)
        check_config(DecodingConfig(gen_length=1, cache=opening.method), model_info(opening.model).spec)

    @classmethod
    def open(cls, opening: Opening) -> DiffusionEngine:
        """See `Engine`."""
        model, tokenizer = open_model(opening.model, opening.device, opening.dtype)
        if opening.chat_template is not None:
            tokenizer.chat_template = opening.chat_template
        return cls(model, tokenizer, opening.method, opening.rows)

    def prepare(self, request: ChatRequest) -> Asked:
        """See `Engine`."""
        told = {"frequency_penalty": request.frequency_penalty, "presence_penalty": request.presence_penalty}
        for name in (name for name, value in told.items() if value):
            raise ValueError(f"{name}: tokens of a diffusion model come in no order in which they could be counted")
        if request.schema_of_answer is not None:
            raise ValueError("response_format: a diffusion model writes from all sides, where no schema can follow it")
        messages = [{"role": _role(m.role), "content": "".join(_texts(m.parts()))} for m in request.messages]
        # A base model's tokenizer has no turns: it goes on from the last message.
        chat = self.tokenizer.chat_template is not None
        ids = prompt_ids(self.tokenizer, messages if chat else messages[-1]["content"], chat)
        limit = self.model.decoding_spec.context_limit or LONGEST
        if len(ids) >= limit:
            raise too_long(len(ids), limit)
        # Not cut to what there is room for: the length of the canvas is part of what the model sees.
        length = request.max_tokens or min(ANSWER, limit - len(ids))
        config = DecodingConfig(
            gen_length=length, cache=self.cache, temperature=request.temperature or 0.0, top_p=request.top_p,
            stop=tuple(request.stop),
        )  # fmt: skip
        check_prompt(config, self.model.decoding_spec, ids)
        return Asked(ids, config, request.seed)

    def answer(self, prepared: Asked, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome:
        """See `Engine`."""
        ends: list[Outcome | Exception] = []
        self._decode([Ask(prepared, give, cancelled, ends.append)])
        if isinstance(ends[0], Exception):
            raise ends[0]
        return ends[0]

    def joins(self, prepared: Asked) -> bool:
        """See `Engine`."""
        return self.rows > 1

    def answer_rows(self, more: More) -> None:
        """See `Engine`. Those that are decoded alike are rows of one canvas, which is full when it begins: who comes
        later waits for the next.
        """
        while asks := more(self.rows):
            alike: dict[DecodingConfig, list[Ask]] = {}
            for ask in asks:
                alike.setdefault(ask.prepared.config, []).append(ask)
            for rows in alike.values():
                self._decode(rows)

    def _decode(self, asks: list[Ask]) -> None:
        """Answers requests of one configuration; each gets the tokens that it would get alone. A client that goes away
        frees its row within one forward, and what goes wrong with a row is the end of that one alone.
        """
        # Drawn here, so that who is decoded once more draws the same tokens.
        rows = [_Row(ask, _any_seed() if ask.prepared.seed is None else ask.prepared.seed) for ask in asks]
        error = self._share(rows)
        for row in (row for row in rows if not row.over):
            end = error
            if error is not None and len(rows) > 1:
                # Whose it was shows when each is decoded alone; what a client has heard is not told again.
                row.begin_again()
                end = self._share([row])
            if not row.over:
                row.end(end or Cancelled())

    def _share(self, rows: list[_Row]) -> Exception | None:
        """Decodes rows on one canvas; what went wrong with all of it. Rows that nobody waits for stay open."""
        length = rows[0].ask.prepared.config.gen_length
        try:
            for piece in self._pieces(rows):
                rows[piece.row].take(piece, length)
        except Exception as problem:
            # Without where it was: those frames hold the canvas, and memory may be what was lacking.
            problem.__context__ = None
            return problem.with_traceback(None)
        return None

    def _pieces(self, rows: list[_Row]) -> Iterator[Piece]:
        asked = [row.ask.prepared for row in rows]
        device = self.model.device
        ids, mask = pad_left([one.ids for one in asked], self.model.decoding_spec.pad_id, device)
        return stream(
            self.model,
            ids,
            mask,
            asked[0].config,
            generator=[torch.Generator(device).manual_seed(row.seed) for row in rows],
            tokenizer=self.tokenizer,
            wanted=lambda number: not rows[number].unwanted(),
        )

    def figures(self) -> Mapping[str, float]:
        """See `Engine`: nothing lies between requests."""
        return {"kv_bytes": 0, "conversations": 0}


class _Row:
    """A request on a canvas: what was told of its answer so far.

    Args:
        seed: of what is drawn by chance.

    Attributes:
        over: whether its client has heard how it ended.
    """

    def __init__(self, ask: Ask, seed: int) -> None:
        self.ask, self.seed, self.over = ask, seed, False
        self._text, self._tokens, self._heard = "", 0, ""

    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.over or self.ask.cancelled()

    def take(self, piece: Piece, length: int) -> None:
        """Takes what has become final; of `length` tokens an answer has reached its limit."""
        if self.over:
            return
        try:
            self._text, self._tokens = self._text + (piece.text or ""), self._tokens + len(piece.ids)
            self._tell()
            if piece.done:
                ended = "stop" if self._tokens < length else "length"
                self.end(Outcome(self._text, ended, len(self.ask.prepared.ids), 0, self._tokens))
        except Exception as problem:  # of this row: a client that cannot be told
            self.end(problem)

    def begin_again(self) -> None:
        """Forgets the answer, but not what its client has heard of it."""
        self._text, self._tokens = "", 0

    def end(self, end: Outcome | Exception) -> None:
        """Tells how it ended."""
        self.over = True
        self.ask.done(end)

    def _tell(self) -> None:
        both = min(len(self._text), len(self._heard))
        if self._text[:both] != self._heard[:both]:
            raise RuntimeError("the answer is another one when it is decoded alone")
        if new := self._text[len(self._heard) :]:
            self._heard = self._text
            self.ask.give(new)


def _any_seed() -> int:
    return torch.Generator().seed()


def _check(cache: str | None) -> None:
    if cache is not None:
        resolve_cache(cache)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _texts(parts: Any) -> list[str]:
    texts = list(parts)
    if any(isinstance(part, bytes) for part in texts):
        raise ValueError("this model reads text only; send no pictures, or serve a vision-language model")
    return texts
