"""What stands between the facts: plain sentences of a small grammar, or any text, as one long row of ids.

A stretch of filler is a slice of that row, cut where a sentence begins, so that a prompt of any length costs two
array operations.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.speller import Speller
from textkv.mini.words import CLASSES, PATTERNS

SENTENCES = 12_000


def sentences(count: int, seed: int) -> list[list[str]]:
    """`count` sentences of the grammar, as words: ["the", "man", "walked", "to", "the", "river", "."]."""
    rng = np.random.default_rng(seed)
    kinds, draws = rng.integers(len(PATTERNS), size=count).tolist(), rng.random((count, 12)).tolist()
    made = []
    for kind, draw in zip(kinds, draws, strict=True):
        words = [
            CLASSES[slot][int(u * len(CLASSES[slot]))] if slot in CLASSES else slot
            for slot, u in zip(PATTERNS[kind], draw, strict=False)
        ]
        made.append(words)
    return made


class Filler:
    """A long row of ids and the places in it where a sentence begins."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray) -> None:
        if not len(ids):
            raise ValueError("no filler: the text is empty; give a longer one")
        self.ids, self.starts = ids.astype(np.int64), starts
        self._is_start = np.zeros(len(ids), dtype=bool)
        self._is_start[starts] = True

    @classmethod
    def grammar(cls, spell: Speller, seed: int, count: int = SENTENCES) -> Filler:
        """Sentences of the small grammar."""
        parts = [spell(words) for words in sentences(count, seed)]
        return cls(np.concatenate(parts), np.cumsum([0, *map(len, parts)])[:-1])

    @classmethod
    def text(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> Filler:
        """A text; its sentences are its lines."""
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        ends = [number for number in np.unique(ids).tolist() if "\n" in tokenizer.decode([number])]
        return cls(ids, np.append(0, np.flatnonzero(np.isin(ids[:-1], ends)) + 1))

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [length], offsets where a sentence begins, 0 first); the slice starts at a sentence."""
        if length > len(self.ids):
            raise ValueError(f"length={length} is more than the filler's {len(self.ids)} tokens; use a longer text")
        last = np.searchsorted(self.starts, len(self.ids) - length, side="right")
        begin = int(self.starts[rng.integers(last)])
        return self.ids[begin : begin + length], np.flatnonzero(self._is_start[begin : begin + length])
