"""Prompts of the kind that RULER (arXiv 2404.06654) asks long-context models, as text, for any tokenizer.

| task | what stands in the prompt | what is asked |
|---|---|---|
| `needle` | one number in plain sentences | that number |
| `multikey` | the numbers of twelve keys in plain sentences | one of them |
| `variables` | three chains of two variables, the second has the first one's number | the number of a second |
| `pairs` | nothing but lines "key: number" | the number of one key |

Every answer is four digits, so that scoring is a comparison of digits. Ours are the words, and that the variables task
asks for the number that a chain hands down, where RULER asks for all its names: digits can be scored one by one.

A prompt is a text and a question, in the model's chat template where its tokenizer has one; the answer has been begun,
as in RULER. The pieces are tokenized one by one (each is a line), so that text and question together have exactly the
wanted length and a question asked later is the same tokens.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.filler import Filler, sentences
from textkv.mini.tasks import place
from textkv.mini.words import KEYS
from textkv.records import read_text

SEED = 2_000_000
DIGITS = 4
MIN_LENGTH = 256
MANY = 12  # keys of a multikey prompt
CHAINS, HOPS = 3, 2  # variables that hand a number down; SmolLM2 only guesses at longer chains
_SENTENCES = 12_000
_MARK = "\x00"  # where the user's words stand while the chat template is cut in two


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: int64 [n], what comes before the question, and what a cache may read without knowing it.
        question: int64 [m], the question with the beginning of the answer.
        answer: four digits.
        depth: where the line with the answer stands, 0 = first, 1 = last.
    """

    text: np.ndarray
    question: np.ndarray
    answer: str
    depth: float


@dataclass(frozen=True)
class Asked:
    """A task's own words: lines of the text (the one with the answer last), the question, the answer's beginning."""

    lines: tuple[str, ...]
    question: str
    begun: str
    answer: str


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))


def _named(keys: list[str], rng: np.random.Generator) -> Asked:
    lines = [f"The secret number of the {key} is {_number(rng)}." for key in keys]
    asked = keys[-1]
    question, begun = f"What is the secret number of the {asked}?", f"The secret number of the {asked} is"
    return Asked(tuple(lines), question, begun, lines[-1][-1 - DIGITS : -1])


def _variables(keys: list[str], rng: np.random.Generator) -> Asked:
    lines = []
    for chain in range(CHAINS):
        names = keys[chain * HOPS : (chain + 1) * HOPS]
        answer = _number(rng)
        lines.append(f"The value of {names[0]} is {answer}.")
        lines += [f"The value of {b} is the value of {a}." for a, b in zip(names, names[1:], strict=False)]
    question, begun = f"Which number is the value of {names[-1]}?", f"The value of {names[-1]} is the number"
    # The line with the number is the one that must not be lost; the others say where it is.
    return Asked((*lines[:-HOPS], *lines[-HOPS + 1 :], lines[-HOPS]), question, begun, answer)


def _pairs(keys: list[str], rng: np.random.Generator) -> Asked:
    lines = [f"{key}: {_number(rng)}" for key in keys]
    return Asked(tuple(lines), f"Which number stands behind {keys[-1]}?", f"{keys[-1]}:", lines[-1][-DIGITS:])


@dataclass(frozen=True)
class Task:
    """How a task is made.

    Attributes:
        keys: how many of the key words it uses; None = as many as there is room for.
        make: keys -> the task's words.
        opening: what the prompt says first.
    """

    keys: int | None
    make: Callable[[list[str], np.random.Generator], Asked]
    opening: str


_SOME = "A few secret numbers are hidden in the following text. Remember them, you will be asked for one.\n"
TASKS = {
    "needle": Task(1, _named, "A secret number is hidden in the following text. Remember it.\n"),
    "multikey": Task(MANY, _named, _SOME),
    "variables": Task(CHAINS * HOPS, _variables, "Follow the values of the variables in the following text.\n"),
    "pairs": Task(None, _pairs, "The following lines give a number for each word.\n"),
}


def check_task(task: str) -> str:
    """`task` itself, or ValueError naming the nearest."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(TASKS)}"
        raise ValueError(f"task={task!r} is not a task; {hint}")
    return task


class _Lines(Filler):
    """Filler that ends with the end of a line, so that no fact is glued to half a sentence."""

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids, starts = super().draw(rng, length)
        if length and len(self.starts) > 1:
            ids = np.append(ids[:-1], self.ids[self.starts[1] - 1])
        return ids, starts


class Maker:
    """Makes prompts for one tokenizer and length.

    Args:
        tokenizer: any; its chat template is used if it has one.
        length: tokens of text and question together.
        filler: a text whose lines stand between the facts; None = sentences of a small grammar.

    Raises:
        ValueError: a length without room, or a filler shorter than that.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, filler: Path | None = None) -> None:
        if length < MIN_LENGTH:
            raise ValueError(f"length={length} leaves no room for facts; use at least {MIN_LENGTH}")
        self.tokenizer, self.length = tokenizer, length
        self._before, self._after = _frame(tokenizer)
        text = _plain() if filler is None else read_text(filler)
        self._filler = _Lines.text(tokenizer, text)
        if len(self._filler.ids) < length:
            raise ValueError(
                f"{filler} has {len(self._filler.ids)} tokens, a prompt of {length} needs as many; give a longer text"
            )
        self._keys = _alike(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Tokens of a piece."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def make(self, task: str, number: int) -> Prompt:
        """Prompt `number` of a task: the same arguments, the same prompt.

        Raises:
            ValueError: unknown task, or no room for its lines.
        """
        kind = TASKS[check_task(task)]
        rng = np.random.default_rng([SEED, list(TASKS).index(task), number])
        keys = [self._keys[n] for n in rng.permutation(len(self._keys)).tolist()]
        asked = kind.make(keys[: kind.keys], rng)
        start = [*self._before, *self.ids(kind.opening)]
        question = [*self.ids(f"{asked.question}"), *self._after, *self.ids(asked.begun)]
        lines = [self.ids(line + "\n") for line in asked.lines]
        room = self.length - len(start) - len(question) - sum(map(len, lines))
        while kind.keys is None and room < 0 and len(lines) > 1:
            room += len(lines.pop(0))  # as many as there is room for; the last one has the answer
        if room < 0:
            raise ValueError(f"length={self.length} is {-room} tokens too short for {task}; use {self.length - room}")
        pieces, begins = place(rng, self._filler, room, lines, [None] * len(lines))
        text = np.concatenate([start, *pieces]).astype(np.int64)
        return Prompt(text, np.asarray(question, np.int64), asked.answer, begins[-1] / max(1, len(text) - len(start)))


def score(said: str, answer: str) -> tuple[bool, float]:
    """(whether the first number said is the answer, share of its digits that are right, place by place)."""
    found = re.search(r"\d+", re.sub(r"(?<=\d)[,. ](?=\d{3})", "", said))
    digits = found[0] if found else ""
    return digits == answer, sum(a == b for a, b in zip(digits, answer, strict=False)) / len(answer)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before the user's words and between these and the answer."""
    if not tokenizer.chat_template:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return start, tokenizer("\n", add_special_tokens=False)["input_ids"]
    message = [{"role": "user", "content": _MARK}]
    shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, mark, after = shown.partition(_MARK)
    if not mark:
        raise ValueError("the tokenizer's chat template changes what the user says; remove the template")
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))


def _plain() -> str:
    """Sentences of the small grammar, written as one writes them, a line each."""
    told = (" ".join(words[:-1]) + "." for words in sentences(_SENTENCES, SEED))
    return "\n".join(sentence[0].upper() + sentence[1:] for sentence in told)


@lru_cache(maxsize=4)
def _alike(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The key words that take the same number of tokens wherever they stand, the largest such group: prompts of one
    task then have one length of question, and run as one batch."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in KEYS:
        size = tuple(len(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (key, f" {key}"))
        groups.setdefault(size, []).append(key)
    return tuple(max(groups.values(), key=len))
