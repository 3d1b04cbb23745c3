"""Prompts: from text or messages to ids, from ids to a padded batch, and from a checked batch to a canvas."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dlm.canvas import Canvas
from dlm.config import DecodingConfig
from dlm.models import DecodingSpec, chat_ids, text_ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], chat: bool) -> list[int]:
    """The ids of a text or of messages; `chat` puts a text into the model's chat template, as messages always are.

    Raises:
        ValueError: a tokenizer without a chat template where one is needed.
    """
    if isinstance(prompt, str):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if chat else text_ids(tokenizer, prompt)
    return chat_ids(tokenizer, prompt)


def gap_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text with gaps: "<mask:8>" in it stands for eight masks, "<mask>" for one.

    Raises:
        ValueError: a text without a gap, or a gap of no tokens.
    """
    pieces = re.split(r"<mask(?::(\d+))?>", text)
    if len(pieces) == 1:
        raise ValueError(f"{text[:40]!r} has no gap; write <mask:8> where eight tokens are to be filled in")
    masks = [1 if count is None else int(count) for count in pieces[1::2]]
    if 0 in masks:
        raise ValueError("<mask:0> is no gap; leave it out, or give it a number of tokens")
    ids: list[int] = []
    for piece, count in zip(pieces[::2], [*masks, 0], strict=True):
        ids += text_ids(tokenizer, piece) if piece else []
        ids += [tokenizer.mask_token_id] * count
    return ids


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as int64 [batch, longest], and the mask of what is real, of the same shape."""
    longest = max(map(len, rows))
    # On the left, so that every answer begins in the same column and one slice of the canvas holds them all.
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    # The view keeps two dimensions where every prompt is empty: torch.tensor([[]]) alone would be [1, 0] of floats.
    shape = (len(rows), longest)
    made = [torch.tensor(x, dtype=torch.int64, device=device).view(shape) for x in (ids, mask)]
    return made[0], made[1]


def make_canvas(
    config: DecodingConfig, spec: DecodingSpec, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> Canvas:
    """The prompts with their masks behind them; warns where they leave what the model's authors advise.

    With `infill` the blocks cover all from the first mask of any row on and end with the canvas; their length is the
    configuration's, or that of what they cover where it is None.

    Args:
        input_ids: int64 [batch, P], prompts padded on the left.
        attention_mask: [batch, P], nonzero = real token; None = no padding.

    Raises:
        ValueError: ids of another shape or dtype, padding that is not on the left, a prompt with a mask in it without
            `infill`, or none in it with `infill` and nothing to generate, a prompt that a shifted model cannot begin
            from, more positions than the model has.
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
        # Padded on the left means that no real token has padding behind it.
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError("the prompts are padded on the right or inside; pad on the left")
    _check_prompts(spec, input_ids, real, config)
    options = {"gen_length": config.gen_length, "mask_id": spec.mask_id, "shift": spec.shift}
    if spec.block is not None:
        if config.infill:
            raise ValueError("infill: a block-causal model does not see the text behind a gap; generate from the left")
        if not bool(real.all()):
            raise ValueError(
                "the prompts differ in length, and a block-causal model counts its blocks from the first token; decode "
                "prompts of one length together"
            )
        return Canvas(input_ids, block_length=config.block_of(spec), grid=spec.block, **options)
    if not config.infill:
        return Canvas(input_ids, attention_mask, block_length=config.block_length, **options)
    # What pads a row may be anything, the mask too; it must not be taken for a gap.
    input_ids = input_ids.masked_fill(~real, spec.pad_id)
    gaps = ((input_ids == spec.mask_id) & real).any(0).nonzero()[:, 0].tolist()
    masks = input_ids.shape[1] + config.gen_length - (gaps[0] if gaps else input_ids.shape[1])
    block = min(config.block_length or masks, masks)
    # Blocks are counted from the end, where all rows stand together: so a row has those that it would have alone,
    # wherever the others' gaps begin. What is missing in front of the first block is padding.
    blocks = -(-masks // block)
    prompt = input_ids.shape[1] + config.gen_length - blocks * block
    if prompt < 0:
        input_ids = torch.nn.functional.pad(input_ids, (-prompt, 0), value=spec.pad_id)
        real = torch.nn.functional.pad(real, (-prompt, 0), value=False)
    return Canvas(input_ids, real, block_length=block, prompt=max(prompt, 0), **options)


def check_prompt(config: DecodingConfig, spec: DecodingSpec, ids: Sequence[int]) -> None:
    """Raises ValueError if a model with this spec cannot go on from the prompt `ids`; errors as `make_canvas`."""
    make_canvas(config, spec, torch.tensor([ids], dtype=torch.int64))


def _check_prompts(spec: DecodingSpec, input_ids: torch.Tensor, real: torch.Tensor, config: DecodingConfig) -> None:
    gaps, tokens = (input_ids == spec.mask_id) & real, real.sum(1)
    if config.infill:
        _check_gaps(spec, gaps, real, config)
    # The canvas reads its progress from the masks, so a mask in a prompt would be taken for one to be written.
    elif bool(gaps.any()):
        raise ValueError(
            f"a prompt contains the mask token {spec.mask_id}, which stands for what is to be written; take it out, or "
            "use infill=True to have it written"
        )
    if spec.shift and int(tokens.min()) == 0:
        raise ValueError(
            "a prompt is empty, and this model predicts each token from the row before it; begin it with one token, "
            "for example the model's begin-of-text"
        )
    longest = int(tokens.max()) + config.gen_length
    if spec.context_limit is not None and longest > spec.context_limit:
        raise ValueError(
            f"the prompt of {longest - config.gen_length} tokens and gen_length={config.gen_length} need {longest} "
            f"positions, the model has {spec.context_limit}; shorten the prompt or generate at most "
            f"{max(0, spec.context_limit - longest + config.gen_length)}"
        )
    if spec.context_advised is not None and longest > spec.context_advised:
        warnings.warn(
            f"prompt and answer take {longest} positions, the model's authors advise at most {spec.context_advised}",
            stacklevel=3,
        )


def _check_gaps(spec: DecodingSpec, gaps: torch.Tensor, real: torch.Tensor, config: DecodingConfig) -> None:
    if config.gen_length == 0 and not bool(gaps.any(1).all()):
        raise ValueError(
            f"gen_length=0 fills the masks (token {spec.mask_id}) of the input, and a row has none; put some in, or "
            "generate tokens behind it"
        )
    # A row's first real token is the first True of its mask.
    first = real.int().argmax(1, keepdim=True)
    if spec.shift and gaps.shape[1] and bool(gaps.gather(1, first).any()):
        raise ValueError(
            "an input begins with a mask, and this model predicts each token from the row before it; begin it with a "
            "token, for example the model's begin-of-text"
        )
