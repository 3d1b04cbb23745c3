"""Prompts: from text or messages to ids, from ids to a padded batch, and from a checked batch to a canvas."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dlm.cache import resolve_cache
from dlm.canvas import Canvas
from dlm.config import DecodingConfig
from dlm.models import DecodingSpec, chat_ids, text_ids
from dlm.unmask import Guided, Rule, parse_rule

MOST_MASKS = 2**20
MOST_DIGITS = 12  # of the number in a gap: more say no more than that it is too large


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
        ValueError: a text without a gap, a gap of no tokens or no number of them, or gaps that no model could fill.
    """
    pieces = re.split(r"<mask(?::(\d+))?>", text)
    if len(pieces) == 1:
        raise ValueError(f"{text[:40]!r} has no gap; write <mask:8> where eight tokens are to be filled in")
    # Of several gaps one that is misspelt would stay in the text, unseen.
    if odd := re.search(r"<mask\s*:[^<>]{0,20}>?", " ".join(pieces[::2]), re.IGNORECASE):
        raise ValueError(f"{odd[0]!r} is no gap; write <mask:8> where eight tokens are to be filled in")
    # By its digits first: a number of thousands of them is none that Python reads.
    masks = [1 if count is None else int(count[:MOST_DIGITS]) for count in pieces[1::2]]
    if sum(masks) > MOST_MASKS:
        raise ValueError(f"gaps of more than {MOST_MASKS:,} tokens: no model has so many positions; make them shorter")
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


def _real(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which of the ids are tokens and not padding, bool [batch, P]. Raises ValueError for what `make_canvas` refuses of
    shapes, dtypes and padding."""
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        # What a tokenizer gives by default is lists, and its whole answer is a dict.
        if not isinstance(given, torch.Tensor) and (given is not None or name == "input_ids"):
            raise ValueError(
                f"{name} is a {type(given).__name__}; give a tensor [batch, tokens], as a tokenizer does with "
                "return_tensors='pt'"
            )
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}; give int64 [batch, tokens] with at "
            "least one row"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; give one "
            "value per token"
        )
    if bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask holds numbers below 0, as one that is added to scores; give 1 for tokens, 0 for padding"
        )
    real = attention_mask.bool()
    # Padded on the left means that no real token has padding behind it.
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("the prompts are padded on the right or inside; pad on the left")
    return real


def make_canvas(
    config: DecodingConfig, spec: DecodingSpec, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> Canvas:
    """The prompts with their masks behind them; warns where they leave what the model's authors advise.

    With `infill` the blocks cover all from the first mask of any row on and end with the canvas; their length is the
    configuration's, or that of what they cover where it is None. A block-causal model has its own blocks: it sees the
    text behind a gap only as far as the gap's block reaches.

    Args:
        input_ids: int64 [batch, P], prompts padded on the left.
        attention_mask: [batch, P], nonzero = real token; None = no padding.

    Raises:
        ValueError: ids of another shape, dtype or vocabulary, padding that is not on the left, a prompt with a mask in
            it without `infill`, or none in it with `infill` and nothing to generate, a prompt that a shifted model
            cannot begin from, more positions than the model has.
    """
    real = _real(input_ids, attention_mask)
    _check_prompts(spec, input_ids, real, config)
    options = {"gen_length": config.gen_length, "mask_id": spec.mask_id, "shift": spec.shift}
    if spec.block is not None:
        return _grid_canvas(config, spec, input_ids, real)
    if not config.infill:
        return Canvas(input_ids, attention_mask, block_length=config.block_length, **options)
    # What pads a row may be anything, the mask too; it must not be taken for a gap.
    input_ids, width = input_ids.masked_fill(~real, spec.pad_id), input_ids.shape[1] + config.gen_length
    gaps = ((input_ids == spec.mask_id) & real).any(0).nonzero()[:, 0].tolist()
    masks = width - (gaps[0] if gaps else input_ids.shape[1])
    block = min(config.block_length or masks, masks)
    # Blocks are counted from the end, where all rows stand together: so a row has those that it would have alone,
    # wherever the others' gaps begin. What is missing in front of the first block is padding.
    blocks = -(-masks // block)
    prompt = width - blocks * block
    if prompt < 0:
        input_ids = torch.nn.functional.pad(input_ids, (-prompt, 0), value=spec.pad_id)
        real = torch.nn.functional.pad(real, (-prompt, 0), value=False)
    first = input_ids.new_full((len(input_ids),), max(-prompt, 0))
    return Canvas(input_ids, real, block_length=block, prompt=max(prompt, 0), first=first, width=width, **options)


def _grid_canvas(config: DecodingConfig, spec: DecodingSpec, input_ids: torch.Tensor, real: torch.Tensor) -> Canvas:
    """A canvas of a block-causal model: every row has its blocks at the positions, and as many, as it has alone.

    All rows end with the canvas, at the end of a block, and are padded in front by whole blocks. What lies behind an
    answer in its last block is written too, as in training; with infill only if that block has a gap at all.
    """
    grid, batch, columns = spec.block, *input_ids.shape
    tokens = real.sum(1)
    lengths = -(-(tokens + config.gen_length) // grid) * grid
    # Whole rows, as wide as the input, begin in front of their text: more padding where that would be before slot 0.
    longest = int(lengths.max())
    lacking = columns - int((longest - lengths + tokens).min()) if config.infill else 0
    length = longest + max(0, -(-lacking // grid) * grid)
    starts = length - lengths
    place = torch.arange(length, device=input_ids.device) - starts[:, None]
    gap = (input_ids == spec.mask_id) & real & (real.cumsum(1) > (lengths - grid)[:, None])
    written = gap.any(1, keepdim=True) | bool(config.gen_length)
    # Two columns more to take from: a mask and padding.
    source = torch.cat([input_ids, input_ids.new_tensor([[spec.mask_id, spec.pad_id]]).expand(batch, -1)], 1)
    behind = torch.where((place >= 0) & written, columns, columns + 1)
    ids = source.gather(1, torch.where((place >= 0) & (place < tokens[:, None]), place + (columns - tokens)[:, None],
                                       behind))  # fmt: skip
    return Canvas(
        ids, place >= 0, gen_length=0, block_length=config.block_of(spec), mask_id=spec.mask_id, shift=spec.shift,
        prompt=int((ids == spec.mask_id).any(0).int().argmax()), grid=grid,
        first=starts + tokens - (columns if config.infill else 0),
        width=config.gen_length + (columns if config.infill else 0),
    )  # fmt: skip


def check_config(config: DecodingConfig, spec: DecodingSpec) -> Rule:
    """The rule by which a model with this spec decodes. Raises ValueError if the model, the rule and the cache of
    `config` do not go together, whatever the prompt."""
    rule, policy = config.rule(spec), resolve_cache(config.policy(spec))
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    rule.check(config, policy, hooked=False)
    policy.check(spec)
    return rule


def check_prompt(config: DecodingConfig, spec: DecodingSpec, ids: Sequence[int]) -> None:
    """Raises ValueError for whatever `decode` would refuse before its first forward, as far as it is known without the
    model's weights: if a model with this spec cannot go on from the prompt `ids` as `config` says."""
    canvas = make_canvas(config, spec, torch.tensor([ids], dtype=torch.int64))
    rule = check_config(config, spec)
    if not isinstance(rule, Guided):  # a guide has weights, too
        rule.begin(canvas, spec, None, config.forwards)


def _check_prompts(spec: DecodingSpec, input_ids: torch.Tensor, real: torch.Tensor, config: DecodingConfig) -> None:
    gaps, tokens = (input_ids == spec.mask_id) & real, real.sum(1)
    if spec.vocabulary is not None and input_ids.numel():
        low, high = (int(x) for x in input_ids.aminmax())
        # An index outside the embedding is an error without a name on a CPU, and ends the process's use of a GPU.
        if low < 0 or high >= spec.vocabulary:
            raise ValueError(
                f"input_ids hold {low if low < 0 else high}, and the model has tokens 0 to {spec.vocabulary - 1}; use "
                "the ids of its own tokenizer, in padding too"
            )
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
    if spec.shift and gaps.shape[1] and bool(gaps.gather(1, real.int().argmax(1, keepdim=True)).any()):
        raise ValueError(
            "an input begins with a mask, and this model predicts each token from the row before it; begin it with a "
            "token, for example the model's begin-of-text"
        )
