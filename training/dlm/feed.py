"""Training batches: problems of one number of steps, prompts padded on the left, the answer and a tail of end tokens.

Every batch is made from the training's seed and the batch's number, so that a resumed training goes on with the
batches it would have seen. Most rows end soon after the answer; some batches have a tail of up to a thousand end
tokens in few rows, so that a model also knows how a long canvas looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dlm.mini.problems import FIRST_EVALUATION_SEED, MOST, draw_problem, prompt_tokens

LONGEST = 1056  # prompt, answer and tail
SHORT_TAIL = 8


@dataclass(frozen=True)
class Stage:
    """Problems of `least` to `steps` steps and totals up to `top`, begun at the share `latest` of the training or
    before."""

    latest: float
    steps: int
    top: int
    least: int = 1


STAGES = (Stage(0.0, 1, 39), Stage(0.1, 1, MOST), Stage(0.25, 2, MOST), Stage(0.45, 3, MOST))
# For a model that begins with the weights of the shorter problems.
HARD_STAGES = (Stage(0.0, 4, MOST, least=3), Stage(0.2, 5, MOST, least=3), Stage(0.4, 6, MOST, least=3))
STAGES_OF = {"arithmetic": STAGES, "hard": HARD_STAGES}
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


def stage_at(progress: float, stages: Sequence[Stage] = STAGES) -> int:
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

    def batch(self, number: int, stage: Stage) -> Batch:
        """Batch `number` of the training, which has reached `stage`."""
        # Of seed and number alone: a resumed training draws the batches that it would have seen.
        rng = np.random.default_rng([self.seed, number])
        steps = int(rng.integers(stage.least, stage.steps + 1)) if rng.random() < EARLIER else stage.steps
        answer = answer_tokens(steps)
        tail = int(rng.integers(SHORT_TAIL + 1))
        if rng.random() < self.long:
            # Log-uniform: short tails are as frequent per octave as long ones.
            tail = int(np.exp(rng.uniform(np.log(SHORT_TAIL), np.log(LONGEST - prompt_tokens(steps) - answer))))
        rows = max(1, self.tokens // (prompt_tokens(steps) + answer + tail))
        problems = [draw_problem(rng, steps=steps, top=stage.top) for _ in range(rows)]
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
