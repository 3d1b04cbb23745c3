"""What a model answers to held-out tasks: rewards and exact matches of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.rag.rewards import Reward, exact_match, fidelity
from training.rag.data import Task, said


@dataclass(frozen=True)
class Measured:
    """Greedy answers, and the figures of each."""

    answers: tuple[str, ...]
    rewards: tuple[float, ...]
    matches: tuple[float, ...]
    fidelities: tuple[float, ...]

    def row(self) -> dict[str, float]:
        """Means, named as in every results file."""
        n = len(self.answers)
        figures = {"reward": self.rewards, "exact_match": self.matches, "fidelity": self.fidelities}
        return {name: sum(values) / n for name, values in figures.items()} | {"n": n}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    reward: Reward,
    most: int,
    batch: int = 32,
) -> Measured:
    """Answers of at most `most` tokens to all tasks, `batch` at a time, padded on the left."""
    answers: list[str] = []
    for first in range(0, len(tasks), batch):
        answers += _greedy(model, tokenizer, [task.prompt for task in tasks[first : first + batch]], most)
    references, passages = [task.reference for task in tasks], [task.passages for task in tasks]
    matches = tuple(exact_match(a, r) for a, r in zip(answers, references, strict=True))
    faithful = tuple(fidelity(a, p) for a, p in zip(answers, passages, strict=True))
    return Measured(tuple(answers), tuple(reward(answers, references, passages)), matches, faithful)


@torch.no_grad()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], most: int) -> list[str]:
    given = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    given = given.to(model.device)
    was = model.training
    out = model.eval().generate(
        input_ids=given.input_ids, attention_mask=given.attention_mask, do_sample=False, max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.train(was)
    return [said(text) for text in tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)]
