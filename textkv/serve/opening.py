"""What a chat template writes before an answer, and whether it is still there when the answer has become history.

Templates of reasoning models drop old reasoning, or an empty place for it: what the next turn tells is then not what
was read, from the beginning of the answer on. For these a conversation is kept as it was before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

ANSWERS = ("Yes.", "<think>\nHm.\n</think>\n\nYes.")
"""With and without reasoning: a template that keeps both keeps everything."""


@dataclass(frozen=True)
class AnswerOpening:
    """Token ids that a template writes to open an answer; `lasting`: its next turn tells them and the answer again."""

    ids: tuple[int, ...]
    lasting: bool

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> AnswerOpening:
        """Finds it out by rendering two turns; a template that refuses them is taken to keep everything."""

        def told(messages: list[dict[str, str]], opened: bool) -> str:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=opened
            )

        ask = {"role": "user", "content": "Is it so?"}
        try:
            closed, opened = told([ask], False), told([ask], True)
            later = [told([ask, {"role": "assistant", "content": said}, ask], True) for said in ANSWERS]
        except TemplateError:
            return cls((), True)
        lasting = all(text.startswith(opened + said) for text, said in zip(later, ANSWERS, strict=True))
        if lasting or not opened.startswith(closed):
            return cls((), True)
        ids = tokenizer(opened[len(closed) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
        return cls(tuple(ids[0].tolist()), False)

    def before(self, ids: torch.Tensor) -> int | None:
        """Columns of a prompt int64 [1, n] in front of it; None where they need not be kept."""
        n = len(self.ids)
        if self.lasting or not n or ids.shape[1] <= n or ids[0, -n:].tolist() != list(self.ids):
            return None
        return ids.shape[1] - n
