"""Prompts of one question and the passages found for it: some to learn from, others to measure.

Two kinds. `invented`: a world's facts in plain English, for a model that can talk. `recall`: the embedded mini model's
own facts ("the code of falcon is amber 47 ."), in a wording of the question that it was never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import draw_facts
from textkv.rag.answer import chat, prompt_of
from textkv.rag.documents import Chunk
from textkv.rag.index import Index
from textkv.rag.invented import World

KINDS = ("recall", "invented")
ASKED = "Answer with a name or a word from the passages, and nothing else."
BEGUN = "Answer:"
"""The answer as the prompt begins it: without this a small model of chats says whole sentences, whatever it is told,
and draws too few short answers to learn from."""
HELD_OUT = 1_000_000  # seeds from here on are only measured on
_FACTS = 8  # of a recall index


@dataclass(frozen=True)
class Task:
    """A prompt as the model reads it, the passages in it, the reference answer, and what follows it."""

    prompt: str
    passages: tuple[str, ...]
    reference: str
    after: str = ""

    def row(self) -> dict:
        """As a row of a data set for GRPO."""
        return {"prompt": self.prompt, "passages": list(self.passages), "reference": self.reference}

    def supervised(self) -> dict:
        """As a row of a data set for supervised tuning."""
        return {"prompt": self.prompt, "completion": f" {self.reference}{self.after}"}


def said(text: str) -> str:
    """The answer in what a model wrote: up to the first full stop or new line."""
    return text.strip().partition("\n")[0].partition(".")[0].strip()


def tasks(kind: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, passages: int = 3) -> list[Task]:
    """n tasks of a seed, `passages` found by BM25 for each.

    Raises:
        ValueError: another kind, or no tasks asked for.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least 1 task is needed")
    if kind not in KINDS:
        raise ValueError(f"tasks={kind!r} are not known; use {' or '.join(KINDS)}")
    made = _recall(seed, passages) if kind == "recall" else _invented(tokenizer, seed, passages)
    return [next(made) for _ in range(n)]


def _invented(tokenizer: PreTrainedTokenizerBase, seed: int, passages: int) -> Iterator[Task]:
    while True:
        world = World.drawn(seed)
        index = Index(world.chunks())
        for question in world.questions(1):
            found = index.search(question.text, passages)
            prompt = chat(tokenizer, prompt_of(question.text, found, ASKED)) + BEGUN
            yield Task(prompt, tuple(p.chunk.text for p in found), question.answer)
        seed += 1


def _recall(seed: int, passages: int) -> Iterator[Task]:
    rng = np.random.default_rng(seed)
    while True:
        facts = draw_facts(rng, ["needle"] * _FACTS, evaluation=seed >= HELD_OUT)
        chunks = [Chunk(f"fact-{n}", 0, " ".join(fact.statements[0])) for n, fact in enumerate(facts)]
        key = facts[0].question[-2]
        found = [p.chunk.text for p in Index(chunks).search(f"the code of {key}", passages)]
        # The best passage comes first, which would give the answer away by its place.
        found = [found[n] for n in rng.permutation(len(found))]
        prompt = f"{' '.join(found)} question : what is the {key} code ? the {key} code is"
        yield Task(prompt, tuple(found), " ".join(facts[0].answer), " .")
