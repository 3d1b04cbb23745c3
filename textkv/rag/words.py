"""Words of a tokenized text: pieces of one word stand together, and words that say nothing by themselves are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

_BLANKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
"""How vocabularies write a blank or a new line at the head of a piece."""
STOPWORDS = frozenset(
    "a about after all also an and any are as at be been before being but by can could did do does for from had has "
    "have he her here him his how i if in into is it its me might my no nor not of on one or our she should so some "
    "such than that the their them then there these they this those to too under until up us was we were what when "
    "where which while who whom whose why will with would you your".split()
)


@dataclass(frozen=True)
class Word:
    """Tokens [start, stop) of a text, and what they say."""

    start: int
    stop: int
    text: str

    @property
    def telling(self) -> bool:
        """Whether it may trigger a retrieval or stand in a query: no stopword, number or punctuation (the paper's
        s)."""
        return bool(re.search(r"[^\W\d_]", self.text)) and self.text.lower() not in STOPWORDS


def words_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int = 0) -> list[Word]:
    """The words of token ids, in order; signs and blanks between them are words too, so that every token has one.

    Args:
        start: position of the first token.
    """
    pieces = [piece.translate(_BLANKS) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    begins = [n for n, piece in enumerate(pieces) if n == 0 or _parted(pieces[n - 1], piece)]
    made = []
    for first, last in pairwise([*begins, len(pieces)]):
        made.append(Word(start + first, start + last, tokenizer.decode(list(ids[first:last])).strip()))
    return made


def _parted(before: str, piece: str) -> bool:
    """Whether a piece begins another word than the one before it."""
    # A blank of its own is the head of the word behind it.
    return not (before.isspace() or (before[-1:].isalnum() and piece[:1].isalnum()))
