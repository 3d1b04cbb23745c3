"""Arithmetic word problems with worked steps: `make_problem(1_000_000)`.

A problem starts with a number and changes it by adding or taking away, one to three times; those of the task "hard"
four to six times. Every total is 10..99:

    tom has 37 apples. he buys 25. he sells 14. how many now?
    =7,3 +52 =2'6 -41 =8'4 #### 48

The working writes numbers from the ones to the tens, so that no written digit waits for a later one. Each total is
`=`, its ones, a mark (`'`: one was carried or borrowed; `,`: nothing was) and its tens: the ones depend on two
digits, the mark on two, the tens on two and the mark. After `####` the last total stands in plain order. Every step
has the same seven tokens, so the length of the answer follows from the question alone, and nothing has to be guessed.
What makes long problems hard is that each total follows from the one before: a model of few layers cannot write them
all at once.

Problems of evaluation seeds (from 1,000,000 on) use starts and changes that training never draws (`held_out`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dlm.mini.words import (
    CARRIED,
    ENTERS,
    FINAL,
    GAINED,
    GAINS,
    LEAVES,
    LOSSES,
    LOST,
    NAMES,
    PEOPLE,
    PLACES,
    PLAIN,
    THINGS,
)

FIRST_EVALUATION_SEED = 1_000_000
LEAST, MOST = 10, 99  # of every total
SHARES = {"arithmetic": {1: 0.2, 2: 0.35, 3: 0.45}, "hard": {4: 0.25, 5: 0.35, 6: 0.4}}
"""By task, which share of its problems has how many steps."""
MOST_STEPS = max(max(shares) for shares in SHARES.values())


@dataclass(frozen=True)
class Problem:
    """`prompt` and `answer` as text; `start` changed by each of `changes` in turn gives `total`."""

    prompt: str
    answer: str
    start: int
    changes: tuple[int, ...]

    @property
    def total(self) -> int:
        """The answer: what is left after all changes."""
        return self.start + sum(self.changes)


def make_problem(seed: int, steps: int | None = None, top: int = MOST, task: str = "arithmetic") -> Problem:
    """The problem of `seed`: the same arguments give the same problem.

    Args:
        seed: from 1,000,000 on for evaluation, below for training.
        steps: 1 to 6; None draws it as `task` does.
        top: largest total on the way, 20 to 99.
        task: "arithmetic" or "hard".

    Raises:
        ValueError: a negative seed, steps or top out of range.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    return draw_problem(np.random.default_rng(seed), seed >= FIRST_EVALUATION_SEED, steps, top, task)


def draw_problem(
    rng: np.random.Generator, evaluation: bool = False, steps: int | None = None, top: int = MOST,
    task: str = "arithmetic",
) -> Problem:  # fmt: skip
    """A random problem, held out from training if `evaluation`; the other arguments as in `make_problem`."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps={steps} is not a number of steps; use 1 to {MOST_STEPS}")
    if not LEAST + 10 <= top <= MOST:
        raise ValueError(f"top={top} leaves no problems; use {LEAST + 10} to {MOST}")
    if steps is None:
        shares = SHARES[task]
        steps = min(shares) + int(np.searchsorted(np.cumsum(list(shares.values())), rng.random()))
    # Drawn again until the numbers are on the wanted side of the split; nine of ten are on training's.
    while True:
        totals = rng.integers(LEAST, top + 1, size=steps + 1).tolist()
        changes = tuple(after - before for before, after in zip(totals, totals[1:], strict=False))
        if all(changes) and held_out(totals[0], changes) == evaluation:
            break
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    return Problem(template(rng, totals[0], changes), working(totals[0], changes), totals[0], changes)


def prompt_tokens(steps: int) -> int:
    """Tokens of the longest prompt of so many steps."""
    return 11 + 5 * steps


def held_out(start: int, changes: Sequence[int]) -> bool:
    """Whether these numbers are kept for evaluation (one problem in ten)."""
    # A checksum and not hash(): Python salts that one in every process.
    return zlib.crc32(" ".join(map(str, (start, *changes))).encode()) % 10 == 0


def working(start: int, changes: Sequence[int]) -> str:
    """The worked steps and the final total as text. Every total on the way must be 10..99."""
    totals = list(accumulate(changes, initial=start))
    if not all(LEAST <= total <= MOST for total in totals):
        raise ValueError(f"totals {totals} leave {LEAST}..{MOST}; choose other changes")
    parts = [f"={start % 10}{PLAIN}{start // 10}"]
    for before, change in zip(totals, changes, strict=False):
        sign, size, after = "+" if change > 0 else "-", abs(change), before + change
        # Outside 0..9 something was carried or borrowed, which the mark says.
        ones = before % 10 + (size % 10 if change > 0 else -(size % 10))
        parts.append(f"{sign}{size % 10}{size // 10}")
        parts.append(f"={after % 10}{PLAIN if 0 <= ones <= 9 else CARRIED}{after // 10}")
    return " ".join([*parts, FINAL, str(totals[-1])])


def final_answer(text: str) -> int | None:
    """The number after the last `####` of `text`, None where there is none."""
    found = re.findall(rf"{FINAL}\s*(\d(?: ?\d)*)", text)
    return int(found[-1].replace(" ", "")) if found else None


def _pick(rng: np.random.Generator, choices: Sequence) -> object:
    return choices[int(rng.integers(len(choices)))]


def _person(rng: np.random.Generator) -> tuple[str, str]:
    """(name, pronoun)."""
    pronoun = _pick(rng, tuple(PEOPLE))
    return _pick(rng, PEOPLE[pronoun]), pronoun


def _owner(rng: np.random.Generator, start: int, changes: Sequence[int]) -> str:
    name, pronoun = _person(rng)
    told = [f"{pronoun} {_pick(rng, GAINS if change > 0 else LOSSES)} {abs(change)}." for change in changes]
    return " ".join([f"{name} has {start} {_pick(rng, THINGS)}.", *told, "how many now?"])


def _asked_first(rng: np.random.Generator, start: int, changes: Sequence[int]) -> str:
    name, pronoun = _person(rng)
    told = [f"{pronoun} {_pick(rng, GAINED if change > 0 else LOST)} {abs(change)}." for change in changes]
    return " ".join([f"how many {_pick(rng, THINGS)} has {name}?", f"{pronoun} had {start}.", *told])


def _place(rng: np.random.Generator, start: int, changes: Sequence[int]) -> str:
    told = [f"{abs(change)} {' '.join(_pick(rng, ENTERS if change > 0 else LEAVES))}." for change in changes]
    return " ".join([f"the {_pick(rng, PLACES)} has {start} people.", *told, "how many now?"])


def _compared(rng: np.random.Generator, start: int, changes: Sequence[int]) -> str:
    """Everybody is compared with the one named before."""
    names = [NAMES[n] for n in rng.permutation(len(NAMES))[: len(changes) + 1].tolist()]
    more = [
        f", {name} {abs(change)} {'more' if change > 0 else 'fewer'}"
        for name, change in zip(names[1:], changes, strict=True)
    ]
    return f"{names[0]} has {start} {_pick(rng, THINGS)}{''.join(more)}. how many has {names[-1]}?"


TEMPLATES = (_owner, _asked_first, _place, _compared)
