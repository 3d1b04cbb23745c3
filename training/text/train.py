"""Train the mini text model: `python -m training.text.train --minutes 8`.

Next-token prediction on recall rows and ordinary text (`--text FILE`; without it, the small grammar's sentences), in
rows that grow from 128 to 3,072 tokens. The averaged weights are exported to `RUNS/latest`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from textkv.command import count, fraction, positive, run, text_file, threads
from textkv.mini.facts import TASKS
from textkv.mini.filler import sentences
from training.command import parser_of, set_threads, settings_of, text_of
from training.text.check import Check, right_answers
from training.text.feed import Batch, Feed, longest_at
from training.text.hints import hint_loss
from training.text.shape import fresh_model
from training.text.sinks import sink_loss
from training.text.tokenizer import build_tokenizer
from training.trainer import Settings, Trainer, kept_tokenizer, left, loader, option

HELD_OUT = 0.1  # the end of the text file, never trained on
CUDA = torch.cuda.is_available()


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """How the mini text model is trained."""

    minutes: float = option(8.0, "time budget of the whole training", positive)
    warmup: int = option(200, "steps until the highest rate is reached", count)
    workers: int = option(6 if CUDA else 1, "processes that make the data", threads)
    tokens: int = option(131_072 if CUDA else 8_192, "tokens per batch", count)
    text_weight: float = option(0.3, "what a token of ordinary text counts against one of an answer")
    hint_weight: float = option(0.2, "what the hints count")
    sink_weight: float = option(0.2, "what the sinks count")
    fade: float = option(0.1, "share of the time at the end in which hints and sinks fade", fraction)
    check_examples: int = option(64 if CUDA else 4, "held-out examples per task and length", count)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.fade <= 1.0:
            raise ValueError(f"fade={self.fade} is not a share of the time; use e.g. 0.2")

    def help_at(self, progress: float) -> float:
        """Share of the hints' and sinks' weights that is left: none at the end, so that attention ends on its own."""
        return left(progress, self.fade)


class TextTrainer(Trainer):
    """Trains the mini text model on rows of recall tasks and on `text`."""

    kind = "text"
    settings: TextSettings

    def __init__(self, settings: TextSettings, runs: Path, text: str | None = None, start: Path | None = None) -> None:
        text = text[: int(len(text) * (1 - HELD_OUT))] if text else None
        tokenizer = kept_tokenizer(runs, _tokenizer(start, text))
        torch.manual_seed(settings.seed)
        model = fresh_model(tokenizer).to(settings.device)
        super().__init__(settings, runs, model, tokenizer, [adamw(model, settings.rate)], start)
        self.feed = Feed(tokenizer, settings.tokens, settings.seed, self.step, text)
        self.feed.progress.fill_(self.progress)
        self.held_out = Check(tokenizer, settings.check_examples, self.device)
        self.meter = Meter()

    @cached_property
    def batches(self) -> Iterator[Batch]:
        """Endless batches from the step reached on."""
        return loader(self.feed, self.settings.workers, 4, self.device)

    def learn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on a batch on the model's device: (loss, logits [rows * (length - 1), vocab])."""
        ids = batch.ids.long()
        with self.autocast():
            out = self.model(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
            shown = self._shown(out.hidden_states, batch)
        logits = out.logits.flatten(0, 1)
        answers = self.loss(logits, ids[:, 1:].flatten(), batch.asks[:, 1:].flatten() > 0)
        self.update(answers + shown)
        return answers.detach(), logits.detach()

    def _shown(self, hidden: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
        """What the hints and the sinks add to the loss now."""
        settings, share = self.settings, self.settings.help_at(self.progress)
        if not share:
            return hidden[0].new_zeros(())
        hint, sink = hint_loss(self.model, hidden, batch.hints), sink_loss(self.model, hidden, batch.idle)
        return share * (settings.hint_weight * hint + settings.sink_weight * sink)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the answers plus `text_weight` times that over everything else; fp32 scalar."""
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        asked = answers.float()
        text = (each * (1 - asked)).sum() / (1 - asked).sum().clamp(min=1)
        return (each * asked).sum() / asked.sum().clamp(min=1) + self.settings.text_weight * text

    def step_once(self) -> None:
        """Learn from the next batch; its length follows the clock."""
        begin = time.monotonic()
        batch = next(self.batches).to(self.device)
        waited = time.monotonic() - begin
        loss, logits = self.learn(batch)
        self.meter.add(batch.ids.numel(), waited)
        if self.step % 10 == 0:
            # Reading a result waits for the device, so it is asked for seldom.
            self.meter.look(loss, logits, batch)
        self.feed.progress.fill_(self.progress)

    def line(self) -> str:
        """Speed, loss and recall on the training's own rows."""
        return f"length {longest_at(self.progress)} {self.meter.line()}"

    def check(self) -> str:
        """Held-out recall of the averaged weights."""
        with self.averaged() as model:
            found = self.held_out.recall(model, longest_at(min(self.progress, 1.0)))
        rows = (f"{n}: " + " ".join(f"{t} {100 * r:.0f}" for t, r in row.items()) for n, row in found.items())
        return "held out | " + " | ".join(rows)


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


def adamw(model: torch.nn.Module, rate: float, spared: Callable[[str], bool] = lambda name: False) -> torch.optim.AdamW:
    """AdamW; neither the embedding nor the norms decay, nor do parameters whose name is `spared`."""
    embedding = model.get_input_embeddings().weight
    named = dict(model.named_parameters())
    decay = [p for name, p in named.items() if p.ndim > 1 and p is not embedding and not spared(name)]
    rest = [p for name, p in named.items() if p.ndim <= 1 or p is embedding or spared(name)]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def _tokenizer(start: Path | None, text: str | None) -> PreTrainedTokenizerFast:
    """That of `start`, or a new one learned from the grammar's sentences and `text`."""
    if start:
        return PreTrainedTokenizerFast.from_pretrained(start)
    return build_tokenizer([*(" " + " ".join(words) for words in sentences(3000, seed=0)), *([text] if text else [])])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser_of(TextSettings, "training.text.train", __doc__, "runs/mini_text")
    p.add_argument("--text", type=text_file, help="ordinary text to learn as well (its last tenth is left out)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.text.train", parser(), work, argv, kept="the same command goes on from the last saved state")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Train."""
    set_threads(args)
    TextTrainer(settings_of(args, TextSettings), args.runs, text_of(args), args.start).run()


if __name__ == "__main__":
    sys.exit(main())
