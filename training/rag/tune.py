"""Adapters trained by GRPO on rewards (PORAG, arXiv 2504.01281), or by plain supervised tuning, for so many seconds.

trl trains, peft holds the adapters. What is the paper's own: the reward of `textkv.rag.rewards`, the deviation of a
group floored at 0.1, and KL and clip as 100 : 0.1. Its reference policy is that of the start of the outer iteration;
with one update for each batch the KL and its gradient are 0 there, so it is left out. Its rate, 1e-6 to 5e-6, is for
days of an H100; ours moves a small model within minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from textkv.rag.heads import RewardHeads, last_states
from textkv.rag.rewards import Reward, RewardError, advantages, exact_match
from training.rag.data import Task, said

METHODS = ("porag", "supervised")
LATEST, CPU_SECONDS = "latest", "cpu_seconds"
_ENDLESS = 1_000_000  # steps; the clock ends a training
_SHOWN = ("plain_reward", "exact_match", "head_error", "loss")  # of what trl logs
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
        heads: answers are judged by what two heads predict of their figures, which learn beside the model; False = by
            the figures themselves.
        head_rate: learning rate of the heads.

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
    heads: bool = False
    head_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group={self.group}: an answer is compared with others to its prompt; use at least 2")
        for name in ("seconds", "rate", "rank", "prompts", "most", "temperature", "save_steps", "head_rate"):
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
        """Writes the seconds beside the figures of a step, and says some of them."""
        if state.log_history:
            state.log_history[-1][CPU_SECONDS] = self.used
            shown = [f"{name} {float(logs[name]):.3f}" for name in _SHOWN if name in logs]
            print(f"step {state.global_step}, {self.used:.0f} s: {', '.join(shown)}", file=sys.stderr, flush=True)


class HeadsBeside(TrainerCallback):
    """Keeps the heads' weights in every checkpoint."""

    def __init__(self, heads: RewardHeads) -> None:
        self.heads = heads

    def on_save(self, args, state, control, **kwargs) -> None:
        """Called when a checkpoint is there."""
        self.heads.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def grouped(
    reward: Reward, group: int, predicts: Callable[[list[str], list[str]], Any] | None = None,
    heads: RewardHeads | None = None,
) -> Callable[..., list[float]]:  # fmt: skip
    """The reward function that trl calls: advantages within each group, the plain rewards among its metrics.

    Args:
        predicts: the hidden states [n, width] of prompts with their answers, for `heads`; None = no heads.
    """

    def porag(
        prompts: list[str],
        completions: list[str],
        passages: list[list[str]],
        reference: list[str],
        log_metric: Callable[[str, float], None],
        **rest: Any,
    ) -> list[float]:
        answers = [said(text) for text in completions]
        parts = reward.parts(answers, reference, passages)
        rewards = reward.joined(parts, answers)
        matches = [exact_match(a, r) for a, r in zip(answers, reference, strict=True)]
        log_metric("plain_reward", sum(rewards) / len(rewards))
        log_metric("exact_match", sum(matches) / len(matches))
        if heads is not None and predicts is not None:
            states = predicts(prompts, completions)
            rewards = reward.joined(heads.predicted(states), answers)
            log_metric("head_error", heads.learn(states, parts))
        return advantages(rewards, group)

    return porag


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to be tuned: by what, on what, how, and where its checkpoints lie.

    Attributes:
        method: one of `METHODS`.
        folder: of checkpoints; the adapters that were trained to the end lie in its `LATEST`.

    Raises:
        ValueError: another method.
    """

    method: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    tuning: Tuning
    reward: Reward
    folder: Path

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not known; use {' or '.join(METHODS)}")

    def trainer(self, last: str | None = None) -> Trainer:
        """trl's trainer for the method; `last`: the checkpoint that it is to go on from."""
        shared = self.tuning.shared(self.folder)
        told = {
            "processing_class": self.tokenizer, "peft_config": self.tuning.adapters(),
            "callbacks": [Clock(self.tuning.seconds)],
        }  # fmt: skip
        if self.method == "supervised":
            data = Dataset.from_list([task.supervised() for task in self.tasks])
            made = SFTTrainer(self.model, SFTConfig(**shared, completion_only_loss=True), train_dataset=data, **told)
        else:
            made = self._by_rewards(shared, told, last)
        made.remove_callback(PrinterCallback)  # a screenful for each step
        return made

    def _by_rewards(self, shared: dict[str, Any], told: dict[str, Any], last: str | None) -> GRPOTrainer:
        tuning = self.tuning
        config = GRPOConfig(
            **shared, num_generations=tuning.group, max_completion_length=tuning.most, temperature=tuning.temperature,
            beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="none",
        )  # fmt: skip
        data = Dataset.from_list([task.row() for task in self.tasks])
        if not tuning.heads:
            return GRPOTrainer(self.model, grouped(self.reward, tuning.group), config, data, **told)
        heads = RewardHeads(self.model.config.hidden_size, tuning.head_rate, tuning.seed)
        if last is not None:
            heads.load(Path(last))
        told["callbacks"].append(HeadsBeside(heads))
        # The adapters are on: peft puts them into the model's own layers.
        states = lambda prompts, answers: last_states(self.model, self.tokenizer, prompts, answers)  # noqa: E731
        return GRPOTrainer(self.model, grouped(self.reward, tuning.group, states, heads), config, data, **told)

    def run(self) -> PreTrainedModel:
        """The model with its trained adapters; goes on from the last checkpoint, and trains no more what is done.

        Raises:
            RewardError: a reward is no number. A checkpoint of the step before it is written first.
        """
        done = self.folder / LATEST
        if done.is_dir():
            return PeftModel.from_pretrained(self.model, done)
        last = get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None
        trainer = self.trainer(last)
        try:
            trainer.train(resume_from_checkpoint=last)
        except RewardError as error:
            if trainer.state.global_step:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
            raise RewardError(f"{error}; step {trainer.state.global_step} is kept in {self.folder}") from None
        trainer.state.save_to_json(str(self.folder / "trainer_state.json"))
        trainer.save_model(str(done))
        return trainer.model
