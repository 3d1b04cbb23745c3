"""Train a mini model: `python -m training.dlm.train --model llada --minutes 180`.

LLaDA and Dream learn to fill in hidden answer tokens (the prompt is never hidden), the guider to predict the next one.
Problems grow in number size and steps, each stage as soon as the one before it is solved. The averaged weights are
exported to `RUNS/latest`. `--model llada-hard` goes on with `--start dlm/mini/weights/llada`: problems of four to six
steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dlm.mini import check_kind, family_of, task_of
from dlm.mini.problems import FIRST_EVALUATION_SEED, final_answer, make_problem
from dlm.mini.words import CARRIED, DIGITS, PLAIN
from textkv.command import count, fraction, positive, run
from training.command import parser_of, set_threads, settings_of
from training.dlm.evaluate import answers
from training.dlm.feed import STAGES_OF, Batch, Feed, answer_tokens, stage_at
from training.dlm.hints import Watch, hints_of
from training.dlm.masks import hide, show_all
from training.dlm.shape import fresh_model
from training.dlm.tokenizer import build_tokenizer
from training.trainer import Settings, Trainer, kept_tokenizer, option

SOLVED = 0.8  # of the held-out problems of a stage, after which the next one begins


@dataclass(frozen=True, kw_only=True)
class DlmSettings(Settings):
    """Which of the mini models is trained, and how."""

    model: str = option("llada", "llada, dream, guider or llada-hard")
    minutes: float = option(180.0, "time budget of the whole training", positive)
    tokens: int = option(3072, "tokens per batch", count)
    rate: float = option(3e-3, "highest learning rate", positive)
    long: float = option(0.1, "share of batches with a long tail of end tokens", fraction)
    hint_weight: float = option(0.3, "what the hints count")
    check_problems: int = option(64, "held-out problems of a check", count)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.model)
        if self.check_problems < 1:
            raise ValueError(f"check_problems={self.check_problems}: use at least 1")


class DlmTrainer(Trainer):
    """Trains a mini LLaDA, Dream or guider on word problems, stage by stage."""

    settings: DlmSettings

    def __init__(self, settings: DlmSettings, runs: Path, start: Path | None = None) -> None:
        self.kind, self.stage, self.stages = settings.model, 0, STAGES_OF[task_of(settings.model)]
        tokenizer = kept_tokenizer(runs, build_tokenizer())
        torch.manual_seed(settings.seed)
        model = fresh_model(settings.model, tokenizer).to(settings.device)
        super().__init__(settings, runs, model, tokenizer, _optimizers(model, settings.rate), start)
        self.feed = Feed(tokenizer, settings.tokens, settings.seed, settings.long)
        self.guider = guider = family_of(settings.model) == "guider"
        # Row j of the logits stands for token j + shift.
        self.shift = 1 if guider else model.decoding_spec.shift
        layers = model.model.layers if guider else model.layers
        self.watch = Watch(layers[len(layers) // 2], self.shift, causal=guider)
        self.digit, self.content = self._marked(DIGITS), self._marked([*DIGITS, PLAIN, CARRIED])
        self.losses: list[torch.Tensor] = []

    def _marked(self, words: Sequence[str]) -> torch.Tensor:
        """bool [vocab]: which tokens are `words`."""
        ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(words)))
        return torch.zeros(len(self.tokenizer), dtype=torch.bool).index_fill_(0, ids, True)

    def counters(self) -> dict[str, Any]:
        """With the stage of problems that is reached."""
        return super().counters() | {"stage": self.stage}

    def restore(self, counters: dict[str, Any]) -> None:
        """Take `counters` back."""
        super().restore(counters)
        self.stage = counters["stage"]

    def learn(self, batch: Batch) -> torch.Tensor:
        """One optimizer step on a batch (on the CPU): its loss, a scalar on the model's device."""
        loss = self.loss(batch)
        self.update(loss)
        return loss.detach()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted cross entropy of the hidden (guider: of all) answer tokens, mean over the rows; fp32 scalar.

        A batch of few long rows counts less, by the square root of their number: so its gradient is no noisier than
        another's. The masks depend on the seed and the step alone, as the batches do.
        """
        # A prime factor keeps the streams of neighbouring seeds apart for a million steps.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        targets, ids = batch.ids[:, batch.prompt :], batch.ids.clone()
        if self.guider:
            hidden, weights = torch.ones_like(targets, dtype=torch.bool), show_all(*targets.shape, batch.answer)
        else:
            hidden, weights = hide(self.content[targets], batch.answer, generator)
            ids[:, batch.prompt :][hidden] = self.tokenizer.mask_token_id
        logits = self._logits(ids, batch)
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(self.device), reduction="none")
        usual = self.settings.tokens / (batch.prompt + batch.answer)
        loss = (each * weights.flatten().to(self.device)).sum() / (len(ids) * max(usual, len(ids))) ** 0.5
        hints = hints_of(batch, hidden, self.digit)
        told = self.watch.loss(hints, batch.visible) if len(hints) else 0.0
        return loss + self.settings.hint_weight * told * min(1.0, len(ids) / usual)

    def _logits(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[rows, slots behind the prompt, vocab], aligned to the slots."""
        at, length = self.device, ids.shape[1]
        # The row before a slot predicts it in a shifted model; the prompt has at least one token.
        rows = torch.arange(batch.prompt - self.shift, length - self.shift, device=at)
        inputs = {
            "input_ids": ids.to(at),
            "attention_mask": batch.visible.to(at),
            "position_ids": batch.position_ids.to(at),
        }
        with self.autocast():
            if self.guider:
                return self.model(**inputs, use_cache=False, logits_to_keep=rows).logits
            return self.model(**inputs, logits_rows=rows.expand(len(ids), -1)).logits

    def step_once(self) -> None:
        """Learn from the next batch of the stage."""
        self.stage = max(self.stage, stage_at(self.progress, self.stages))
        self.losses.append(self.learn(self.feed.batch(self.step, self.stages[self.stage])))

    def line(self) -> str:
        """Stage and mean loss since the last line."""
        # Reading the losses waits for the device, so it is done seldom.
        loss, self.losses = torch.stack(self.losses).mean().item(), []
        return f"stage {self.stage} loss {loss:.4f}"

    def solved(self, steps: int, top: int) -> float:
        """Share of exact answers of the averaged weights on held-out problems of so many steps."""
        seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + self.settings.check_problems)
        problems = [make_problem(seed, steps, top) for seed in seeds]
        with self.averaged() as model:
            texts = answers(model, self.tokenizer, problems, answer_tokens(steps))
        return sum(final_answer(t) == p.total for t, p in zip(texts, problems, strict=True)) / len(problems)

    def check(self) -> str:
        """Measure the stage's longest problems and go on to the next stage if they are solved."""
        stage = self.stages[self.stage]
        exact = self.solved(stage.steps, stage.top)
        # By the averaged weights, as they are shipped, and on problems that training never draws.
        if exact >= SOLVED and self.stage + 1 < len(self.stages):
            self.stage += 1
        return f"held out, {stage.steps} steps to {stage.top}: {100 * exact:.0f} % exact | stage {self.stage}"


def _optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head, norms and biases."""
    # Muon orthogonalises hidden matrices; its authors leave embedding and head to AdamW.
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in ends]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return parser_of(DlmSettings, "training.dlm.train", __doc__, "runs/mini_MODEL")


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.dlm.train", parser(), work, argv, kept="the same command goes on from the last saved state")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Train."""
    set_threads(args)
    settings = settings_of(args, DlmSettings)
    DlmTrainer(settings, Path(str(args.runs).replace("MODEL", settings.model)), args.start).run()


if __name__ == "__main__":
    sys.exit(main())
