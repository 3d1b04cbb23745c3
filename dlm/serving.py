"""The engine of diffusion language models behind a server: a canvas a request, given out from the left as it is final.

No cache outlives a request: what a diffusion model has read of a prompt depends on the answer that it was written with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dlm.cache import resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import stream
from dlm.models.loading import MODELS
from dlm.prompts import check_config, check_prompt, prompt_ids
from dlm.sources import model_info, open_model
from textkv.serve import Cancelled, Engine, Opening, Outcome
from textkv.serve.protocol import ChatRequest, too_long

LONGEST = 2**31  # tokens, where a model names no limit
ANSWER = 128  # tokens, where a request names no limit


@dataclass(frozen=True)
class Asked:
    """A prompt's ids int64 [1, P], and how it is decoded."""

    ids: torch.Tensor
    config: DecodingConfig
    seed: int | None


class DiffusionEngine(Engine):
    """A model of `dlm.models` behind the server.

    Args:
        cache: a cache policy, see `dlm.cache`; None = the model's own.
    """

    reads = tuple(MODELS)

    def __init__(self, model: Any, tokenizer: Any, cache: str | None = None) -> None:
        _check(cache)
        self.model, self.tokenizer, self.cache = model, tokenizer, cache

    @classmethod
    def check(cls, opening: Opening) -> None:
        """See `Engine`; `method` is a cache policy of this wing."""
        if opening.budget is not None:
            raise ValueError("a budget belongs into a diffusion model's cache policy: --method 'freecache+snapkv(0.4)'")
        for name in (name for name in ("memory", "disk") if getattr(opening, name) is not None):
            raise ValueError(f"--{name}: a diffusion model keeps nothing from one request to the next; leave it out")
        _check(opening.method)
        check_config(DecodingConfig(gen_length=1, cache=opening.method), model_info(opening.model).spec)

    @classmethod
    def open(cls, opening: Opening) -> DiffusionEngine:
        """See `Engine`."""
        model, tokenizer = open_model(opening.model, opening.device, opening.dtype)
        if opening.chat_template is not None:
            tokenizer.chat_template = opening.chat_template
        return cls(model, tokenizer, opening.method)

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
        return Asked(torch.tensor([ids], dtype=torch.int64, device=self.model.device), config, request.seed)

    def answer(self, prepared: Asked, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome:
        """See `Engine`. Stops between two pieces that became final, not between two forwards."""
        dice = torch.Generator(self.model.device)
        dice.manual_seed(prepared.seed) if prepared.seed is not None else dice.seed()
        text, tokens, last = "", 0, None
        for last in stream(self.model, prepared.ids, config=prepared.config, generator=dice, tokenizer=self.tokenizer):
            if cancelled():
                raise Cancelled
            text, tokens = text + (last.text or ""), tokens + len(last.ids)
            if last.text:
                give(last.text)
        ended = tokens < prepared.config.gen_length
        return Outcome(text, "stop" if ended else "length", prepared.ids.shape[1], 0, tokens)

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
