"""Train a small Llama with shared attention weights: `python -m training.masa.train --atoms 2 --text FILE`.

MASA (arXiv 2508.04581) and what it is compared with, on one text, with one budget: `--atoms S` alone is MASA,
`--coefficients sequential` or `repeat` are the sharing baselines, `--rank R` without atoms is low rank, `--kv-heads`
makes grouped queries, and none of them is the full model. Without `--text`, sentences of a small grammar. The averaged
weights are exported to `RUNS/latest`, in the form on disk of `textkv.models.atoms` where atoms are used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, PreTrainedTokenizerFast

from textkv.command import count, fraction, positive, run, text_file
from textkv.devices import check_room
from textkv.masa import Sharing, save, share
from textkv.mini import WEIGHTS
from textkv.mini.filler import sentences
from training.command import parser_of, set_threads, settings_of, text_of
from training.export import TRAINED
from training.text.shape import mini_config, started
from training.text.train import HELD_OUT, adamw
from training.trainer import Settings, Trainer, kept_tokenizer, option

GRAMMAR = 12_000  # sentences that stand in for a text


@dataclass(frozen=True, kw_only=True)
class MasaSettings(Settings):
    """Size, sharing and length of one training."""

    steps: int = option(600, "optimizer steps of the whole training")
    rate: float = option(4e-3, "highest learning rate", positive)
    warmup: int = option(50, "steps until it is reached", count)
    average: float = option(0.98, "share of the averaged weights that a step keeps", fraction)
    layers: int = option(6, "blocks of the model", count)
    hidden: int = option(96, "channels", count)
    heads: int = option(6, "query heads", count)
    kv_heads: int = option(6, "key and value heads; fewer are grouped queries", count)
    length: int = option(128, "tokens of a row", count)
    rows: int = option(16, "rows of a batch", count)
    atoms: int = option(0, "matrices that all layers share, for each projection; 0: none")
    rank: int = option(0, "rank of each layer's own weights; 0: none")
    projections: str = option("qkvo", "which projections are shared")
    coefficients: str = option("network", "network, free, sequential or repeat")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: models are compared after as many steps; use at least 1")
        if self.heads < 1 or self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} is not a multiple of twice heads={self.heads}; use e.g. 96 and 6")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.atoms > self.layers:
            raise ValueError(f"atoms={self.atoms} is more than the {self.layers} layers; use at most {self.layers}")
        if self.length < 2 or self.rows < 1:
            raise ValueError(f"length={self.length}, rows={self.rows}: use at least 2 tokens in at least one row")
        # Weights, gradients and two moments of each in float32, and the scores of a batch.
        weights = 4 * 4 * self.layers * (self.hidden**2 * 10 + self.hidden)
        asked = f"layers={self.layers} hidden={self.hidden} rows={self.rows} length={self.length}"
        check_room(self.device, weights + 4 * self.rows * self.length * self.hidden, asked)
        if self.atoms or self.rank:
            self.sharing()

    def sharing(self) -> Sharing:
        """What of it is about sharing."""
        given = {name: getattr(self, name) for name in ("atoms", "rank", "projections", "coefficients", "seed")}
        return Sharing(**given)


class MasaTrainer(Trainer):
    """Trains one model on random rows of `text`; its last tenth is held out."""

    kind = "masa"
    settings: MasaSettings

    def __init__(self, settings: MasaSettings, runs: Path, text: str | None = None) -> None:
        text = text or "".join(" " + " ".join(words) for words in sentences(GRAMMAR, seed=0))
        tokenizer = kept_tokenizer(runs, PreTrainedTokenizerFast.from_pretrained(WEIGHTS))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = int(len(ids) * (1 - HELD_OUT))
        self.ids, self.held_out = np.array(ids[:cut]), torch.tensor(ids[cut:])
        if len(self.held_out) <= settings.length:
            raise ValueError(f"the text has {len(ids)} tokens; ten rows of length={settings.length} are needed")
        self.text = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.losses: list[float] = []
        self.tick = time.monotonic()
        torch.manual_seed(settings.seed)
        model = started(_config(settings, tokenizer))
        if settings.atoms or settings.rank:
            share(model, settings.sharing())
        model.to(settings.device)
        # Atoms decay as any weight does, what makes the coefficients does not (section 7).
        optimizer = adamw(model, settings.rate, spared=lambda name: ".network." in name)
        super().__init__(settings, runs, model, tokenizer, [optimizer])

    def counters(self) -> dict[str, Any]:
        """With what must be the same when a training goes on."""
        same = ("steps", "layers", "hidden", "heads", "kv_heads", "atoms", "rank", "projections", "coefficients")
        told = {name: getattr(self.settings, name) for name in same}
        return super().counters() | {"settings": told, "text": self.text}

    def restore(self, counters: dict[str, Any]) -> None:
        """Refuses to go on with another text or other settings."""
        super().restore(counters)
        for name in ("settings", "text"):
            if counters[name] != self.counters()[name]:
                raise ValueError(f"{self.state} was begun with another {name}; use another --runs folder")

    def step_once(self) -> None:
        """Learn from rows that depend on the seed and the step alone: every method sees the same."""
        rng = np.random.default_rng([self.settings.seed, self.step])
        begins = rng.integers(len(self.ids) - self.settings.length, size=self.settings.rows)
        rows = self.ids[begins[:, None] + np.arange(self.settings.length)]
        loss = self.loss(torch.from_numpy(rows).to(self.device))
        self.update(loss)
        if self.step % 10 == 0:
            self.losses.append(loss.item())

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats of `ids` int64 [rows, length]; fp32 scalar."""
        with self.autocast():
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def line(self) -> str:
        """Loss since the last line and seconds that it took."""
        seconds, self.tick = time.monotonic() - self.tick, time.monotonic()
        loss, self.losses = float(np.mean(self.losses or [float("nan")])), []
        return f"loss {loss:.3f} in {seconds:.0f} s"

    @torch.inference_mode()
    def check(self) -> str:
        """Perplexity of the averaged weights on the first held-out rows."""
        rows = self.held_out.unfold(0, self.settings.length, self.settings.length)[:32]
        with self.averaged():
            return f"held out | perplexity {self.loss(rows.to(self.device)).exp().item():.2f}"

    def write(self, trained: dict[str, Any]) -> None:
        """As atoms where there are some."""
        if not (self.settings.atoms or self.settings.rank):
            return super().write(trained)
        with self.averaged() as model:
            save(model, self.runs / "latest", self.tokenizer, torch.float16, trained)
        (self.runs / "latest" / TRAINED).write_text(json.dumps(trained, indent=2) + "\n", encoding="utf-8")


def _config(settings: MasaSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The embedded text model's, in another size."""
    size = {
        "hidden_size": settings.hidden,
        "intermediate_size": 8 * settings.hidden // 3,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // settings.heads,
    }
    return LlamaConfig(**(mini_config(tokenizer).to_dict() | size))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser_of(MasaSettings, "training.masa.train", __doc__, "runs/masa")
    p.add_argument("--text", type=text_file, help="the text; its last tenth is held out")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.masa.train", parser(), work, argv, kept="the same command goes on from the last saved state")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Train."""
    if args.start:
        raise ValueError(f"--start {args.start}: models are compared from fresh weights; leave it out")
    set_threads(args)
    MasaTrainer(settings_of(args, MasaSettings), args.runs, text_of(args)).run()


if __name__ == "__main__":
    sys.exit(main())
