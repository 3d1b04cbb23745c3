"""Training batches: problems of one size, prompts padded on the left, the answer and a tail of end tokens.

Every batch is made from the training's seed and the batch's number, so that a resumed training goes on with the
batches it would have seen. Most rows end soon after the answer; some batches have a tail of up to a thousand end
tokens in few rows, so that a model also knows how a long canvas looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dlm.mini import orders
from dlm.mini.problems import (
    FIRST_EVALUATION_SEED,
    MOST,
    MOST_STEPS,
    PROMPT_TOKENS,
    Problem,
    draw_problem,
    final_answer,
    make_problem,
)

LONGEST = 1056  # prompt, answer and tail
SHORT_TAIL = 8


@dataclass(frozen=True)
class Stage:
    """Problems of up to `steps` steps and totals up to `top`, begun at the share `latest` of the training or before."""

    latest: float
    steps: int
    top: int

    def size(self, rng: np.random.Generator) -> int:
        """The number of steps of a batch."""
        return int(rng.integers(1, self.steps + 1)) if rng.random() < EARLIER else self.steps

    def draw(self, rng: np.random.Generator, size: int) -> Problem:
        """A problem of so many steps."""
        return draw_problem(rng, steps=size, top=self.top)

    def tokens(self, size: int) -> tuple[int, int]:
        """The most tokens of a prompt, and the tokens of an answer with its end."""
        return PROMPT_TOKENS - 5 * (MOST_STEPS - size), answer_tokens(size)

    def held_out(self, seed: int) -> tuple[str, Callable[[str], bool]]:
        """A prompt of the stage's longest problems, and whether an answer to it is right."""
        problem = make_problem(seed, self.steps, self.top)
        return problem.prompt, lambda text: final_answer(text) == problem.total

    def __str__(self) -> str:
        return f"{self.steps} steps to {self.top}"


@dataclass(frozen=True)
class OrderStage:
    """Lists of things to be named in any order; the methods are those of `Stage`."""

    latest: float
    steps: int  # things of the longest

    def size(self, rng: np.random.Generator) -> int:
        """The number of things of a batch's lists."""
        return int(rng.integers(orders.LEAST_THINGS, self.steps + 1))

    def draw(self, rng: np.random.Generator, size: int) -> orders.Order:
        """A list of so many things."""
        return orders.draw_order(rng, things=size)

    def tokens(self, size: int) -> tuple[int, int]:
        """The tokens of a prompt, and of an answer with its end."""
        return 3 + 3 * size, 3 * size + 1

    def held_out(self, seed: int) -> tuple[str, Callable[[str], bool]]:
        """A prompt of the longest lists, and whether an answer to it is right."""
        made = orders.make_order(seed, self.steps)
        return made.prompt, made.right

    def __str__(self) -> str:
        return f"{self.steps} things"


STAGES = (Stage(0.0, 1, 39), Stage(0.1, 1, MOST), Stage(0.25, 2, MOST), Stage(0.45, 3, MOST))
TASKS = {"arithmetic": STAGES, "orders": (OrderStage(0.0, orders.MOST_THINGS),)}
EARLIER = 0.5  # share of batches with any number of steps so far, so that the shorter problems are not forgotten


@dataclass(frozen=True)
class Batch:
    """Rows of one length: `ids` int64 [rows, tokens], `visible` bool [rows, tokens] (False = left pad), `prompt` = the
    column where every answer starts, `answer` = tokens of every answer, its first end token included.
    """

    ids: torch.Tensor
    visible: torch.Tensor
    prompt: int
    answer: int

    @property
    def position_ids(self) -> torch.Tensor:
        """int64 [rows, tokens], 0 at the first real token."""
        return (self.visible.long().cumsum(1) - 1).clamp(min=0)


def stage_at(progress: float, stages: Sequence[Stage | OrderStage] = STAGES) -> int:
    """Number of the stage that a training has reached at the latest, a share 0..1 into it."""
    return sum(stage.latest <= progress for stage in stages) - 1


class Feed:
    """Makes batch number `n` of about `tokens` tokens; `long` is the share of batches with a long tail."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int, long: float = 0.1) -> None:
        if not 0 <= seed < FIRST_EVALUATION_SEED:
            raise ValueError(f"seed={seed} is not a training seed; use 0 to {FIRST_EVALUATION_SEED - 1:,}")
        if tokens < LONGEST:
            raise ValueError(f"tokens={tokens} is less than one long row; use at least {LONGEST}")
        if not 0.0 <= long <= 1.0:
            raise ValueError(f"long={long} is not a share of the batches; use e.g. 0.1")
        self.tokenizer, self.tokens, self.seed, self.long = tokenizer, tokens, seed, long

    def batch(self, number: int, stage: Stage | OrderStage) -> Batch:
        """Batch `number` of the training, which has reached `stage`."""
        # Of seed and number alone: a resumed training draws the batches that it would have seen.
        rng = np.random.default_rng([self.seed, number])
        size = stage.size(rng)
        prompt, answer = stage.tokens(size)
        tail = int(rng.integers(SHORT_TAIL + 1))
        if rng.random() < self.long:
            # Log-uniform: short tails are as frequent per octave as long ones.
            tail = int(np.exp(rng.uniform(np.log(SHORT_TAIL), np.log(LONGEST - PROMPT_TOKENS - answer))))
        rows = max(1, self.tokens // (prompt + answer + tail))
        problems = [stage.draw(rng, size) for _ in range(rows)]
        prompts = self.tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt")
        answers = self.tokenizer([p.answer for p in problems], add_special_tokens=False, return_tensors="pt")
        ends = torch.full((rows, 1 + tail), self.tokenizer.eos_token_id)
        ids = torch.cat([prompts["input_ids"], answers["input_ids"], ends], dim=1)
        visible = torch.ones_like(ids, dtype=torch.bool)
        width = prompts["input_ids"].shape[1]
        visible[:, :width] = prompts["attention_mask"].bool()
        return Batch(ids, visible, width, answer)


def answer_tokens(steps: int) -> int:
    """Tokens of the answer to a problem of so many steps: first total, steps, final total, end token."""
    return 4 + 7 * steps + 3 + 1
