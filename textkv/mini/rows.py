"""Rows of the embedded text model's recall tasks: many facts and many questions in each, every answer marked.

One answer in a thousand tokens teaches slowly, so a row holds as many facts as fit beside a little filler and asks
them all, one after another at its end. Made for training the model and for finding out which of its heads need the
whole context (`textkv.duo.identify`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import MOST_FACTS, TASKS, Fact, draw_facts
from textkv.mini.filler import Filler
from textkv.mini.speller import Speller
from textkv.mini.tasks import TRAINING_FILLER, place
from textkv.mini.words import all_words

SHARES = (0.4, 0.4, 0.2)  # of needle, two-hop, copy
_STEPS = np.cumsum(SHARES)[:-1]


@dataclass(frozen=True)
class Asked:
    """An answer in a row: tokens [start, end) of `task` (index into TASKS), each copied from its place in `sources`."""

    start: int
    end: int
    task: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """`ids` int64 [length], the answers in them, and which tokens are filler: `idle` bool [length]."""

    ids: np.ndarray
    answers: list[Asked]
    idle: np.ndarray


class Rows:
    """Draws single rows; `text` replaces the grammar's sentences in half of the recall rows and in all plain ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self.speller = Speller(tokenizer)
        self.grammar = Filler.grammar(self.speller, TRAINING_FILLER)
        self.text = Filler.text(tokenizer, text) if text else self.grammar
        # Known beforehand, so that a worker never calls the tokenizer, whose threads do not survive a fork.
        self.speller(all_words())

    def plain(self, rng: np.random.Generator, length: int) -> Row:
        """Ordinary text."""
        shift = len(self.speller.start)
        ids = np.concatenate([self.speller.start, self.text.draw(rng, length - shift)[0]])
        return Row(ids, [], np.arange(length) >= shift)

    def recall(self, rng: np.random.Generator, length: int) -> Row:
        """Facts in filler, all of them asked at the end."""
        spell = self.speller
        facts = self._facts(rng, length)
        asked = rng.permutation(len(facts)).tolist()
        tail: list[int] = []
        ends = []
        for n in asked:
            tail += spell(facts[n].question) + spell(facts[n].answer)
            ends.append(len(tail))
            tail += spell(["."])
        statements = [spell(words) for fact in facts for words in fact.statements]
        room = length - len(spell.start) - sum(map(len, statements)) - len(tail)
        filler = self.text if rng.random() < 0.5 else self.grammar
        pieces, begins = place(rng, filler, room, statements, [None] * len(statements))
        ids, begin, shift = np.concatenate([spell.start, *pieces, tail]), length - len(tail), len(spell.start)
        idle = (np.arange(length) >= shift) & (np.arange(length) < begin)
        for at, statement in zip(begins, statements, strict=True):
            idle[shift + at : shift + at + len(statement)] = False
        stops = iter([shift + b + len(s) for b, s in zip(begins, statements, strict=True)])
        stands = [[next(stops) for _ in fact.statements] for fact in facts]
        marks = []
        for n, end in zip(asked, ends, strict=True):
            sources = self._sources(facts[n], stands[n])
            marks.append(Asked(begin + end - len(sources), begin + end, TASKS.index(facts[n].task), sources))
        return Row(ids, marks, idle)

    def _facts(self, rng: np.random.Generator, length: int) -> list[Fact]:
        """As many facts as fit, mostly: filler keeps a tenth of the row at least, and half of it now and then."""
        most = max(1, min(MOST_FACTS, length // 20))
        count = max(1, int(np.ceil(most * rng.random() ** 0.5)))
        kinds = [TASKS[n] for n in np.searchsorted(_STEPS, rng.random(count), side="right").tolist()]
        room, facts = length * 9 // 10 - len(self.speller.start), []
        for fact in draw_facts(rng, kinds, evaluation=False):
            room -= sum(len(self.speller(words)) for words in (*fact.statements, fact.question, fact.answer)) + 1
            if facts and room < 0:
                break
            facts.append(fact)
        return facts

    def _sources(self, fact: Fact, stops: list[int]) -> tuple[int, ...]:
        """Where each answer token is copied from, -1 = nowhere worth a look; `stops` = end of each statement."""
        size, stop = len(self.speller(fact.answer)), len(self.speller(["."]))
        final = range(stops[-1] - stop - size, stops[-1] - stop)
        if fact.task != "two-hop":
            return tuple(final)
        # "the code of KEY is VALUE NUMBER": the key comes from the pointing statement, "the code of" from anywhere.
        named, frame = len(self.speller(fact.answer[:4])), len(self.speller(fact.answer[:3]))
        ends_with_key = range(stops[0] - stop - named, stops[0] - stop)
        is_ = len(self.speller(fact.answer[4:5]))
        return (*[-1] * frame, *ends_with_key[frame:], *[-1] * is_, *final[named + is_ :])
