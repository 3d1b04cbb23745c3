"""Words to ids, for prompts that are put together from words instead of being tokenized as text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Speller:
    """Words to ids, each word encoded once; `start` is what every prompt begins with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def __call__(self, words: Sequence[str]) -> list[int]:
        known = self._known
        for word in words:
            if word not in known:
                known[word] = self._tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        return [number for word in words for number in known[word]]
