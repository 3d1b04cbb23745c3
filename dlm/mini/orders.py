"""Lists in any order: `make_order(1_000_000)`. Answers hold surprise: what is named next is free, what follows is not.

    tom has 37 apples 12 pears 45 coins.
    pears 12 coins 45 apples 37

Each thing is to be named once, with its number; training draws the order evenly, so nobody can know it. A number
follows from the thing before it alone. So a guide is often wrong about the things and never about the numbers, and
writing two things at once may name one of them twice: an answer is right if it names each once.

Lists of evaluation seeds (from 1,000,000 on) use numbers that training never draws.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from dlm.mini.problems import FIRST_EVALUATION_SEED
from dlm.mini.words import NAMES, THINGS

LEAST_THINGS, MOST_THINGS = 3, 6
LEAST, MOST = 10, 99  # of every number
PROMPT_TOKENS = 3 + 3 * MOST_THINGS  # of the longest prompt


@dataclass(frozen=True)
class Order:
    """`prompt` and one right `answer` as text; `counts` are the things with their numbers, as the prompt has them."""

    prompt: str
    answer: str
    counts: tuple[tuple[str, int], ...]

    def right(self, text: str) -> bool:
        """Whether `text` names every thing once with its number, in any order, and nothing else."""
        said = re.findall(r"([a-z]+) (\d+)", text)
        whole = " ".join(f"{thing} {number}" for thing, number in said) == " ".join(text.split())
        return whole and sorted(said) == sorted((thing, str(number)) for thing, number in self.counts)


def make_order(seed: int, things: int | None = None) -> Order:
    """The list of `seed`: the same arguments give the same list.

    Args:
        seed: from 1,000,000 on for evaluation, below for training.
        things: 3 to 6; None draws it.

    Raises:
        ValueError: a negative seed, or another number of things.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    return draw_order(np.random.default_rng(seed), seed >= FIRST_EVALUATION_SEED, things)


def draw_order(rng: np.random.Generator, evaluation: bool = False, things: int | None = None) -> Order:
    """A random list, held out from training if `evaluation`; errors as `make_order`."""
    if things is not None and not LEAST_THINGS <= things <= MOST_THINGS:
        raise ValueError(f"things={things}: use {LEAST_THINGS} to {MOST_THINGS}")
    size = int(rng.integers(LEAST_THINGS, MOST_THINGS + 1)) if things is None else things
    # Drawn again until the numbers are on the wanted side of the split: one list in ten is for evaluation.
    while True:
        numbers = rng.integers(LEAST, MOST + 1, size=size).tolist()
        if (zlib.crc32(" ".join(map(str, numbers)).encode()) % 10 == 0) == evaluation:
            break
    named = [THINGS[i] for i in rng.permutation(len(THINGS))[:size].tolist()]
    counts = tuple(zip(named, numbers, strict=True))
    told = " ".join(f"{number} {thing}" for thing, number in counts)
    answer = " ".join("{} {}".format(*counts[i]) for i in rng.permutation(size).tolist())
    return Order(f"{NAMES[int(rng.integers(len(NAMES)))]} has {told}.", answer, counts)
