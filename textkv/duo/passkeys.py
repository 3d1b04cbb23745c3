"""Synthetic long prompts that only heads with long sight can serve: passkeys hidden in text, asked for at the end.

A sample: a stretch of haystack with `count` needles strewn in, each naming the k-th passkey (random words), then every
passkey asked and answered in order. The authors hide them in novels (BookSum); any text file will do, and without one
the sentences of our small grammar stand in. Their padding to multiples of 16 served their kernel and is left out.
`recall_sample` gives rows of the embedded text model's own recall tasks instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.filler import sentences
from textkv.mini.rows import Rows

WORDS = tuple(
    """
    alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo
    sierra tango uniform victor whiskey x-ray yankee zulu
    """.split()
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
LENGTHS, DEPTHS = 50, 1000
"""From how many evenly spaced values a haystack's length and the needles' depths are drawn."""
SHALLOWEST, DEEPEST = 0.05, 0.95
GRAMMAR_SEED = 12


@dataclass(frozen=True)
class Sample:
    """`ids` int64 [n]; `tail` and `passkeys` bool [n]: the part of questions and answers, and the answers alone."""

    ids: np.ndarray
    tail: np.ndarray
    passkeys: np.ndarray


@dataclass(frozen=True)
class PasskeyConfig:
    """The authors' values.

    Attributes:
        count: passkeys in a sample, at most 10.
        words: words of a passkey.
        shortest, longest: haystack lengths in tokens; `longest` bounds the whole sample.
    """

    count: int = 10
    words: int = 32
    shortest: int = 1000
    longest: int = 32000

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(ORDINALS):
            raise ValueError(f"count={self.count}: a sample hides 1 to {len(ORDINALS)} passkeys")
        if self.words < 1:
            raise ValueError(f"words={self.words}: a passkey needs at least 1 word")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest={self.shortest}, longest={self.longest}: need 1 <= shortest <= longest")


class Passkeys:
    """Draws samples.

    Args:
        text: the haystack; None = sentences of the small grammar.

    Raises:
        ValueError: the text is too short, or `longest` leaves no room for a haystack.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PasskeyConfig | None = None, text: str | None = None
    ) -> None:
        self.tokenizer, self.config = tokenizer, config or PasskeyConfig()
        count, words, longest = self.config.count, self.config.words, self.config.longest
        widest = [max(WORDS, key=lambda word: len(self._encode(f" {word}")))] * words
        fixed = self._length(self._parts([widest] * count))
        if fixed >= longest:
            raise ValueError(
                f"longest={longest} leaves no room for a haystack: {count} passkeys of {words} words and their "
                f"questions take up to {fixed} tokens; allow more, or hide fewer or shorter ones"
            )
        self.haystack = np.asarray(self._encode(text if text is not None else _grammar(longest)), dtype=np.int64)
        if len(self.haystack) < longest:
            raise ValueError(
                f"the text has {len(self.haystack)} tokens, samples of up to {longest} are drawn from it; give a "
                "longer text, or a smaller longest"
            )

    def sample(self, rng: np.random.Generator) -> Sample:
        """A fresh sample."""
        c = self.config
        passkeys = [[WORDS[n] for n in rng.integers(len(WORDS), size=c.words)] for _ in range(c.count)]
        parts = self._parts(passkeys)
        wanted = int(rng.choice(np.linspace(c.shortest, c.longest, LENGTHS).astype(int)))
        length = min(wanted, c.longest - self._length(parts))
        begin = int(rng.integers(len(self.haystack) - length + 1))
        depths = np.linspace(SHALLOWEST, DEEPEST, DEPTHS)[np.sort(rng.choice(DEPTHS, c.count, replace=False))]
        needles, questions, answers = parts[: c.count], parts[c.count : 2 * c.count], parts[2 * c.count :]
        cuts = (depths * length).astype(int)
        pieces = np.split(self.haystack[begin : begin + length], cuts)
        context = [self._start(), pieces[0]]
        for needle, piece in zip(needles, pieces[1:], strict=True):
            context += [needle, piece]
        tail = [x for pair in zip(questions, answers, strict=True) for x in pair]
        return Sample(
            np.concatenate([*context, *tail]).astype(np.int64),
            _marked([(context, False), (tail, True)]),
            _marked([(context, False), *(([x], n % 2 == 1) for n, x in enumerate(tail))]),
        )

    def _parts(self, passkeys: list[list[str]]) -> list[list[int]]:
        """Token ids of all needles, then of all questions, then of all answers."""
        named = list(zip(ORDINALS, passkeys, strict=False))
        return [
            *(self._encode(f"\n\nKeep in mind the {nth} passkey: {' '.join(words)}.\n\n") for nth, words in named),
            *(self._encode(f"\n\nWhat was the {nth} passkey? The {nth} passkey:") for nth, _ in named),
            *(self._encode(" " + " ".join(words)) for _, words in named),
        ]

    def _length(self, parts: list[list[int]]) -> int:
        return sum(map(len, parts)) + len(self._start())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _start(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]


def recall_sample(rows: Rows, rng: np.random.Generator, length: int) -> Sample:
    """A row of the embedded text model's recall tasks: `length` tokens, several facts, several questions at its end."""
    row = rows.recall(rng, length)
    passkeys = np.zeros(length, dtype=bool)
    for answer in row.answers:
        passkeys[answer.start : answer.end] = True
    return Sample(row.ids.astype(np.int64), np.arange(length) >= row.answers[0].start, passkeys)


def _marked(parts: list[tuple[list, bool]]) -> np.ndarray:
    return np.concatenate([np.full(sum(map(len, pieces)), mark) for pieces, mark in parts])


def _grammar(tokens: int) -> str:
    # A sentence has at least five words and a word is at least one token.
    return "".join(" " + " ".join(words) for words in sentences(max(16, tokens // 4), GRAMMAR_SEED))
