"""What a generation is to be done with, checked as far as possible before a model is loaded; and prompts as ids.

The commands share this: `python -m dlm.generate` writes with one `Settings`, `python -m eval.decoding` with many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dlm.cache import resolve_cache
from dlm.canvas import Canvas
from dlm.decode import Decoded, Stats, decode
from dlm.models import Card, chat_ids, text_ids
from dlm.request import EndOfText, Request
from dlm.unmask import Guided, Guider, Sampling, parse_rule

BLOCK_LENGTH = 32  # of an answer that is at least as long


@dataclass(frozen=True)
class Settings:
    """The arguments of `dlm.decode.decode` that do not need a model.

    Attributes:
        block_length: None = 32, or the whole answer where that is shorter.
        guided: whether there will be a guide.
        the others: as `decode` has them.

    Raises:
        ValueError: whatever cannot work, but for what depends on the model.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    cache: str = "freecache"
    unmask: str | None = None
    guided: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    eos: EndOfText = "stop"

    def __post_init__(self) -> None:
        if self.block_length is None and isinstance(self.gen_length, int):
            object.__setattr__(self, "block_length", max(1, min(BLOCK_LENGTH, self.gen_length)))
        request = Request(self.gen_length, self.block_length, self.steps, self.cfg_scale, self.eos)
        object.__setattr__(self, "steps", request.steps)
        Sampling(self.temperature, self.top_p, self.top_k)
        resolve_cache(self.cache)
        if self.unmask is not None:
            check_rule(self.unmask, self.guided)

    @property
    def blocks(self) -> int:
        """Blocks of the answer: the fewest steps that it can be written in."""
        return -(-self.gen_length // self.block_length)

    def rule(self, card: Card) -> str:
        """The rule as an expression."""
        return self.unmask or ("guided" if self.guided else card.unmask)

    def check(self, card: Card, ids: Sequence[int]) -> None:
        """Raises ValueError if this model cannot go on from the prompt `ids`."""
        request = Request(self.gen_length, self.block_length, self.steps, self.cfg_scale, self.eos)
        request.canvas(card, torch.tensor([ids], dtype=torch.int64), None)

    def write(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        guide: Guider | None = None,
        seed: int = 0,
        on_step: Callable[[Canvas, Stats], None] | None = None,
    ) -> Decoded:
        """Answers to `prompts`, lists of ids, on the model's device; errors as `decode`."""
        ids, mask = pad_left(prompts, model.card.pad_id, model.device)
        return decode(
            model, ids, mask, gen_length=self.gen_length, block_length=self.block_length, steps=self.steps,
            cache=self.cache, unmask=self.unmask, guide=guide if self.guided else None, temperature=self.temperature,
            top_p=self.top_p, top_k=self.top_k, cfg_scale=self.cfg_scale, eos=self.eos, on_step=on_step,
            generator=torch.Generator(model.device).manual_seed(seed),
        )  # fmt: skip


def check_rule(expression: str, guided: bool) -> None:
    """Raises ValueError if there is no such rule, or it and the guide do not go together."""
    needs_guide = isinstance(parse_rule(expression), Guided)
    if needs_guide and not guided:
        raise ValueError(f"unmask={expression!r} asks a guide and none is named; use --guide, or another rule")
    if guided and not needs_guide:
        raise ValueError(f"unmask={expression!r} asks no guide; use guided(...), or --guide none")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], chat: bool) -> list[int]:
    """The ids of a text or of messages; `chat` puts a text into the model's chat template, as messages always are.

    Raises:
        ValueError: a tokenizer without a chat template where one is needed.
    """
    if isinstance(prompt, str):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if chat else text_ids(tokenizer, prompt)
    return chat_ids(tokenizer, prompt)


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as int64 [batch, longest], and the mask of what is real, of the same shape."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    shape = (len(rows), longest)
    made = [torch.tensor(x, dtype=torch.int64, device=device).view(shape) for x in (ids, mask)]
    return made[0], made[1]


def figures(stats: Stats) -> dict[str, Any]:
    """The statistics under the names that every table has them by."""
    return {
        "forwards": stats.forwards,
        "query_tokens": stats.query_tokens,
        "guider_forwards": stats.guider_forwards,
        "tokens_per_forward": stats.tokens_per_forward,
        "seconds": stats.seconds,
        "cache_bytes": stats.cache_bytes,
        "cache_bytes_peak": stats.cache_bytes_peak,
    }
