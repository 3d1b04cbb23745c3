"""Adapters trained by GRPO on rewards (PORAG, arXiv 2504.01281), or by plain supervised tuning, for so many seconds.

trl trains, peft holds the adapters. What is the paper's own: the reward of `textkv.rag.rewards`, the deviation of a
group floored at 0.1, and KL and clip as 100 : 0.1. Its reference policy is that of the start of the outer iteration;
with one update for each batch the KL and its gradient are 0 there, so it is left out. Its rate, 1e-6 to 5e-6, is for
days of an H100; ours moves a small model within minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from textkv.rag.rewards import Reward, RewardError, advantages, exact_match
from training.rag.data import Task, said

METHODS = ("porag", "supervised")
LATEST, CPU_SECONDS = "latest", "cpu_seconds"
_ENDLESS = 1_000_000  # steps; the clock ends a training
_LAYERS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]  # as in the paper


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One training of adapters.

    Attributes:
        seconds: of CPU time, all threads together, over all restarts.
        rate: learning rate, constant after `warmup` steps.
        rank: of the adapters (64 in the paper).
        prompts, group: prompts of a step, and answers to each.
        most: tokens of an answer.
        temperature: answers are drawn at.
        save_steps: steps between two checkpoints.

    Raises:
        ValueError: a group of one, or a figure that is not positive.
    """

    seconds: float = 600.0
    rate: float = 5e-4
    warmup: int = 3
    rank: int = 16
    prompts: int = 8
    group: int = 4
    most: int = 8
    temperature: float = 1.0
    save_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group={self.group}: an answer is compared with others to its prompt; use at least 2")
        for name in ("seconds", "rate", "rank", "prompts", "most", "temperature", "save_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def shared(self, folder: Path) -> dict[str, Any]:
        """What both trainers are told."""
        return {
            "output_dir": str(folder), "max_steps": _ENDLESS, "learning_rate": self.rate, "seed": self.seed,
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": self.warmup, "max_grad_norm": 1.0,
            "per_device_train_batch_size": self.prompts * self.group, "save_steps": self.save_steps,
            "save_total_limit": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "bf16": False,
            "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip

    def adapters(self) -> LoraConfig:
        """The adapters, as peft takes them."""
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=_LAYERS, task_type="CAUSAL_LM")


class Clock(TrainerCallback):
    """Ends a training when its seconds of CPU time are used up. What was used stands in the log, which checkpoints
    carry."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used = seconds, 0.0
        self._since = time.process_time()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Loading is not counted; what an earlier start used is."""
        self.used = max((entry.get(CPU_SECONDS, 0.0) for entry in state.log_history), default=0.0)
        self._since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Counts, and ends with a checkpoint."""
        now = time.process_time()
        self.used += now - self._since
        self._since = now
        if self.used >= self.seconds:
            control.should_training_stop = control.should_save = True

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Writes the seconds beside the figures of a step."""
        if state.log_history:
            state.log_history[-1][CPU_SECONDS] = self.used


def grouped(reward: Reward, group: int) -> Callable[..., list[float]]:
    """The reward function that trl calls: advantages within each group, the plain rewards among its metrics."""

    def porag(
        completions: list[str],
        passages: list[list[str]],
        reference: list[str],
        log_metric: Callable[[str, float], None],
        **rest: Any,
    ) -> list[float]:
        answers = [said(text) for text in completions]
        rewards = reward(answers, reference, passages)
        matches = [exact_match(a, r) for a, r in zip(answers, reference, strict=True)]
        log_metric("plain_reward", sum(rewards) / len(rewards))
        log_metric("exact_match", sum(matches) / len(matches))
        return advantages(rewards, group)

    return porag


def trainer_of(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    tuning: Tuning,
    reward: Reward,
    folder: Path,
) -> Trainer:
    """trl's trainer for one of `METHODS`, whose checkpoints lie in `folder`.

    Raises:
        ValueError: another method.
    """
    shared, clock = tuning.shared(folder), Clock(tuning.seconds)
    if method == "porag":
        config = GRPOConfig(
            **shared, num_generations=tuning.group, max_completion_length=tuning.most, temperature=tuning.temperature,
            beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="none",
        )  # fmt: skip
        data = Dataset.from_list([task.row() for task in tasks])
        return GRPOTrainer(
            model, grouped(reward, tuning.group), config, data, processing_class=tokenizer, callbacks=[clock],
            peft_config=tuning.adapters(),
        )  # fmt: skip
    if method == "supervised":
        data = Dataset.from_list([task.supervised() for task in tasks])
        config = SFTConfig(**shared, completion_only_loss=True)
        return SFTTrainer(
            model, config, train_dataset=data, processing_class=tokenizer, callbacks=[clock],
            peft_config=tuning.adapters(),
        )  # fmt: skip
    raise ValueError(f"method={method!r} is not known; use {' or '.join(METHODS)}")


def tune(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    tuning: Tuning,
    reward: Reward,
    folder: Path,
) -> PreTrainedModel:
    """The model with its trained adapters; goes on from the last checkpoint in `folder`, and trains no more what is
    done there.

    Raises:
        RewardError: a reward is no number. A checkpoint of the step before it is written first.
    """
    done = folder / LATEST
    if done.is_dir():
        return PeftModel.from_pretrained(model, done)
    trainer = trainer_of(method, model, tokenizer, tasks, tuning, reward, folder)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    try:
        trainer.train(resume_from_checkpoint=last)
    except RewardError as error:
        if trainer.state.global_step:
            trainer._save_checkpoint(trainer.model, trial=None)
        raise RewardError(f"{error}; step {trainer.state.global_step} is kept in {folder}") from None
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    trainer.save_model(str(done))
    return trainer.model
