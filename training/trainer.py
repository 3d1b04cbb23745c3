"""The one trainer of all embedded models: rates by the clock, averaged weights, a state that a second start goes on
from, and an export every few minutes.

Warm-up, plateau and a linear fall to 2 % within a time budget. What is exported and measured are the averaged weights:
at a high rate an exponential average answers better than the weights of the last step. On a GPU it computes in bf16
with fp32 weights.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from textkv import arguments, checkpoints, command
from textkv.checkpoints import readable_files
from textkv.command.workers import end_with_parent
from training.export import export
from training.state import MEND, WHAT, load_state, read_counters, save_state


def option(default: Any, told: str, kind: Callable[[str], Any] | None = None) -> Any:
    """A setting that is also an option of the command, explained by `told`; `kind` = its type there, None = by its
    default's (`training.command.KINDS`)."""
    return field(default=default, metadata={"help": told, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length and step size of a training. `minutes` counts what the process got of the time, over all restarts: other
    work on the machine makes a training slower, not shorter.
    """

    minutes: float = option(60.0, "time budget of the whole training", command.positive)
    steps: int = option(0, "length of the whole training in steps; 0: by its minutes")
    rate: float = option(2e-3, "highest learning rate", command.positive)
    warmup: int = option(100, "steps until it is reached", command.count)
    fall: float = option(0.3, "share of the time at the end in which it falls", command.fraction)
    average: float = option(0.998, "share of the averaged weights that a step keeps", command.fraction)
    save_minutes: float = option(4.0, "minutes between two saved states", command.positive)
    check_steps: int = option(500, "steps between held-out checks", command.count)
    workers: int = option(1, "processes that make the data", command.threads)
    seed: int = option(7, "of the data and the first weights", command.seed)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where it computes", arguments.device)

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive; use e.g. 120")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must not be negative; use 0 to train by minutes")
        if not 0.0 <= self.fall <= 1.0:
            raise ValueError(f"fall={self.fall} is not a share of the time; use e.g. 0.25")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average={self.average} lies outside [0, 1); use e.g. 0.99, or 0 for no average")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative; use 0 to make data in the main process")
        if self.check_steps < 1:
            raise ValueError(f"check_steps={self.check_steps}: use at least 1")

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate at optimizer step `step`, a share `progress` into the budget."""
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(0.02, left(progress, self.fall))


def left(progress: float, share: float) -> float:
    """1 until the last `share` of the time, then a line down to 0."""
    return min(1.0, max(0.0, 1.0 - progress) / share) if share else 1.0


def _begin_with(model: PreTrainedModel, start: Path) -> None:
    """Give a model the weights in `start`. Raises ValueError unless they are all there, finite, and no others."""
    with checkpoints.readable_files(start):
        weights = load_file(start / "model.safetensors", device=str(model.device))
        others = model.load_state_dict(weights, strict=False).unexpected_keys
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    checkpoints.check_names(start, {"missing_keys": missing, "unexpected_keys": others})
    checkpoints.check_tensors(start, weights.items())


class Trainer(ABC):
    """Model, averaged weights, optimizers and the clock; `runs / "state.safetensors"` is where they live on disk.

    A model's own trainer says what a step is (`step_once`), what is told of it (`line`, `check`) and what else its
    folder holds (`files`).

    Args:
        optimizers: groups with a `share` get that share of the learning rate.
        start: a model folder whose weights a new training begins with.
    """

    kind = ""
    """Told in the state: a folder goes on with the training that it holds, and with no other."""

    def __init__(
        self,
        settings: Settings,
        runs: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizers: Sequence[torch.optim.Optimizer],
        start: Path | None = None,
    ) -> None:
        self.settings, self.runs, self.device = settings, runs, torch.device(settings.device)
        self.model, self.tokenizer, self.optimizers = model, tokenizer, optimizers
        self.state = runs / "state.safetensors"
        self.step, self.seconds = 0, 0.0
        if start and not self.state.exists():
            _begin_with(model, start)
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if self.state.exists():
            counters = read_counters(self.state)
            if counters.get("model") != self.kind:
                raise ValueError(
                    f"model={self.kind!r}, but {self.state} holds a {counters.get('model')!r} training; "
                    "use another --runs folder"
                )
            load_state(self.state, model, self.average, optimizers)
            with readable_files(self.state, WHAT, MEND):
                self.restore(counters)

    def counters(self) -> dict[str, Any]:
        """What else than tensors a restart needs."""
        return {"model": self.kind, "step": self.step, "seconds": self.seconds}

    def restore(self, counters: dict[str, Any]) -> None:
        """Take `counters` back."""
        self.step, self.seconds = counters["step"], counters["seconds"]

    @property
    def progress(self) -> float:
        """Share of the time budget that is used up, or of the steps where these are counted."""
        if self.settings.steps:
            return self.step / self.settings.steps
        return self.seconds / 60 / self.settings.minutes

    def autocast(self) -> AbstractContextManager:
        """bf16 on a GPU; CPUs compute it more slowly than fp32 where they lack AMX."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimizers down `loss`, and of the average after them."""
        rate = self.settings.rate_at(self.step, self.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("share", 1.0) * rate
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # What is new to the model, as longer rows are, begins with steep losses.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # Young averages forget faster: at step 0 a share of 0.998 would keep the random start for hundreds of steps.
        share = min(self.settings.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), 1 - share)

    @contextmanager
    def averaged(self) -> Iterator[PreTrainedModel]:
        """The model with its averaged weights, in eval mode."""
        self._swap()
        try:
            yield self.model.eval()
        finally:
            self.model.train()
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data, self.average[name] = self.average[name], parameter.data

    @abstractmethod
    def step_once(self) -> None:
        """Take the next batch and learn from it."""

    @abstractmethod
    def line(self) -> str:
        """What is reported of the steps since the last line."""

    def check(self) -> str:
        """What the averaged weights can do with what they have not seen; "" where that is measured elsewhere."""
        return ""

    def files(self) -> dict[str, dict[str, Any]]:
        """Further JSON files of the exported folder, by name."""
        return {}

    def save(self) -> None:
        """Write the state and export the averaged weights to `runs / "latest"`."""
        save_state(self.state, self.model, self.average, self.optimizers, self.counters())
        self.write(self.counters() | {"seed": self.settings.seed})

    def write(self, trained: dict[str, Any]) -> None:
        """Export the averaged weights to `runs / "latest"`; `trained` says how they came about."""
        export(self.model, self.average, self.tokenizer, self.runs / "latest", trained, **self.files())

    def run(self, report: int = 100) -> None:
        """Train until the time budget is used up, saving and reporting on the way."""
        clock = time.monotonic if self.device.type == "cuda" else time.thread_time
        saved = time.monotonic()
        while self.progress < 1.0:
            begin = clock()
            self.step_once()
            self.seconds += clock() - begin
            if self.step % report == 0:
                print(f"{self.seconds / 60:.2f} min step {self.step} {self.line()}", flush=True)
            if self.step % self.settings.check_steps == 0:
                self._tell(self.check())
            if time.monotonic() - saved > self.settings.save_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        self._tell(self.check())

    @staticmethod
    def _tell(line: str) -> None:
        if line:
            print(f"   {line}", flush=True)


def kept_tokenizer(runs: Path, made: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerFast:
    """The tokenizer of a training: `made` is written once, then read back, so that a restart keeps its ids."""
    folder = runs / "tokenizer"
    if made and not (folder / "tokenizer.json").exists():
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def loader(feed: IterableDataset, workers: int, ahead: int, device: torch.device) -> Iterator[Any]:
    """The batches of `feed`, dataclasses, `ahead` of them made by each worker before they are asked for."""
    there = device.type != "cpu"
    options = {"prefetch_factor": ahead, "worker_init_fn": _begun} if workers else {}
    send = _sent if workers else _whole
    for held in DataLoader(feed, batch_size=None, num_workers=workers, collate_fn=send, **options):
        batch = _received(*held) if workers else held
        yield batch.pin_memory() if there else batch


def _begun(worker: int) -> None:
    # One that waits until somebody reads its batches would wait for a trainer that has gone.
    end_with_parent()


def _whole(batch: Any) -> Any:
    return batch


def _sent(batch: Any) -> tuple[type, dict[str, Any]]:
    """A batch as arrays. Tensors would go through a thread and a folder of the worker's own, which a worker that is
    ended leaves behind."""
    return type(batch), {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in vars(batch).items()}


def _received(kind: type, held: dict[str, Any]) -> Any:
    return kind(**{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in held.items()})
