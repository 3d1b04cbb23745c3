"""Train the mini GUI-agent model: `python -m training.agent.train --minutes 120`.

Plain supervised learning on drawn pages and recorded oracle episodes (collect them with `python -m
training.agent.collect`). The averaged weights are exported to `RUNS/latest`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from textkv.command import count, fraction, positive, run
from training.agent.drawn import STEP
from training.agent.feed import Feed, Mix
from training.agent.files import SYSTEM, folder_files
from training.agent.forward import answer_logits, read
from training.agent.hints import Hints
from training.agent.packing import Batch
from training.agent.place import set_place_heads
from training.agent.shape import mini_config
from training.agent.tokenizer import MAX_NUMBER, build_tokenizer
from training.agent.words import tokenizer_texts
from training.command import parser_of, set_threads, settings_of
from training.export import read_trained
from training.trainer import Settings, Trainer, kept_tokenizer, loader, option


@dataclass(frozen=True, kw_only=True)
class AgentSettings(Settings):
    """How the mini agent is trained, and on what."""

    minutes: float = option(120.0, "time budget of the whole training", positive)
    fall: float = option(0.35, "share of the time at the end in which the rate falls", fraction)
    hints: float = option(0.3, "weight of the hints' losses")
    images: int = option(Mix.images, "screenshots per batch", count)
    drawn: float = option(Mix.drawn, "share of sequences that are drawn pages", fraction)
    memory: float = option(Mix.memory, "share of sequences that are drawn memory episodes", fraction)
    rounds: float = option(Mix.rounds, "share of these that are several in a row", fraction)
    growing: float = option(Mix.growing, "share of sequences told in the chat that only grows", fraction)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mix()

    def mix(self) -> Mix:
        """How the data is composed."""
        return Mix(self.images, self.drawn, self.memory, rounds=self.rounds, growing=self.growing)


def soft_targets(
    tokenizer: PreTrainedTokenizerFast, reach: int = 2, width: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token the ids [vocab, 2 * reach + 1] and weights of its target: itself, or for a number of at least
    3 * STEP (smaller ones are also digits) a bell of `width` pixels over the numbers STEP apart.
    """
    ids = torch.arange(len(tokenizer))[:, None].repeat(1, 2 * reach + 1)
    weights = torch.zeros(ids.shape)
    weights[:, reach] = 1.0
    offsets = range(-reach * STEP, reach * STEP + 1, STEP)
    largest = MAX_NUMBER // STEP * STEP
    for number in range(3 * STEP, largest + 1, STEP):
        near = [min(max(number + offset, 0), largest) for offset in offsets]
        bell = torch.tensor([math.exp(-((offset / width) ** 2) / 2) for offset in offsets])
        token = tokenizer.convert_tokens_to_ids(str(number))
        ids[token] = torch.tensor(tokenizer.convert_tokens_to_ids([str(n) for n in near]))
        weights[token] = bell / bell.sum()
    return ids, weights


@torch.no_grad()
def fresh_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model, started for its small width.

    The library's spread of 0.02 suits thousands of channels; with 192 every layer would whisper, and naming the
    colour of a box stays at chance for hundreds of steps. So weights get 1 / sqrt(inputs). Random query and key
    biases let attention tell relative positions apart from the beginning, and the first text layer knows rows and
    columns.
    """
    model = Qwen2_5_VLForConditionalGeneration(mini_config(tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for number, layer in enumerate(model.model.language_model.layers):
        if number:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias, std=2.0)
            torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=2.0)
    torch.nn.init.normal_(model.model.language_model.layers[0].self_attn.q_proj.weight, std=0.02)
    torch.nn.init.normal_(model.model.language_model.layers[0].self_attn.k_proj.weight, std=0.02)
    set_place_heads(model)
    return model


class Meter:
    """Right answers per task and mean loss since the last report; a coordinate counts as right within the soft
    target's reach.
    """

    def __init__(self, neighbours: torch.Tensor) -> None:
        self.neighbours = neighbours
        self.hits: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.losses: list[float] = []

    def add(self, batch: Batch, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> None:
        """Count one batch; an answer is right if each of its tokens is the target or a neighbour of it."""
        self.losses.append(float(loss))
        right = (logits.argmax(-1)[:, None] == self.neighbours[targets]).any(1).tolist()
        at = 0
        for task, length in batch.answers:
            self.hits[task][0] += all(right[at : at + length])
            self.hits[task][1] += 1
            at += length

    def line(self) -> str:
        """Loss and percent right by task since the last line; starts again from nothing."""
        loss = sum(self.losses) / max(len(self.losses), 1)
        tasks = " ".join(f"{task}:{100 * hit / total:.0f}" for task, (hit, total) in sorted(self.hits.items()))
        self.hits.clear()
        self.losses.clear()
        return f"loss {loss:.3f} | {tasks}"


class AgentTrainer(Trainer):
    """Trains the mini agent on drawn pages and on the episodes recorded in `runs / "episodes"`."""

    kind = "agent"
    settings: AgentSettings

    def __init__(self, settings: AgentSettings, runs: Path, start: Path | None = None) -> None:
        tokenizer = kept_tokenizer(
            runs, PreTrainedTokenizerFast.from_pretrained(start) if start else build_tokenizer(tokenizer_texts())
        )
        torch.manual_seed(settings.seed)
        model = fresh_model(tokenizer).to(settings.device)
        optimizers = _optimizers(dict(model.named_parameters()), settings.rate)
        self.before = _trained(start)
        super().__init__(settings, runs, model, tokenizer, optimizers, start)
        self.hints = Hints(model.config.text_config.hidden_size).to(self.device)
        self.hints_optimizer = torch.optim.Adam(self.hints.parameters(), lr=3e-3)
        self.neighbours, self.spread = (table.to(self.device) for table in soft_targets(tokenizer))
        self.meter = Meter(self.neighbours)

    @cached_property
    def batches(self) -> Iterator[Batch]:
        """Endless batches; a restart draws others than those that it has learned from."""
        seed, workers = self.settings.seed + self.step, self.settings.workers
        feed = Feed(self.tokenizer, SYSTEM, self.settings.mix(), self.runs / "episodes", seed)
        return loader(feed, workers, 8, self.device)

    def learn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step; returns logits, targets and the loss (a scalar)."""
        with self.autocast():
            out = read(self.model, batch)
            logits, targets = answer_logits(self.model, batch, out)
            loss = self.loss(logits, targets)
            hints = self.hints(batch, out, self.model.config.image_token_id)
        self.hints_optimizer.zero_grad(set_to_none=True)
        self.update(loss + self.settings.hints * hints)
        self.hints_optimizer.step()
        return logits.detach(), targets, loss.detach()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy; a coordinate's target is spread over its neighbours, because a near miss is nearly right."""
        scores = F.log_softmax(logits, dim=-1)
        near = self.neighbours[targets]
        return -(scores.gather(1, near) * self.spread[targets]).sum(1).mean()

    def step_once(self) -> None:
        """Learn from the next batch."""
        batch = next(self.batches).map(lambda tensor: tensor.to(self.device, non_blocking=True))
        out = self.learn(batch)
        # Counting waits for the device, so a fast one is asked less often.
        if self.device.type == "cpu" or self.step % 10 == 0:
            self.meter.add(batch, *out)

    def line(self) -> str:
        """Loss and right answers by task."""
        return self.meter.line()

    def counters(self) -> dict[str, Any]:
        """With what the weights that it began with had been trained before."""
        return super().counters() | {"before": self.before}

    def restore(self, counters: dict[str, Any]) -> None:
        """Take `counters` back."""
        super().restore(counters)
        self.before = counters["before"]

    def files(self) -> dict[str, dict[str, Any]]:
        """The processor's, the agent's and the generation's settings."""
        return folder_files(self.tokenizer, "persistent" if self.settings.growing else "fresh")


def _optimizers(names: dict[str, torch.nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest; each group has its `share` of the learning rate.

    The merger learns slowly and decays fast: every layer normalises what it reads, so nothing else keeps visual tokens
    from growing until the text layers cannot add to them any more.
    """
    merger = [n for n in names if ".merger.mlp." in n]
    matrices = [n for n, p in names.items() if n not in merger and p.ndim == 2 and "embed" not in n]
    rest = [n for n in names if n not in merger and n not in matrices]
    muon = [{"params": [names[n] for n in matrices], "share": 1.0}]
    adam = [
        {"params": [names[n] for n in rest], "share": 1.0, "weight_decay": 0.0},
        {"params": [names[n] for n in merger], "share": 0.3, "weight_decay": 1.0},
    ]
    return [
        torch.optim.Muon(muon, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=rate, betas=(0.9, 0.98)),
    ]


def _trained(start: Path | None) -> dict[str, float]:
    """Steps and seconds that the weights in `start` have seen, which the README of the weights tells."""
    told = read_trained(start) if start else {"step": 0, "seconds": 0.0}
    before = told.get("before", {"step": 0, "seconds": 0.0})
    return {name: told[name] + before[name] for name in before}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return parser_of(AgentSettings, "training.agent.train", __doc__, "runs/mini")


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.agent.train", parser(), work, argv, kept="the same command goes on from the last saved state")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Train."""
    set_threads(args)
    AgentTrainer(settings_of(args, AgentSettings), args.runs, args.start).run()


if __name__ == "__main__":
    sys.exit(main())
