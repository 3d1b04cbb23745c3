"""Recall prompts: `make_example("needle", 1024, seed=1_000_000, tokenizer=tokenizer, depth=0.5)`.

Facts lie in filler, one question stands at the end. Prompt and answer together are exactly `length` tokens. Works
with any tokenizer: prompts are put together from words, and each word is encoded with its leading blank. Seeds from
1,000,000 on are for evaluation and use key-value pairs and filler that training never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import TASKS, Fact, check_task, draw_facts
from textkv.mini.filler import Filler
from textkv.mini.speller import Speller

FIRST_EVALUATION_SEED = 1_000_000
TRAINING_FILLER, EVALUATION_FILLER = 11, 1_000_011
MIN_LENGTH = 96

__all__ = ["FIRST_EVALUATION_SEED", "MIN_LENGTH", "TASKS", "Example", "make_example", "place"]


@dataclass(frozen=True)
class Example:
    """One prompt with one question.

    `prompt_ids`, `answer_ids`: int64, together `length` tokens. `depth`: where the statement that holds the answer
    stands, 0 = first, 1 = right before the question. `spans`: half-open [start, end) of every statement that the
    answer needs, that statement last. `prompt` and `answer` are the same as text, without the start token.
    """

    task: str
    seed: int
    depth: float
    prompt: str
    answer: str
    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    spans: tuple[tuple[int, int], ...]


def place(
    rng: np.random.Generator, filler: Filler, room: int, statements: Sequence[list[int]], depths: Sequence[float | None]
) -> tuple[list[np.ndarray], list[int]]:
    """Statements strewn between the sentences of `room` tokens of filler: (pieces to join, start of each statement).

    A depth of None means anywhere. Statements of the same place keep a random order, but 0 is first and 1 last.
    """
    ids, starts = filler.draw(rng, room)
    starts = np.append(starts, room)
    wanted = rng.random(len(statements))
    for number, depth in enumerate(depths):
        if depth is not None:
            wanted[number] = depth
    # The nearest sentence start; one search for all statements.
    after = np.searchsorted(starts, wanted * room)
    before = np.maximum(after - 1, 0)
    nearer = np.where(wanted * room - starts[before] < starts[after] - wanted * room, before, after)
    offsets = starts[nearer].tolist()
    pieces, begins, written, taken = [], [0] * len(statements), 0, 0
    for number in np.argsort(wanted, kind="stable").tolist():
        offset = offsets[number]
        pieces += [ids[taken:offset], statements[number]]
        begins[number] = written + offset - taken
        written, taken = begins[number] + len(statements[number]), offset
    return [*pieces, ids[taken:]], begins


def make_example(
    task: str,
    length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    depth: float | None = None,
    facts: int | None = None,
) -> Example:
    """The example of `seed`: the same arguments give the same example.

    Args:
        task: one of `TASKS`.
        length: tokens of prompt and answer together.
        seed: from 1,000,000 on for evaluation, below for training.
        depth: where the asked statement stands, 0..1; None = anywhere.
        facts: how many facts the prompt holds, the asked one included; None = more in a longer prompt.

    Raises:
        ValueError: unknown task, a depth outside 0..1, a length without room, facts < 1.
    """
    check_task(task)
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth} is not a share of the prompt; use e.g. 0.5")
    if facts is not None and facts < 1:
        raise ValueError(f"facts={facts} leaves nothing to ask; use at least 1")
    if length < MIN_LENGTH:
        raise ValueError(f"length={length} leaves no room for facts; use at least {MIN_LENGTH}")
    evaluation = seed >= FIRST_EVALUATION_SEED
    speller, filler = _speller(tokenizer), _filler(tokenizer, evaluation)
    rng = np.random.default_rng(seed)
    count = facts or _usual_count(task, length)
    drawn = draw_facts(rng, [task] * count, evaluation)
    return _assemble(rng, drawn, speller, filler, (length, seed, depth), tokenizer)


def _usual_count(task: str, length: int) -> int:
    per_fact, most = (64, 12) if task == "needle" else (128, 6)
    return min(most, max(2, length // per_fact))


def _assemble(
    rng: np.random.Generator,
    facts: list[Fact],
    speller: Speller,
    filler: Filler,
    wish: tuple[int, int, float | None],
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    length, seed, depth = wish
    asked = facts[0]
    statements = [speller(words) for fact in facts for words in fact.statements]
    mine = len(asked.statements)
    question, answer = speller(asked.question), speller(asked.answer)
    room = length - len(speller.start) - sum(map(len, statements)) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"length={length} is {-room} tokens too short for {len(facts)} facts; use {length - room}")
    depths: list[float | None] = [None] * len(statements)
    depths[mine - 1] = depth
    pieces, begins = place(rng, filler, room, statements, depths)
    shift = len(speller.start)
    prompt = np.concatenate([speller.start, *pieces, question]).astype(np.int64)
    spans = tuple((shift + b, shift + b + len(s)) for b, s in zip(begins[:mine], statements[:mine], strict=True))
    movable = len(prompt) - shift - len(question) - len(statements[mine - 1])
    return Example(
        task=asked.task,
        seed=seed,
        depth=begins[mine - 1] / max(movable, 1),
        prompt=tokenizer.decode(prompt[shift:].tolist()),
        answer=tokenizer.decode(answer),
        prompt_ids=prompt,
        answer_ids=np.asarray(answer, dtype=np.int64),
        spans=spans,
    )


# Both are tables of one tokenizer: building them for every example would cost more than the example.
@lru_cache(maxsize=8)
def _speller(tokenizer: PreTrainedTokenizerBase) -> Speller:
    return Speller(tokenizer)


@lru_cache(maxsize=8)
def _filler(tokenizer: PreTrainedTokenizerBase, evaluation: bool) -> Filler:
    return Filler.grammar(_speller(tokenizer), EVALUATION_FILLER if evaluation else TRAINING_FILLER)
