"""Exact recall by teacher forcing on held-out examples: right when the largest logit is right at every answer token.

This is what greedy decoding with the full cache gives, in one forward pass, so a training can afford it often. The
examples are drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from textkv.mini.facts import TASKS
from textkv.mini.tasks import FIRST_EVALUATION_SEED, make_example

LENGTHS = (256, 512, 1024, 2048)
FORWARD_TOKENS = 65_536  # in one pass


def right_answers(logits: torch.Tensor, targets: torch.Tensor, asks: torch.Tensor, count: int) -> torch.Tensor:
    """[count] bool: question n is right when every position with asks == n + 1 has its target on top.

    `logits` [tokens, vocab], `targets` and `asks` [tokens].
    """
    wrong = (logits.argmax(-1) != targets) & (asks > 0)
    misses = torch.bincount(torch.where(wrong, asks, 0).long(), minlength=count + 1)
    return misses[1 : count + 1] == 0


class Check:
    """`examples` held-out examples per task and length, ready on `device`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, examples: int, device: torch.device, lengths: Sequence[int] = LENGTHS
    ) -> None:
        self._sets: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}
        for length in lengths:
            for task in TASKS:
                made = [make_example(task, length, FIRST_EVALUATION_SEED + n, tokenizer) for n in range(examples)]
                rows = np.stack([np.concatenate([e.prompt_ids, e.answer_ids]) for e in made])
                self._sets[length, task] = torch.from_numpy(rows).to(device), len(made[0].answer_ids)

    @torch.no_grad()
    def recall(self, model: torch.nn.Module, longest: int) -> dict[int, dict[str, float]]:
        """Share of exact answers per length (up to `longest`) and task."""
        found: dict[int, dict[str, float]] = {}
        for (length, task), (rows, answer) in self._sets.items():
            if length <= longest:
                parts = [_exact(model, part, answer) for part in rows.split(max(1, FORWARD_TOKENS // length))]
                found.setdefault(length, {})[task] = torch.cat(parts).float().mean().item()
        return found


def _exact(model: torch.nn.Module, rows: torch.Tensor, answer: int) -> torch.Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=answer).logits
    return (logits.argmax(-1) == rows[:, -answer:]).all(1)
