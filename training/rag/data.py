"""Prompts of one question and the passages found for it, from invented worlds: some to learn from, others to measure."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from textkv.rag.answer import chat, prompt_of
from textkv.rag.index import Index
from textkv.rag.invented import World

ASKED = "Answer with a name or a word from the passages, and nothing else."
BEGUN = "Answer:"
"""The answer as the prompt begins it: without this a small model of chats says whole sentences, whatever it is told,
and draws too few short answers to learn from."""
HELD_OUT = 1_000_000  # worlds from this seed on are only measured on


@dataclass(frozen=True)
class Task:
    """A prompt as the model reads it (in its chat template), the passages in it, and the reference answer."""

    prompt: str
    passages: tuple[str, ...]
    reference: str

    def row(self) -> dict:
        """As a row of a data set for GRPO."""
        return {"prompt": self.prompt, "passages": list(self.passages), "reference": self.reference}

    def supervised(self) -> dict:
        """As a row of a data set for supervised tuning."""
        return {"prompt": self.prompt, "completion": f" {self.reference}"}


def tasks(tokenizer: PreTrainedTokenizerBase, n: int, seed: int, passages: int = 2, hops: int = 1) -> list[Task]:
    """n tasks from as many worlds as they need, `passages` found by BM25 for each.

    Raises:
        ValueError: no tasks asked for.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least 1 task is needed")
    made: list[Task] = []
    while len(made) < n:
        world = World.drawn(seed + len(made))
        index = Index(world.chunks())
        for question in world.questions(hops)[: n - len(made)]:
            found = index.search(question.text, passages)
            prompt = chat(tokenizer, prompt_of(question.text, found, ASKED)) + BEGUN
            made.append(Task(prompt, tuple(p.chunk.text for p in found), question.answer))
    return made
