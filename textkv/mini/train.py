"""Train the mini text model: `python -m textkv.mini.train --minutes 8`.

Next-token prediction on recall rows and ordinary text (`--text FILE`; without it, the small grammar's sentences):
AdamW, warm-up, plateau and a linear fall within the time budget, rows that grow from 128 to 3,072 tokens. The state
is saved every few minutes and a second start goes on from it. The averaged weights are exported to `RUNS/latest`.
On a GPU it computes in bf16 with fp32 weights.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from textkv.mini.check import Check, right_answers
from textkv.mini.checkpoint import export, load_state, save_state
from textkv.mini.facts import TASKS
from textkv.mini.feed import Batch, Feed, longest_at
from textkv.mini.filler import sentences
from textkv.mini.hints import hint_loss
from textkv.mini.shape import fresh_model
from textkv.mini.sinks import sink_loss
from textkv.mini.tokenizer import build_tokenizer

HELD_OUT = 0.1  # the end of the text file, never trained on


@dataclass(frozen=True)
class TrainConfig:
    """Length and step size of the training; `minutes` counts time in the loop over all restarts (on a CPU, what this
    process got of it: other work on the machine makes a training slower, not shorter), `tokens` is the size of a
    batch, `text_weight` what a token of ordinary text counts against one of an answer, `hint_weight` and `sink_weight`
    what the hints and the sinks count until they fade over the last `fade` of the time.
    """

    minutes: float = 8.0
    tokens: int = 131_072
    rate: float = 2e-3
    warmup: int = 200
    fall: float = 0.3
    average: float = 0.998
    text_weight: float = 0.3
    hint_weight: float = 0.2
    sink_weight: float = 0.2
    fade: float = 0.1
    save_minutes: float = 3.0
    check_steps: int = 500
    check_examples: int = 64
    seed: int = 7
    workers: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive; use e.g. 8")
        for name, share in (("fall", self.fall), ("fade", self.fade)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}={share} is not a share of the time; use e.g. 0.2")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average={self.average} lies outside [0, 1); use e.g. 0.99, or 0 for no average")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative; use 0 to make data in the main process")

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate at optimizer step `step`, a share `progress` into the budget."""
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(0.02, _left(progress, self.fall))

    def help_at(self, progress: float) -> float:
        """Share of the hints' and sinks' weights that is left: none at the end, so that attention ends on its own."""
        return _left(progress, self.fade)


def _left(progress: float, share: float) -> float:
    """1 until the last `share` of the time, then a line down to 0."""
    return min(1.0, max(0.0, 1.0 - progress) / share) if share else 1.0


class Trainer:
    """Model, averaged weights, optimizer and the clock; `runs / state.safetensors` is where they live on disk.
    `start` = a model folder whose weights a new training begins with.
    """

    def __init__(self, config: TrainConfig, runs: Path, text: str | None = None, start: Path | None = None) -> None:
        self.config, self.runs, self.device = config, runs, torch.device(config.device)
        self.state = runs / "state.safetensors"
        self.text = text[: int(len(text) * (1 - HELD_OUT))] if text else None
        self.tokenizer = _tokenizer(runs / "tokenizer", start, self.text)
        torch.manual_seed(config.seed)
        self.model = fresh_model(self.tokenizer).to(self.device)
        if start and not self.state.exists():
            weights = load_file(start / "model.safetensors", device=config.device)
            self.model.load_state_dict(weights, strict=False)
        names = dict(self.model.named_parameters())
        decay = [p for p in names.values() if p.ndim > 1 and p is not self.model.get_input_embeddings().weight]
        rest = [p for p in names.values() if all(p is not other for other in decay)]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.98), fused=True)
        self.average = {n: p.detach().clone() for n, p in names.items()}
        self.step, self.seconds = 0, 0.0
        if self.state.exists():
            counters = load_state(self.state, self.model, self.average, self.optimizer)
            self.step, self.seconds = int(counters["step"]), counters["seconds"]

    @property
    def progress(self) -> float:
        """Share of the time budget that is used up."""
        return self.seconds / 60 / self.config.minutes

    def learn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on a batch on the model's device: (loss, logits [rows * (length - 1), vocab])."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(self.step, self.progress)
        ids = batch.ids.long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.model(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
            shown = self._shown(out.hidden_states, batch)
        logits = out.logits.flatten(0, 1)
        answers = self.loss(logits, ids[:, 1:].flatten(), batch.asks[:, 1:].flatten() > 0)
        loss = answers + shown
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        share = min(self.config.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), 1 - share)
        return answers.detach(), logits.detach()

    def _shown(self, hidden: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
        """What the hints and the sinks add to the loss now."""
        config, left = self.config, self.config.help_at(self.progress)
        if not left:
            return hidden[0].new_zeros(())
        hint, sink = hint_loss(self.model, hidden, batch.hints), sink_loss(self.model, hidden, batch.idle)
        return left * (config.hint_weight * hint + config.sink_weight * sink)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the answers plus `text_weight` times that over everything else; fp32 scalar."""
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        asked = answers.float()
        text = (each * (1 - asked)).sum() / (1 - asked).sum().clamp(min=1)
        return (each * asked).sum() / asked.sum().clamp(min=1) + self.config.text_weight * text

    def save(self) -> None:
        """Write the state and export the averaged weights."""
        counters = {"step": self.step, "seconds": self.seconds}
        save_state(self.state, self.model, self.average, self.optimizer, counters)
        export(self.model, self.average, self.tokenizer, self.runs / "latest")

    def check(self, check: Check, longest: int) -> str:
        """One line of held-out recall of the averaged weights."""
        self.model.eval()
        found = check.recall(Averaged(self.model, self.average), longest)
        self.model.train()
        rows = (f"{n}: " + " ".join(f"{t} {100 * r:.0f}" for t, r in row.items()) for n, row in found.items())
        return "   held out | " + " | ".join(rows)

    def run(self, report: int = 100) -> None:
        """Train until the time budget is used up, saving and reporting on the way."""
        config, cuda = self.config, self.device.type == "cuda"
        clock = time.monotonic if cuda else time.thread_time
        feed = Feed(self.tokenizer, config.tokens, config.seed, self.step, self.text)
        feed.progress.fill_(self.progress)
        workers = {"num_workers": config.workers, "prefetch_factor": 4 if config.workers else None, "pin_memory": cuda}
        loader = iter(DataLoader(feed, batch_size=None, **workers))
        check = Check(self.tokenizer, config.check_examples, self.device)
        meter, saved = Meter(), time.monotonic()
        while self.progress < 1.0:
            begin, start = clock(), time.monotonic()
            batch = next(loader).to(self.device)
            waited = time.monotonic() - start
            loss, logits = self.learn(batch)
            meter.add(batch.ids.numel(), waited)
            if self.step % 10 == 0:
                # Reading a result waits for the device, so it is asked for seldom.
                meter.look(loss, logits, batch)
            self.seconds += clock() - begin
            feed.progress.fill_(self.progress)
            if self.step % report == 0:
                where = f"{self.seconds / 60:.2f} min step {self.step} length {longest_at(self.progress)}"
                print(where, meter.line(), flush=True)
            if self.step % config.check_steps == 0:
                print(self.check(check, longest_at(self.progress)), flush=True)
            if time.monotonic() - saved > config.save_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        print(self.check(check, longest_at(1.0)), flush=True)


class Averaged:
    """Calls the model with its averaged weights."""

    def __init__(self, model: torch.nn.Module, average: dict[str, torch.Tensor]) -> None:
        self._model, self._average = model, average

    def __call__(self, **inputs: object) -> object:
        return torch.func.functional_call(self._model, self._average, (), inputs)


class Meter:
    """Speed, loss and exact recall per task on the training's own rows since the last line."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.tokens, self.waited, self.tick = 0, 0.0, time.monotonic()
        self.losses: list[float] = []
        self.hits = torch.zeros(len(TASKS), 2)

    def add(self, tokens: int, waited: float) -> None:
        """Count the tokens of a step and the seconds that it waited for them."""
        self.tokens += tokens
        self.waited += waited

    def look(self, loss: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
        """Count loss and right answers by task; reads from the device, so not at every step."""
        targets, asks = batch.ids[:, 1:].flatten(), batch.asks[:, 1:].flatten()
        right = right_answers(logits, targets, asks, len(batch.tasks))
        for task in range(len(TASKS)):
            mine = right[batch.tasks == task]
            self.hits[task] += torch.tensor([mine.sum().item(), len(mine)])
        self.losses.append(loss.item())

    def line(self) -> str:
        """Speed, loss and percent right by task since the last line; starts again from nothing."""
        seconds = time.monotonic() - self.tick
        loss = sum(self.losses) / max(len(self.losses), 1)
        tasks = " ".join(f"{t} {100 * h / max(n, 1):.0f}" for t, (h, n) in zip(TASKS, self.hits.tolist(), strict=True))
        speed = f"{self.tokens / seconds:,.0f} tokens/s (waiting for data {self.waited / seconds:.0%})"
        self._reset()
        return f"{speed} loss {loss:.3f} | {tasks}"


def _tokenizer(folder: Path, start: Path | None, text: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of this run: built once (or that of `start`), then read back, so that a restart keeps its ids."""
    if not (folder / "tokenizer.json").exists():
        texts = [*(" " + " ".join(words) for words in sentences(3000, seed=0)), *([text] if text else [])]
        made = PreTrainedTokenizerFast.from_pretrained(start) if start else build_tokenizer(texts)
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m textkv.mini.train", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/mini_text"), help="folder of state and exported weights"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of the whole training")
    parser.add_argument("--tokens", type=int, help="tokens per batch; 131,072 on a GPU, 8,192 on a CPU")
    parser.add_argument("--rate", type=float, default=TrainConfig.rate, help="highest learning rate")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--workers", type=int, default=6 if cuda else 1, help="processes that make the data")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--text", type=Path, help="ordinary text to learn as well (its last tenth is left out)")
    parser.add_argument("--start", type=Path, help="model folder to begin a new training with")
    parser.add_argument(
        "--average", type=float, default=TrainConfig.average, help="share of the averaged weights that a step keeps"
    )
    parser.add_argument("--save-minutes", type=float, default=TrainConfig.save_minutes)
    parser.add_argument(
        "--check-steps", type=int, default=TrainConfig.check_steps, help="steps between held-out checks"
    )
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = args.device.startswith("cuda")
    config = TrainConfig(
        minutes=args.minutes,
        tokens=args.tokens or (131_072 if gpu else 8_192),
        rate=args.rate,
        average=args.average,
        save_minutes=args.save_minutes,
        check_steps=args.check_steps,
        check_examples=64 if gpu else 4,
        seed=args.seed,
        workers=args.workers,
        device=args.device,
    )
    Trainer(config, args.runs, args.text.read_text(encoding="utf-8") if args.text else None, args.start).run()


if __name__ == "__main__":
    main()
