"""Training batches: full rows of one length, many facts and many questions in each, made in worker processes.

One answer in a thousand tokens teaches slowly, so a row holds as many facts as fit beside a little filler and asks
them all, one after another at its end; every answer is marked, and so are the place that each answer token comes from
(`textkv.mini.hints`) and some of the tokens that are no fact and no question (`textkv.mini.sinks`). Some rows are plain
text instead. Batch `n` is the same whatever the number of workers; only its length depends on `progress`, a shared
number that the trainer moves from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import MOST_FACTS, TASKS, Fact, draw_facts
from textkv.mini.filler import Filler
from textkv.mini.hints import AHEAD, FOLLOW, LINK
from textkv.mini.sinks import MOST
from textkv.mini.speller import Speller
from textkv.mini.tasks import FIRST_EVALUATION_SEED, TRAINING_FILLER, place
from textkv.mini.words import all_words

# Share of the training from which on rows are this long.
STAGES = ((0.0, 128), (0.05, 256), (0.2, 512), (0.4, 1024), (0.65, 2048), (0.95, 3072))
SHORTER = 0.3  # of the batches keep an earlier length, so that short prompts are not forgotten
TEXT_ROWS = 0.12
SHARES = (0.4, 0.4, 0.2)  # of needle, two-hop, copy


@dataclass(frozen=True)
class Batch:
    """`ids` int32 [rows, length]; `asks` int32 [rows, length]: 0, or 1 + the number of the question that this token
    answers; `tasks` int64 [questions]: index into TASKS; `hints` int64 [k, 4] as (layer, row, query, key), shuffled;
    `idle` int64 [k, 2] as (row, token), a few tokens of filler and ordinary text.
    """

    ids: torch.Tensor
    asks: torch.Tensor
    tasks: torch.Tensor
    hints: torch.Tensor
    idle: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(x.to(device, non_blocking=True) for x in vars(self).values()))

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies without waiting; a DataLoader calls this."""
        return Batch(*(x.pin_memory() for x in vars(self).values()))


@dataclass(frozen=True)
class Asked:
    """An answer in a row: tokens [start, end) of `task` (index into TASKS), each copied from its place in `sources`."""

    start: int
    end: int
    task: int
    sources: tuple[int, ...]

    def hints(self, row: int) -> list[tuple[int, int, int, int]]:
        """(layer, row, query, key): each token before an answer token looks at its source, the question at all."""
        linked = []
        if TASKS[self.task] == "two-hop":
            # "the code of KEY is the code of OWNER" holds its key 5 tokens before the owner, a question 4 before.
            owner = next(k for k, source in enumerate(self.sources) if source >= 0)
            linked = [(self.sources[owner], self.sources[owner] - 5), (self.start - 1 + owner, self.start - 2)]
        told = [source for source in self.sources if source >= 0]
        ahead = [(AHEAD, row, self.start - 1, source) for source in told]
        follow = [(FOLLOW, row, self.start - 1 + k, source) for k, source in enumerate(self.sources) if source >= 0]
        return [*((LINK, row, query, key) for query, key in linked), *ahead, *follow]


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


_STEPS = np.cumsum(SHARES)[:-1]


class Feed(IterableDataset):
    """Endless batches of about `tokens` tokens from batch number `start` on."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int, start: int = 0, text: str | None = None
    ) -> None:
        if not 0 <= seed < FIRST_EVALUATION_SEED:
            raise ValueError(f"seed={seed} is not a training seed; use 0 to {FIRST_EVALUATION_SEED - 1:,}")
        if tokens < STAGES[0][1]:
            raise ValueError(f"tokens={tokens} is less than one row; use at least {STAGES[0][1]}")
        self.rows, self.tokens, self.seed, self.start = Rows(tokenizer, text), tokens, seed, start
        self.progress = torch.zeros(()).share_memory_()

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, stride = self.start + (worker.id if worker else 0), worker.num_workers if worker else 1
        while True:
            rng = np.random.default_rng([self.seed, number])
            yield self.batch(rng, length_at(rng, float(self.progress)))
            number += stride

    def batch(self, rng: np.random.Generator, length: int) -> Batch:
        """One batch of rows of `length` tokens."""
        count = max(1, self.tokens // length)
        ids, asks = np.empty((count, length), dtype=np.int32), np.zeros((count, length), dtype=np.int32)
        idle = np.empty((count, length), dtype=bool)
        tasks: list[int] = []
        hints: list[tuple[int, int, int, int]] = []
        plain = rng.random(count) < TEXT_ROWS
        for number in range(count):
            row = (self.rows.plain if plain[number] else self.rows.recall)(rng, length)
            ids[number], idle[number] = row.ids, row.idle
            for answer in row.answers:
                tasks.append(answer.task)
                asks[number, answer.start : answer.end] = len(tasks)
                hints += answer.hints(number)
        shuffled = rng.permutation(np.array(hints, dtype=np.int64).reshape(-1, 4))
        # The last token of a row is only predicted: the model does not read it.
        resting = rng.permutation(np.argwhere(idle[:, :-1]))[:MOST]
        return Batch(*map(torch.from_numpy, (ids, asks, np.array(tasks, dtype=np.int64), shuffled, resting)))


def length_at(rng: np.random.Generator, progress: float) -> int:
    """Row length `progress` (0..1) into the training."""
    open_now = [length for since, length in STAGES if progress >= since]
    return int(rng.choice(open_now)) if rng.random() < SHORTER else open_now[-1]


def longest_at(progress: float) -> int:
    """The longest row length in use."""
    return [length for since, length in STAGES if progress >= since][-1]
