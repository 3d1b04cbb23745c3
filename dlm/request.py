"""What is asked of a generation beside rule and cache, and all that can be wrong with it, found before any forward."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from dlm.canvas import Canvas
from dlm.models.card import Card

EndOfText = Literal["stop", "fill", "none"]


@dataclass(frozen=True)
class Request:
    """Lengths and conventions of a generation; the fields are arguments of `dlm.decode.decode`.

    Raises:
        ValueError: a length that is no number of tokens, blocks longer than the answer, fewer steps than blocks, a
            negative strength of guidance, an unknown convention for ends of text.
    """

    gen_length: int
    block_length: int | None
    steps: int | None
    cfg_scale: float
    eos: EndOfText

    def __post_init__(self) -> None:
        _check_number("gen_length", self.gen_length, "tokens")
        for name, unit in (("block_length", "tokens"), ("steps", "forwards")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.gen_length)
            _check_number(name, getattr(self, name), unit)
        gen_length, block_length, cfg_scale = self.gen_length, self.block_length, self.cfg_scale
        if block_length > gen_length:
            raise ValueError(
                f"block_length={block_length} is longer than gen_length={gen_length}; use at most that, or None for "
                "one single block"
            )
        blocks = -(-gen_length // block_length)
        if self.steps < blocks:
            raise ValueError(
                f"steps={self.steps} do not reach gen_length={gen_length}: each of its {blocks} blocks of "
                f"{block_length} needs a forward; use at least {blocks} steps or longer blocks"
            )
        if self.eos not in ("stop", "fill", "none"):
            raise ValueError(f"eos={self.eos!r}: use 'stop', 'fill' or 'none'")
        if isinstance(cfg_scale, bool) or not isinstance(cfg_scale, int | float) or not 0 <= cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale={cfg_scale!r} is no strength of guidance; use 0 (none) or more")

    def canvas(self, card: Card, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Canvas:
        """The prompts with their masks behind them; warns where they leave what the model's authors advise.

        Args:
            input_ids, attention_mask: as `dlm.decode.decode` takes them.

        Raises:
            ValueError: ids of another shape or dtype, padding that is not on the left, a prompt with a mask in it, a
                prompt that a shifted model cannot begin from, more positions than the model has.
        """
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.shape[0] == 0:
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}; give int64 [batch, tokens] with at "
                "least one row"
            )
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; give one "
                    "value per token"
                )
            real = attention_mask.bool()
            if bool((real[:, :-1] & ~real[:, 1:]).any()):
                raise ValueError("the prompts are padded on the right or inside; pad on the left")
        _check_prompts(card, input_ids, real, self.gen_length)
        return Canvas(
            input_ids, attention_mask, gen_length=self.gen_length, block_length=self.block_length,
            mask_id=card.mask_id, shift=card.shift,
        )  # fmt: skip


def _check_number(name: str, value: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is no number of {unit}; use 1 or more")


def _check_prompts(card: Card, input_ids: torch.Tensor, real: torch.Tensor, gen_length: int) -> None:
    if bool(((input_ids == card.mask_id) & real).any()):
        raise ValueError(
            f"a prompt contains the mask token {card.mask_id}, which stands for what is to be written; take it out"
        )
    tokens = real.sum(1)
    if card.shift and int(tokens.min()) == 0:
        raise ValueError(
            "a prompt is empty, and this model predicts each token from the row before it; begin it with one token, "
            "for example the model's begin-of-text"
        )
    longest = int(tokens.max()) + gen_length
    if card.context_limit is not None and longest > card.context_limit:
        raise ValueError(
            f"the prompt of {longest - gen_length} tokens and gen_length={gen_length} need {longest} positions, the "
            f"model has {card.context_limit}; shorten the prompt or generate at most "
            f"{max(0, card.context_limit - longest + gen_length)}"
        )
    if card.context_advised is not None and longest > card.context_advised:
        warnings.warn(
            f"prompt and answer take {longest} positions, the model's authors advise at most {card.context_advised}",
            stacklevel=5,
        )
