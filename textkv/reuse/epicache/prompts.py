"""The tokens of a conversation, of a question about it, and of the probe that says what of it matters to a topic."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from textkv.reuse.chat import chat, words
from textkv.reuse.epicache.text import Turn

OPENING = "Remember the following conversation.\n"
INSTRUCTION = "\nRepeat the most important parts of the conversation."
_MARK = "\x00"  # where the user's words stand while the chat format is cut in two


class Prompts:
    """Prompts in the chat format of a tokenizer. Pieces are tokenized one by one: a turn has the same tokens wherever
    it is read.

    Attributes:
        before: tokens before the user's words: the system prompt.
        after: tokens between these and the answer.

    Raises:
        ValueError: a chat format that changes what the user says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        before, mark, after = chat(tokenizer, None, _MARK).partition(_MARK)
        if not mark:
            raise ValueError("the tokenizer's chat template changes what the user says; remove the template")
        start = () if before or tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        self.before, self.after = (*start, *self._ids(before)), self._ids(after or "\n")

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def history(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """A conversation from the system prompt on."""
        return (*self.before, *self._ids(OPENING), *self.lines(turns))

    def lines(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Turns as they follow others."""
        return tuple(token for turn in turns for token in words(self.tokenizer, f"{turn}\n"))

    def question(self, question: str, begun: str = "") -> tuple[int, ...]:
        """A question behind the conversation, up to the answer's beginning."""
        return (*words(self.tokenizer, f"\n{question}"), *self.after, *self._ids(begun))

    def probe(self, texts: Sequence[str], order: Sequence[int], most: int) -> tuple[int, ...]:
        """What asks for a topic: an instruction, and representative texts as if they were the answer.

        Args:
            texts: the nearest to the topic first; as many are taken as fit.
            order: where each stands in the conversation: in this order they are written.
            most: tokens of the whole; what is too long is cut.
        """
        asked = (*self._ids(INSTRUCTION), *self.after)
        pieces: list[tuple[int, tuple[int, ...]]] = []
        room = most - len(asked)
        for text, number in zip(texts, order, strict=True):
            ids = words(self.tokenizer, f"{text}\n")
            if len(ids) > room and pieces:
                break
            pieces.append((number, ids))
            room -= len(ids)
        return (*asked, *(token for _, ids in sorted(pieces) for token in ids))[:most]
