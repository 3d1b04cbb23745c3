"""The guider: a causal language model that verifies drafts, that is, says how far each may be kept.

It never puts a token into the text. Where its vocabulary is the diffusion model's own, ids are passed on as they are;
where it is another, drafts go through text, see `dlm.unmask.character_alignment`. Its cache may be kept by a method of
textkv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from textkv.budgets import Budget
from textkv.method import REGISTRY, Method, list_methods, resolve_method

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Guider:
    """A causal language model and how it reads.

    Attributes:
        model: its logits guide; on the canvas's device, in a floating dtype.
        tokenizer: the guider's own tokenizer. Without tokenizers the ids are taken to mean the same to both models.
        dlm_tokenizer: the diffusion model's tokenizer, given together with `tokenizer`.
        specials: only for unequal vocabularies: what a special token of the diffusion model is to the guider, as its
            ids; ends of text are mapped anyway. A special token that is not named is left out of a prompt, and a draft
            of it is not accepted.
        method: what keeps the guider's cache, a composition of textkv ("snapkv"); None = transformers' own cache. The
            prompt is compressed once; drafts are added in full.
        budget: of the method, see textkv.

    Raises:
        ValueError: a diffusion model, one tokenizer without the other, unequal vocabularies and a guider's tokenizer
            without character offsets, a method that cannot take drafts back, or a budget without a method.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    dlm_tokenizer: PreTrainedTokenizerBase | None = None
    specials: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    method: str | Method | None = None
    budget: Budget | float | str | None = None

    def __post_init__(self) -> None:
        if hasattr(self.model, "decoding_spec"):
            kind = type(self.model).__name__
            raise ValueError(f"the guide is a {kind}, a diffusion model; a guide reads from the left, as Qwen2 does")
        if (self.tokenizer is None) != (self.dlm_tokenizer is None):
            missing = "tokenizer" if self.tokenizer is None else "dlm_tokenizer"
            raise ValueError(f"{missing} is missing: give both tokenizers, or none if the ids mean the same")
        if not self.shared_vocabulary and not self.tokenizer.is_fast:
            raise ValueError(
                f"the guider's vocabulary is not the diffusion model's and its {type(self.tokenizer).__name__} gives "
                "no character offsets (is_fast is False); use a fast tokenizer or a guider of the same vocabulary"
            )
        if self.method is None:
            if self.budget is not None:
                raise ValueError(f"budget={self.budget!r} without a method; name one, for example method='snapkv'")
            return
        method = resolve_method(self.method, self.budget)
        if not method.capabilities.crop:
            # Drafts are read before they are accepted, so the cache must be able to forget its newest columns.
            able = ", ".join(name for name in list_methods() if REGISTRY.find(name).capabilities.crop)
            raise ValueError(f"method={method.expression!r} cannot take rejected drafts back; use one of {able}")

    @cached_property
    def shared_vocabulary(self) -> bool:
        """Whether a token has the same id in both models; special tokens may be missing in the guider."""
        if self.tokenizer is None or self.tokenizer is self.dlm_tokenizer:
            return True
        own, theirs = self.tokenizer.get_vocab(), self.dlm_tokenizer.get_vocab()
        # A mask or a role marker that only the diffusion model has does no harm: it is never drafted as text.
        special = special_ids(self.dlm_tokenizer)
        return all(own.get(token, i if i in special else None) == i for token, i in theirs.items())

    @property
    def vocabulary(self) -> int:
        """Size of the guider's output."""
        return self.model.config.get_text_config().vocab_size

    @property
    def context(self) -> int | None:
        """Positions that the guider was made for; None = unknown."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def ends(self) -> list[int]:
        """The guider's ids that end a text, ascending."""
        sources = (self.model.generation_config, self.model.config.get_text_config(), self.tokenizer)
        # The three places disagree in published models: Qwen2's config has one end, its generation config two.
        found: set[int] = set()
        for source in sources:
            given = getattr(source, "eos_token_id", None)
            found |= {given} if isinstance(given, int) else set(given or ())
        return sorted(i for i in found if i < self.vocabulary)

    def check(self, canvas: Canvas, spec: DecodingSpec) -> None:
        """Raises ValueError if this guider cannot read this canvas."""
        if self.model.device != canvas.ids.device:
            raise ValueError(
                f"the guider is on {self.model.device} and the canvas on {canvas.ids.device}; move one of them"
            )
        if self.model.dtype not in _FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise ValueError(f"the guider computes in {self.model.dtype}; load it in one of {allowed}")
        if bool((canvas.real_start >= canvas.tail).any()):
            raise ValueError("a prompt is empty and a guider needs a token to read on from; begin it with one")
        self.check_length(canvas.length - int(canvas.real_start.min()))
        if spec.vocabulary is not None:
            self.check_vocabulary(spec.vocabulary)

    def check_length(self, tokens: int) -> None:
        """Raises ValueError if prompt and answer of so many of the diffusion model's tokens are too long for it."""
        # Of another vocabulary the number of tokens is known only once the text is encoded, see AlignedVerifier.
        if self.shared_vocabulary and self.context is not None and tokens > self.context:
            raise ValueError(
                f"prompt and answer take {tokens} tokens and the guider has {self.context} positions; shorten the "
                "prompt or generate less"
            )

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError if ids go over as they are and the diffusion model has another number of tokens."""
        if self.tokenizer is None and self.vocabulary != size:
            raise ValueError(
                f"the guider has {self.vocabulary} tokens and the model {size}; give Guider both tokenizers, so that "
                "their vocabularies can be compared"
            )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of a tokenizer's special tokens, those that were added later included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added
