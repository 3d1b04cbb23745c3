"""Facts to be recalled and the questions about them: the words of the three recall tasks.

- `needle`: "the code of falcon is amber 47 ." asked by "question : the code of falcon is".
- `two-hop`: "the code of heron is the code of falcon ." The answer names the second key and then its value, so the
  second lookup happens while decoding, where the prompt's question no longer points.
- `copy`: "the list of otter is ..." and eight words; all of them are asked again.

A key and a value meet only in training or only in evaluation (`held_out`), so an answer cannot be known by heart.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np

from textkv.mini.words import KEYS, NUMBERS, THINGS, VALUES

TASKS = ("needle", "two-hop", "copy")
RUN = 8
RUN_WORDS = (*VALUES, *THINGS)
MOST_FACTS = 24  # in one prompt: the word lists hold enough for so many


@dataclass(frozen=True)
class Fact:
    """One thing to recall, as words: its statements (the last one holds the final answer), question and answer."""

    task: str
    statements: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]


def check_task(task: str) -> str:
    """`task` itself, or ValueError naming the nearest tasks."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(TASKS)}"
        raise ValueError(f"task={task!r} is not a task; {hint}")
    return task


@cache
def held_out(key: str, value: str) -> bool:
    """Whether this key with this value is kept for evaluation (one pair in ten)."""
    return zlib.crc32(f"{key} {value}".encode()) % 10 == 0


def draw_facts(rng: np.random.Generator, tasks: Sequence[str], evaluation: bool) -> list[Fact]:
    """One fact per entry of `tasks`; no key occurs twice, and no value or list word while there are others left."""
    if len(tasks) > MOST_FACTS:
        raise ValueError(f"{len(tasks)} facts are more than the words allow; use at most {MOST_FACTS}")
    keys = iter([KEYS[n] for n in rng.permutation(len(KEYS))[: 2 * len(tasks)].tolist()])
    words = [RUN_WORDS[n] for n in rng.permutation(len(RUN_WORDS)).tolist()]
    numbers = rng.integers(len(NUMBERS), size=len(tasks)).tolist()
    facts = []
    for task, number in zip(tasks, numbers, strict=True):
        key = next(keys)
        if task == "copy":
            run, words = tuple(words[:RUN]), words[RUN:]
            facts.append(Fact(task, (("the", "list", "of", key, "is", *run, "."),), _asked("list", key), run))
            continue
        owner = next(keys) if task == "two-hop" else key
        # Should no unused value be left for this key, a used one serves: what is held out stays held out.
        value = next(v for v in chain(words, VALUES) if v in _VALUES and held_out(owner, v) == evaluation)
        words = [word for word in words if word != value]
        found = (value, NUMBERS[number])
        final = ("the", "code", "of", owner, "is", *found)
        if task == "needle":
            facts.append(Fact(task, ((*final, "."),), _asked("code", key), found))
        else:
            pointer = ("the", "code", "of", key, "is", "the", "code", "of", owner, ".")
            facts.append(Fact(task, (pointer, (*final, ".")), _asked("code", key), final))
    return facts


_VALUES = frozenset(VALUES)


def _asked(kind: str, key: str) -> tuple[str, ...]:
    return ("question", ":", "the", kind, "of", key, "is")
