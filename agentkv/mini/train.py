"""Train the mini GUI-agent model: `python -m agentkv.mini.train --minutes 120`.

Plain supervised learning on drawn pages and recorded oracle episodes (collect them with `python -m
agentkv.mini.collect`), Muon and AdamW, constant rate with a warm-up and a linear fall at the end of the time budget.
The state is saved every few minutes and a second start goes on from it. The averaged weights are what is exported. On
a GPU it computes in bf16 with fp32 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from agentkv.mini.checkpoint import load_state, save_state
from agentkv.mini.drawn import STEP
from agentkv.mini.export import SYSTEM, export
from agentkv.mini.feed import Feed, Mix
from agentkv.mini.forward import answer_logits, read
from agentkv.mini.hints import Hints
from agentkv.mini.packing import Batch
from agentkv.mini.place import set_place_heads
from agentkv.mini.shape import mini_config
from agentkv.mini.tokenizer import MAX_NUMBER, build_tokenizer
from agentkv.mini.words import tokenizer_texts


@dataclass(frozen=True)
class TrainConfig:
    """Length and step size of the training; `minutes` counts time in the loop over all restarts."""

    minutes: float = 120.0
    rate: float = 2e-3
    warmup: int = 100
    fall: float = 0.35
    average: float = 0.998
    save_minutes: float = 4.0
    hints: float = 0.3
    seed: int = 7
    workers: int = 1
    threads: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive; use e.g. 120")
        if not 0.0 <= self.fall <= 1.0:
            raise ValueError(f"fall={self.fall} is not a share of the time; use e.g. 0.25")

    def rate_at(self, step: int, minutes: float) -> float:
        """Learning rate at optimizer step `step`, `minutes` into the budget: warm-up, plateau, linear fall to 2 %."""
        warm = min(1.0, (step + 1) / self.warmup)
        left = max(0.0, 1.0 - minutes / self.minutes)
        return self.rate * warm * max(0.02, min(1.0, left / self.fall if self.fall else 1.0))


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


def free_threads(own: int) -> int:
    """Cores that nobody but the `own` threads of this process keeps busy, by the load average; at least 1.

    Two threads wait for each other at every operation, so on a crowded machine one is faster than two.
    """
    cores = os.cpu_count() or 1
    others = max(0.0, os.getloadavg()[0] - own)
    return max(1, min(cores, round(cores - others)))


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
        for task, count in batch.answers:
            self.hits[task][0] += all(right[at : at + count])
            self.hits[task][1] += 1
            at += count

    def line(self) -> str:
        """Loss and percent right by task since the last line; starts again from nothing."""
        loss = sum(self.losses) / max(len(self.losses), 1)
        tasks = " ".join(f"{task}:{100 * hit / total:.0f}" for task, (hit, total) in sorted(self.hits.items()))
        self.hits.clear()
        self.losses.clear()
        return f"loss {loss:.3f} | {tasks}"


class Trainer:
    """Model, averaged weights, optimizer and the clock; `state` is where they live on disk. `start` = a model folder
    whose weights a new training begins with.
    """

    def __init__(self, config: TrainConfig, runs: Path, start: Path | None = None) -> None:
        self.config, self.state, self.device = config, runs / "state.safetensors", torch.device(config.device)
        self.tokenizer = _tokenizer(runs / "tokenizer", start)
        torch.manual_seed(config.seed)
        self.model = fresh_model(self.tokenizer).to(self.device)
        if start and not self.state.exists():
            weights = load_file(start / "model.safetensors", device=config.device)
            self.model.load_state_dict(weights, strict=False)
        self.hints = Hints(self.model.config.text_config.hidden_size).to(self.device)
        self.hints_optimizer = torch.optim.Adam(self.hints.parameters(), lr=3e-3)
        names = dict(self.model.named_parameters())
        self.optimizers = _optimizers(names, config.rate)
        self.average = {n: p.detach().clone() for n, p in names.items()}
        self.neighbours, self.spread = (table.to(self.device) for table in soft_targets(self.tokenizer))
        self.step, self.seconds = 0, 0.0
        self.before = json.loads((start / "agent.json").read_text())["trained"] if start else {"step": 0, "seconds": 0}
        if self.state.exists():
            scalars = load_state(self.state, self.model, self.average, self.optimizers)
            self.step, self.seconds = scalars["step"], scalars["seconds"]

    def learn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step; returns logits, targets and the loss (a scalar)."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * self.config.rate_at(self.step, self.seconds / 60)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out = read(self.model, batch)
            logits, targets = answer_logits(self.model, batch, out)
            loss = self.loss(logits, targets)
            hints = self.hints(batch, out, self.model.config.image_token_id)
        for optimizer in (*self.optimizers, self.hints_optimizer):
            optimizer.zero_grad(set_to_none=True)
        (loss + self.config.hints * hints).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in (*self.optimizers, self.hints_optimizer):
            optimizer.step()
        self.step += 1
        share = min(self.config.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), 1 - share)
        return logits.detach(), targets, loss.detach()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy; a coordinate's target is spread over its neighbours, because a near miss is nearly right."""
        scores = F.log_softmax(logits, dim=-1)
        near = self.neighbours[targets]
        return -(scores.gather(1, near) * self.spread[targets]).sum(1).mean()

    def save(self) -> None:
        """Write the state to go on from, and the averaged weights as a model."""
        scalars = {"step": self.step, "seconds": self.seconds}
        save_state(self.state, self.model, self.average, self.optimizers, scalars)
        total = {name: value + self.before[name] for name, value in scalars.items()}
        export(self.model, self.average, self.tokenizer, self.state.parent / "latest", total)

    def run(self, feed: Feed, report: int = 100) -> None:
        """Train until the time budget is used up, saving and reporting on the way."""
        there = self.device.type != "cpu"
        workers = {"num_workers": self.config.workers, "prefetch_factor": 8, "pin_memory": there}
        loader = iter(DataLoader(feed, batch_size=None, **workers))
        meter, images, tick, saved = Meter(self.neighbours), 0, time.monotonic(), time.monotonic()
        while self.seconds < self.config.minutes * 60:
            start = time.monotonic()
            batch = next(loader).map(lambda tensor: tensor.to(self.device, non_blocking=True))
            out = self.learn(batch)
            if not there or self.step % 10 == 0:
                # Counting waits for the device, so a fast one is asked less often.
                meter.add(batch, *out)
            images += len(batch.images)
            self.seconds += time.monotonic() - start
            if self.step % report == 0:
                speed = images / (time.monotonic() - tick)
                print(f"{self.seconds / 60:.1f} min step {self.step} {speed:.0f} img/s {meter.line()}", flush=True)
                images, tick = 0, time.monotonic()
                if not there and not self.config.threads:
                    torch.set_num_threads(free_threads(torch.get_num_threads()))
            if time.monotonic() - saved > self.config.save_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()


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


def _tokenizer(folder: Path, start: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer of this run: built once (or that of `start`), then read back, so that a restart keeps its ids."""
    if not (folder / "tokenizer.json").exists():
        made = PreTrainedTokenizerFast.from_pretrained(start) if start else build_tokenizer(tokenizer_texts())
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m agentkv.mini.train", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/mini"), help="folder of state, log and recorded episodes"
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="time budget of the whole training")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the plateau")
    parser.add_argument("--images", type=int, default=12, help="screenshots per batch")
    parser.add_argument("--drawn", type=float, default=0.4, help="share of sequences that are drawn pages")
    parser.add_argument("--memory", type=float, default=0.3, help="share of sequences that are drawn memory episodes")
    parser.add_argument(
        "--threads", type=int, default=0, help="0 = those that other work leaves free, checked on the way"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that draw and pack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="model folder to begin with instead of random weights")
    parser.add_argument("--hints", type=float, default=0.3, help="weight of the hints' losses")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or free_threads(0))
    names = {field.name for field in fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in vars(args).items() if name in names})
    trainer = Trainer(config, args.runs, args.start)
    mix = Mix(images=args.images, drawn=args.drawn, memory=args.memory)
    print(
        json.dumps({"step": trainer.step, "minutes_used": trainer.seconds / 60, **vars(mix)}, default=str), flush=True
    )
    trainer.run(Feed(trainer.tokenizer, SYSTEM, mix, args.runs / "episodes", args.seed + trainer.step))


if __name__ == "__main__":
    main()
