"""Find out which KV heads of a model need the whole context, and write its pattern file.

    python -m textkv.methods.duo_attention identify --model FOLDER
    python -m textkv.methods.duo_attention identify --model mini --task recall --shortest 256 --longest 1024 \\
        --steps 300 --sinks 16 --recent 64

The second made the embedded text model's pattern, `duo_attention(pattern='mini')`: that model knows its own recall
tasks and no passkeys, and its prompts are so short that streaming heads must be shown a short window. `--how mean_qk`
trains nothing and looks at average queries and keys. The pattern goes beside the model as duo_attention.json, or into
the current folder if the model is no local folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textkv import checkpoints, models
from textkv.arguments import device
from textkv.command import (
    count,
    finite,
    natural,
    output_file,
    positive,
    question_count,
    run,
    seed,
    some_text,
    text_file,
    threads,
    token_count,
)
from textkv.duo.mean_qk import mean_qk_scores
from textkv.duo.passkeys import PasskeyConfig, Passkeys, Sample, recall_sample
from textkv.duo.pattern import FILE, Pattern
from textkv.duo.training import GateTraining, Progress, train_gates
from textkv.mini.rows import Rows
from textkv.mini.tasks import MIN_LENGTH
from textkv.records import read_text

TEXT_ROWS = 50
"""Rows of text that `mean_qk` averages over."""


def _is_pattern(path: Path) -> bool:
    try:
        Pattern.load(path)
    except (ValueError, OSError):
        return False
    return True


OUT = output_file(_is_pattern, "python -m textkv.methods.duo_attention")


def load_model(model: str, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer) of a name that `textkv.models.resolve` knows; text or vision-language."""
    place = models.resolve(model)
    with checkpoints.readable_files(place):
        config = AutoConfig.from_pretrained(place)
    if not hasattr(config, "vision_config"):
        return models.load(model, dtype=dtype, device=device)
    loaded = checkpoints.load_model(AutoModelForImageTextToText.from_pretrained, place, dtype=dtype)
    tokenizer = checkpoints.load_tokenizer(AutoTokenizer.from_pretrained, place, loaded)
    return loaded.to(device).eval(), tokenizer


def identify(
    model: PreTrainedModel,
    draw: Callable[[int], Sample],
    how: str,
    settings: GateTraining,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Pattern:
    """The pattern of `model` from the samples that `draw` gives per step; `how` is "distillation" or "mean_qk"."""
    name = model.config._name_or_path
    name = Path(name).name if Path(name).is_dir() else name  # a folder of one machine says nothing on another
    if how == "mean_qk":
        gates = mean_qk_scores(model, (torch.from_numpy(draw(n).ids)[None] for n in range(TEXT_ROWS)))
        return Pattern(gates, settings.sinks, settings.recent, how, name, {"rows": TEXT_ROWS})
    gates = train_gates(model, draw, settings, report)
    return Pattern(gates, settings.sinks, settings.recent, how, name, asdict(settings))


def drawer(
    task: str, tokenizer: PreTrainedTokenizerBase, config: PasskeyConfig, text: str | None, seed: int
) -> Callable[[int], Sample]:
    """Samples of `task` ("passkeys" or "recall") by step: the same for the same seed."""
    if task == "recall":
        if config.shortest < MIN_LENGTH:
            raise ValueError(f"shortest={config.shortest}: rows of recall tasks have at least {MIN_LENGTH} tokens")
        rows = Rows(tokenizer, text)
        return lambda step: _recall(rows, config, np.random.default_rng([seed, step]))
    passkeys = Passkeys(tokenizer, config, text)
    return lambda step: passkeys.sample(np.random.default_rng([seed, step]))


def _recall(rows: Rows, config: PasskeyConfig, rng: np.random.Generator) -> Sample:
    return recall_sample(rows, rng, int(rng.integers(config.shortest, config.longest + 1)))


def add_running(command: argparse.ArgumentParser) -> None:
    """The options of a command that say where and in which precision a model runs."""
    command.add_argument("--device", type=device, default="", help="cpu, cuda ... (default: a GPU where there is one)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 leaves torch's choice")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m textkv.methods.duo_attention", description="Patterns of full and streaming heads."
    )
    command = p.add_subparsers(required=True, metavar="command").add_parser(
        "identify", help="train the gates of a model and write its pattern", description=__doc__.split("\n\n")[0]
    )
    command.add_argument(
        "--model",
        type=some_text,
        required=True,
        help="mini, a name of `python -m textkv.models list`, a folder, or a hub id",
    )
    command.add_argument(
        "--out",
        type=OUT,
        help=f"pattern file; default: {FILE} beside the model",
    )
    command.add_argument("--how", choices=("distillation", "mean_qk"), default="distillation")
    command.add_argument("--task", choices=("passkeys", "recall"), default="passkeys", help="recall: the mini model's")
    command.add_argument("--text", type=text_file, help="haystack; default: sentences of a small grammar")
    command.add_argument(
        "--passkeys", type=question_count, default=PasskeyConfig.count, help="passkeys hidden in a sample"
    )
    command.add_argument("--words", type=token_count, default=PasskeyConfig.words, help="words of a passkey")
    command.add_argument(
        "--shortest", type=token_count, default=PasskeyConfig.shortest, help="shortest haystack, in tokens"
    )
    command.add_argument(
        "--longest", type=token_count, help=f"longest sample; {PasskeyConfig.longest} or what the model knows"
    )
    for name, kind in (("steps", count), ("rate", positive), ("weight", finite), ("sinks", natural), ("recent", count)):
        command.add_argument(f"--{name}", type=kind, default=getattr(GateTraining, name))
    command.add_argument("--full-branch", choices=("teacher", "student"), default=GateTraining.full_branch)
    command.add_argument("--supervise", choices=("tail", "passkeys"), default=GateTraining.supervise)
    command.add_argument("--checkpointing", action="store_true", help="less memory, a third slower")
    add_running(command)
    command.add_argument("--seed", type=seed, default=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("textkv.methods.duo_attention", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Identify, write the pattern, print its summary."""
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = GateTraining(
        steps=args.steps, rate=args.rate, weight=args.weight, sinks=args.sinks, recent=args.recent,
        full_branch=args.full_branch, supervise=args.supervise, checkpointing=args.checkpointing,
    )  # fmt: skip
    # The embedded model's own pattern is part of the package: a new one does not take its place by itself.
    folder = Path("." if args.model == "mini" else models.resolve(args.model))
    out = args.out or OUT(str((folder if folder.is_dir() else Path()) / FILE))
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype), args.device)
    known = model.config.get_text_config().max_position_embeddings
    longest = args.longest or min(PasskeyConfig.longest, known)
    config = PasskeyConfig(args.passkeys, args.words, min(args.shortest, longest), longest)
    text = read_text(args.text) if args.text else None
    pattern = _with_progress(model, drawer(args.task, tokenizer, config, text, args.seed), args.how, settings)
    pattern.save(out)
    told = ", ".join(f"{name} {value:.3f}" for name, value in pattern.summary().items())
    Console().print(
        f"{out}: gates of {tuple(pattern.gates.shape)} (layers, KV heads): {told}", soft_wrap=True, markup=False
    )


def _with_progress(model: PreTrainedModel, draw: Callable[[int], Sample], how: str, settings: GateTraining) -> Pattern:
    columns = (
        TextColumn("gates"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=settings.steps, visible=how == "distillation")

        def report(progress: Progress) -> None:
            told = f"loss {progress.distillation:.4f}, mean gate {progress.price:.3f}, {progress.open} open"
            bar.update(task, advance=1, description=told)

        return identify(model, draw, how, settings, report)
