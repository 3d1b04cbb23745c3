"""Train a mini model: `python -m dlm.mini.train --model llada --minutes 180 --runs runs/mini_llada`.

LLaDA and Dream learn to fill in hidden answer tokens (the prompt is never hidden), the guider to predict the next one.
Muon for the matrices and AdamW for the rest, warm-up, plateau and a linear fall within the time budget; problems grow
in number size and steps, each stage as soon as the one before it is solved. The state is saved every few minutes and a
second start goes on from it. The averaged weights are exported to `RUNS/latest`. On a GPU it computes in bf16 with
fp32 weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from dlm.mini.checkpoint import export, load_state, read_counters, save_state
from dlm.mini.evaluate import answers
from dlm.mini.feed import STAGES, Batch, Feed, answer_tokens, stage_at
from dlm.mini.hints import Watch, hints_of
from dlm.mini.masks import hide, show_all
from dlm.mini.problems import FIRST_EVALUATION_SEED, final_answer, make_problem
from dlm.mini.shape import KINDS, check_kind, fresh_model
from dlm.mini.tokenizer import build_tokenizer
from dlm.mini.words import CARRIED, DIGITS, PLAIN

SOLVED = 0.8  # of the held-out problems of a stage, after which the next one begins


@dataclass(frozen=True)
class TrainConfig:
    """Kind of model, length and step size of the training; `minutes` counts time in the loop over all restarts,
    `tokens` is the size of a batch, `long` the share of batches with a long tail of end tokens, `hint_weight` what
    the hints count.
    """

    model: str = "llada"
    minutes: float = 180.0
    tokens: int = 3072
    rate: float = 3e-3
    warmup: int = 100
    fall: float = 0.3
    average: float = 0.998
    long: float = 0.1
    hint_weight: float = 0.3
    save_minutes: float = 4.0
    check_steps: int = 500
    check_problems: int = 64
    seed: int = 7
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_kind(self.model)
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive; use e.g. 180")
        if not 0.0 <= self.fall <= 1.0:
            raise ValueError(f"fall={self.fall} is not a share of the time; use e.g. 0.3")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average={self.average} does not make an average; use e.g. 0.998")
        if self.check_problems < 1 or self.check_steps < 1:
            raise ValueError(
                f"check_problems={self.check_problems} every check_steps={self.check_steps}: use at least 1 of each"
            )

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate at optimizer step `step`, a share `progress` into the budget."""
        falling = min(1.0, max(0.0, 1.0 - progress) / self.fall) if self.fall else 1.0
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(0.02, falling)


class Trainer:
    """Model, averaged model, optimizers, stage and clock; `runs / state.safetensors` is where they live on disk."""

    def __init__(self, config: TrainConfig, runs: Path) -> None:
        self.config, self.runs, self.device = config, runs, torch.device(config.device)
        self.state = runs / "state.safetensors"
        self.tokenizer = _tokenizer(runs / "tokenizer")
        self.feed = Feed(self.tokenizer, config.tokens, config.seed, config.long)
        torch.manual_seed(config.seed)
        self.model = fresh_model(config.model, self.tokenizer).to(self.device)
        # An exponential average answers better than the weights of the last step at a high rate.
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = _optimizers(self.model, config.rate)
        # Row j of the logits stands for token j + shift.
        self.shift = self.model.decoding_spec.shift if config.model != "guider" else 1
        content = self.tokenizer.convert_tokens_to_ids([*DIGITS, PLAIN, CARRIED])
        self.digit = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        self.digit[self.tokenizer.convert_tokens_to_ids(list(DIGITS))] = True
        layers = self.model.model.layers if config.model == "guider" else self.model.layers
        self.watch = Watch(layers[len(layers) // 2], self.shift, causal=config.model == "guider")
        self.content = torch.zeros(len(self.tokenizer), dtype=torch.bool).index_fill_(0, torch.tensor(content), True)
        self.step, self.seconds, self.stage = 0, 0.0, 0
        if self.state.exists():
            self._load()

    def _load(self) -> None:
        counters = read_counters(self.state)
        if counters["model"] != self.config.model:
            raise ValueError(
                f"model={self.config.model!r}, but {self.state} holds a {counters['model']!r} training; "
                "use another --runs folder"
            )
        load_state(self.state, self.model, self.average, self.optimizers)
        self.step, self.seconds, self.stage = counters["step"], counters["seconds"], counters["stage"]

    @property
    def progress(self) -> float:
        """Share of the time budget that is used up."""
        return self.seconds / 60 / self.config.minutes

    def learn(self, batch: Batch) -> torch.Tensor:
        """One optimizer step on a batch (on the CPU): its loss, a scalar on the model's device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.rate_at(self.step, self.progress)
        loss = self.loss(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # A stage's first batches are harder than anything before them.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # Young averages forget faster: at step 0 a decay of 0.998 would keep the random start for hundreds of steps.
        share = min(self.config.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - share)
        return loss.detach()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted cross entropy of the hidden (guider: of all) answer tokens, mean over the rows; fp32 scalar.

        A batch of few long rows counts less, by the square root of their number: so its gradient is no noisier than
        another's. The masks depend on the seed and the step alone, as the batches do.
        """
        # A prime factor keeps the streams of neighbouring seeds apart for a million steps.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        targets, ids = batch.ids[:, batch.prompt :], batch.ids.clone()
        if self.config.model == "guider":
            hidden, weights = torch.ones_like(targets, dtype=torch.bool), show_all(*targets.shape, batch.answer)
        else:
            hidden, weights = hide(self.content[targets], batch.answer, generator)
            ids[:, batch.prompt :][hidden] = self.tokenizer.mask_token_id
        logits = self._logits(ids, batch)
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(self.device), reduction="none")
        usual = self.config.tokens / (batch.prompt + batch.answer)
        loss = (each * weights.flatten().to(self.device)).sum() / (len(ids) * max(usual, len(ids))) ** 0.5
        hints = hints_of(batch, hidden, self.digit)
        told = self.watch.loss(hints, batch.visible) if len(hints) else 0.0
        return loss + self.config.hint_weight * told * min(1.0, len(ids) / usual)

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
        # CPUs compute bf16 more slowly than fp32 where they lack AMX.
        with torch.autocast(at.type, torch.bfloat16, enabled=at.type == "cuda"):
            if self.config.model == "guider":
                return self.model(**inputs, use_cache=False, logits_to_keep=rows).logits
            return self.model(**inputs, logits_rows=rows.expand(len(ids), -1)).logits

    def save(self) -> None:
        """Write the state and export the averaged weights."""
        counters = {"model": self.config.model, "step": self.step, "seconds": self.seconds, "stage": self.stage}
        save_state(self.state, self.model, self.average, self.optimizers, counters)
        export(self.average, self.tokenizer, self.runs / "latest", counters | {"seed": self.config.seed})

    def check(self, steps: int, top: int) -> float:
        """Share of exact answers of the averaged weights on held-out problems of so many steps."""
        seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + self.config.check_problems)
        problems = [make_problem(seed, steps, top) for seed in seeds]
        texts = answers(self.average, self.tokenizer, problems, answer_tokens(steps))
        return sum(final_answer(t) == p.total for t, p in zip(texts, problems, strict=True)) / len(problems)

    def advance(self) -> str:
        """Measure the stage's longest problems and go on to the next stage if they are solved; one line of report."""
        stage = STAGES[self.stage]
        exact = self.check(stage.steps, stage.top)
        # By the averaged weights, as they are shipped, and on problems that training never draws.
        if exact >= SOLVED and self.stage + 1 < len(STAGES):
            self.stage += 1
        return f"   held out, {stage.steps} steps to {stage.top}: {100 * exact:.0f} % exact | stage {self.stage}"

    def run(self, report: int = 100) -> None:
        """Train until the time budget is used up, saving and reporting on the way."""
        config, saved, tick, losses = self.config, time.monotonic(), time.monotonic(), []
        while self.progress < 1.0:
            begin = time.monotonic()
            self.stage = max(self.stage, stage_at(self.progress))
            losses.append(self.learn(self.feed.batch(self.step, STAGES[self.stage])))
            if self.step % report == 0:
                # Reading the losses waits for the device, so it is done seldom.
                loss, speed = torch.stack(losses).mean().item(), (time.monotonic() - tick) / len(losses)
                where = f"{self.seconds / 60:.2f} min step {self.step} stage {self.stage}"
                print(f"{where} loss {loss:.4f} {speed:.3f} s/step", flush=True)
                losses = []
            if self.step % config.check_steps == 0:
                print(self.advance(), flush=True)
            self.seconds += time.monotonic() - begin
            if time.monotonic() - saved > config.save_minutes * 60:
                self.save()
                saved = time.monotonic()
            if not losses:
                tick = time.monotonic()
        self.save()
        print(self.advance(), flush=True)


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


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of this run: built once, then read back, so that a restart keeps its ids."""
    if not (folder / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m dlm.mini.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=KINDS, default="llada")
    parser.add_argument("--minutes", type=float, default=TrainConfig.minutes, help="time budget of the whole training")
    parser.add_argument("--runs", type=Path, help="folder of state and exported weights; default runs/mini_MODEL")
    parser.add_argument("--tokens", type=int, default=TrainConfig.tokens, help="tokens per batch")
    parser.add_argument("--rate", type=float, default=TrainConfig.rate, help="highest learning rate")
    parser.add_argument("--long", type=float, default=TrainConfig.long, help="share of batches with a long tail")
    parser.add_argument("--save-minutes", type=float, default=TrainConfig.save_minutes)
    parser.add_argument("--check-steps", type=int, default=TrainConfig.check_steps, help="steps between checks")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = {field.name for field in fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in vars(args).items() if name in names})
    Trainer(config, args.runs or Path(f"runs/mini_{args.model}")).run()


if __name__ == "__main__":
    main()
