"""Training batches: full rows of one length, many facts and many questions in each, made in worker processes.

One answer in a thousand tokens teaches slowly, so a row asks most of its facts, one after another at its end, and
every answer is marked. Some rows are plain text instead. Batch `n` is the same whatever the number of workers; only
its length depends on `progress`, a shared number that the trainer moves from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import MOST_FACTS, TASKS, draw_facts
from textkv.mini.filler import Filler
from textkv.mini.speller import Speller
from textkv.mini.tasks import FIRST_EVALUATION_SEED, TRAINING_FILLER, place
from textkv.mini.words import all_words

# Share of the training from which on rows are this long.
STAGES = ((0.0, 128), (0.06, 256), (0.18, 512), (0.36, 1024), (0.56, 2048), (0.92, 3072))
SHORTER = 0.3  # of the batches keep an earlier length, so that short prompts are not forgotten
TEXT_ROWS = 0.12
SHARES = (0.4, 0.4, 0.2)  # of needle, two-hop, copy


@dataclass(frozen=True)
class Batch:
    """`ids` int32 [rows, length]; `asks` int32 [rows, length]: 0, or 1 + the number of the question that this token
    answers; `tasks` int64 [questions]: index into TASKS.
    """

    ids: torch.Tensor
    asks: torch.Tensor
    tasks: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in (self.ids, self.asks, self.tasks)))

    def pin_memory(self) -> Batch:
        return Batch(*(x.pin_memory() for x in (self.ids, self.asks, self.tasks)))


class Rows:
    """Draws single rows; `text` replaces the grammar's sentences in half of the recall rows and in all plain ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self.speller = Speller(tokenizer)
        self.grammar = Filler.grammar(self.speller, TRAINING_FILLER)
        self.text = Filler.text(tokenizer, text) if text else self.grammar
        # Known beforehand, so that a worker never calls the tokenizer, whose threads do not survive a fork.
        self.speller(all_words())

    def plain(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """[length] ids of ordinary text."""
        room = length - len(self.speller.start)
        return np.concatenate([self.speller.start, self.text.draw(rng, room)[0]])

    def recall(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """([length] ids, answers as (start, end, task index))."""
        spell = self.speller
        most = max(1, min(MOST_FACTS, length * 6 // 10 // 40))
        count = int(rng.integers(1, most + 1))
        kinds = [TASKS[n] for n in np.searchsorted(_STEPS, rng.random(count), side="right").tolist()]
        facts = draw_facts(rng, kinds, evaluation=False)
        statements = [spell(words) for fact in facts for words in fact.statements]
        asked = [facts[n] for n in rng.permutation(count).tolist()]
        questions = [(spell(f.question), spell(f.answer), TASKS.index(f.task)) for f in asked]
        stop = spell(["."])
        tail: list[int] = []
        marks = []
        for question, answer, task in questions:
            tail += question
            marks.append((len(tail), len(tail) + len(answer), task))
            tail += answer + stop
        room = length - len(spell.start) - sum(map(len, statements)) - len(tail)
        filler = self.text if rng.random() < 0.5 else self.grammar
        pieces, _ = place(rng, filler, room, statements, [None] * len(statements))
        row = np.concatenate([spell.start, *pieces, tail])
        begin = length - len(tail)
        return row, [(begin + a, begin + b, task) for a, b, task in marks]


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
        tasks: list[int] = []
        plain = rng.random(count) < TEXT_ROWS
        for number in range(count):
            if plain[number]:
                ids[number] = self.rows.plain(rng, length)
                continue
            ids[number], answers = self.rows.recall(rng, length)
            for begin, end, task in answers:
                tasks.append(task)
                asks[number, begin:end] = len(tasks)
        return Batch(torch.from_numpy(ids), torch.from_numpy(asks), torch.tensor(tasks, dtype=torch.int64))


def length_at(rng: np.random.Generator, progress: float) -> int:
    """Row length `progress` (0..1) into the training."""
    open_now = [length for since, length in STAGES if progress >= since]
    return int(rng.choice(open_now)) if rng.random() < SHORTER else open_now[-1]


def longest_at(progress: float) -> int:
    """The longest row length in use."""
    return [length for since, length in STAGES if progress >= since][-1]
