"""Training batches: full rows of one length, many facts and many questions in each, made in worker processes.

Marked in the rows of `textkv.mini.rows` are the answers, the place that each answer token comes from
(`training.text.hints`), and some of the tokens that are no fact and no question (`training.text.sinks`). Some rows are
plain text instead. Batch `n` is the same whatever the number of workers; only its length depends on `progress`, a
shared number that the trainer moves from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import TASKS
from textkv.mini.rows import Asked, Rows
from textkv.mini.tasks import FIRST_EVALUATION_SEED
from training.text.hints import AHEAD, FOLLOW, LINK
from training.text.sinks import MOST

# Share of the training from which on rows are this long.
STAGES = ((0.0, 128), (0.05, 256), (0.2, 512), (0.4, 1024), (0.65, 2048), (0.95, 3072))
SHORTER = 0.3  # of the batches keep an earlier length, so that short prompts are not forgotten
TEXT_ROWS = 0.12


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
        """The same batch in memory from which a GPU copies without waiting."""
        return Batch(*(x.pin_memory() for x in vars(self).values()))


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
                hints += hints_of(answer, number)
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


def hints_of(answer: Asked, row: int) -> list[tuple[int, int, int, int]]:
    """(layer, row, query, key): each token before an answer token looks at its source, the question at all."""
    linked = []
    if TASKS[answer.task] == "two-hop":
        # "the code of KEY is the code of OWNER" holds its key 5 tokens before the owner, a question 4 before.
        owner = next(k for k, source in enumerate(answer.sources) if source >= 0)
        linked = [(answer.sources[owner], answer.sources[owner] - 5), (answer.start - 1 + owner, answer.start - 2)]
    told = [source for source in answer.sources if source >= 0]
    ahead = [(AHEAD, row, answer.start - 1, source) for source in told]
    follow = [(FOLLOW, row, answer.start - 1 + k, source) for k, source in enumerate(answer.sources) if source >= 0]
    return [*((LINK, row, query, key) for query, key in linked), *ahead, *follow]
