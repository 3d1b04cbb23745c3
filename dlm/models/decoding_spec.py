"""The decoding spec: what decoding must know about a diffusion language model and cannot see in its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DecodingSpec:
    """The special tokens, the shift, the limits and the rule of one model.

    Attributes:
        mask_id: the token that stands for "not written yet".
        eos_ids: tokens that end an answer.
        pad_id: the token for the left of shorter prompts.
        shift: row j of the logits predicts position j + shift (LLaDA 0, Dream 1).
        context_limit: positions that the model was made for (prompt and answer together); None = unknown.
        unmask: the model's own rule of which tokens to write first, as an expression.
        context_advised: positions up to which its authors vouch for it, where that is less than `context_limit`.
        vocabulary: logits of a row; None = unknown.
        block: B of a block-causal model: a token sees its own block and those before, blocks being counted in B
            positions from 0 on; None = every token sees every other.
        sub_block: positions of a block that are finished before the next are begun; None = the block.
        config: of the model, which tells its layers and heads; None = unknown.

    Raises:
        ValueError: an id below 0, a mask that is also an end or padding, a shift other than 0 and 1, a limit below 1.
    """

    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    shift: Literal[0, 1]
    context_limit: int | None
    unmask: str
    context_advised: int | None = None
    vocabulary: int | None = None
    block: int | None = None
    sub_block: int | None = None
    config: PreTrainedConfig | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, ids in (("mask_id", (self.mask_id,)), ("pad_id", (self.pad_id,)), ("eos_ids", self.eos_ids)):
            if any(i < 0 for i in ids):
                raise ValueError(f"{name}={getattr(self, name)} is below 0; use the ids of the model's tokenizer")
        # A written mask would count as still to be written, and decoding would never end.
        if self.mask_id in (self.pad_id, *self.eos_ids):
            raise ValueError(
                f"mask_id={self.mask_id} is also the padding or an end (pad_id={self.pad_id}, eos_ids={self.eos_ids}); "
                "a mask must be a token of its own"
            )
        if self.shift not in (0, 1):
            raise ValueError(f"shift={self.shift} is neither 0 (row j predicts position j) nor 1 (position j + 1)")
        for name in ("context_limit", "context_advised", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; use None for no limit")

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        shift: Literal[0, 1],
        unmask: str,
        more_ends: tuple[int, ...] = (),
        context_advised: int | None = None,
        block: int | None = None,
        sub_block: int | None = None,
    ) -> DecodingSpec:
        """The spec of a model by its config; `more_ends` are end tokens that only its tokenizer knows.

        Raises:
            ValueError: the config names no mask token, neither end nor padding, or a token outside the vocabulary.
        """
        if config.mask_token_id is None:
            raise ValueError(
                f"this {config.model_type} config has no mask_token_id, without which nothing can be decoded; add it "
                "to config.json (published LLaDA-8B: 126336, Dream-7B: 151666)"
            )
        given = config.eos_token_id
        ends = () if given is None else (given,) if isinstance(given, int) else tuple(given)
        # An end of text serves for padding where a config names none: padding is never attended.
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), None)
        if pad is None:
            raise ValueError(f"this {config.model_type} config has neither pad_token_id nor eos_token_id; add one")
        for name, token in (("mask_token_id", config.mask_token_id), ("pad_token_id", pad)):
            if token >= config.vocab_size:
                raise ValueError(f"{name}={token} is outside the vocabulary of {config.vocab_size} tokens; correct it")
        limit = config.max_position_embeddings
        return cls(
            mask_id=config.mask_token_id,
            # The config's first: `logits_eos_inf` speaks of the first end, and dict keeps the order without doubles.
            eos_ids=tuple(dict.fromkeys(ends + more_ends)),
            pad_id=pad,
            shift=shift,
            context_limit=limit,
            unmask=unmask,
            context_advised=None if context_advised is None else min(context_advised, limit),
            # LLaDA may pad its embedding: the logits of a row are then wider than the vocabulary.
            vocabulary=getattr(config, "embedding_size", config.vocab_size),
            block=block,
            # A checkpoint of smaller blocks has no smaller ones inside.
            sub_block=sub_block if block and sub_block and block % sub_block == 0 else None,
            config=config,
        )
