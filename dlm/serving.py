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
        frees its row within one forward.
        """
        config = asks[0].prepared.config
        texts, tokens, open_rows = [""] * len(asks), [0] * len(asks), set(range(len(asks)))
        error: Exception = Cancelled()
        try:
            for piece in self._pieces(asks, config):
                row = piece.row
                texts[row], tokens[row] = texts[row] + (piece.text or ""), tokens[row] + len(piece.ids)
                if piece.text:
                    asks[row].give(piece.text)
                if piece.done:
                    open_rows.remove(row)
                    ended = "stop" if tokens[row] < config.gen_length else "length"
                    asks[row].done(Outcome(texts[row], ended, len(asks[row].prepared.ids), 0, tokens[row]))
        except Exception as problem:
            error = problem
        for row in open_rows:
            asks[row].done(error)

    def _pieces(self, asks: list[Ask], config: DecodingConfig) -> Iterator[Piece]:
        ids, mask = pad_left([ask.prepared.ids for ask in asks], self.model.decoding_spec.pad_id, self.model.device)
        return stream(
            self.model,
            ids,
            mask,
            config,
            generator=[self._dice(ask.prepared.seed) for ask in asks],
            tokenizer=self.tokenizer,
            wanted=lambda row: not asks[row].cancelled(),
        )

    def _dice(self, seed: int | None) -> torch.Generator:
        dice = torch.Generator(self.model.device)
        dice.manual_seed(seed) if seed is not None else dice.seed()
        return dice

    def figures(self) -> Mapping[str, float]:
        """See `Engine`: nothing lies between requests."""
        return {"kv_bytes": 0, "conversations": 0}


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
