"""The arguments of the training commands: one option for each setting, `--runs`, `--start` and `--threads`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

import torch

from textkv import command
from textkv.records import read_text
from training.trainer import Settings

S = TypeVar("S", bound=Settings)
KINDS = {int: command.natural, float: command.weight, str: command.some_text}
"""The type of an option by that of its default, where the setting names none."""


def parser_of(settings: type[Settings], prog: str, doc: str, runs: str) -> argparse.ArgumentParser:
    """The parser of a training command."""
    p = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n\n")[0])
    folder = command.output_folder(_is_runs, f"python -m {prog}")
    p.add_argument("--runs", type=folder, default=runs, help="folder of state and exported weights")
    p.add_argument("--start", type=command.readable_folder, help="model folder to begin a new training with")
    add_threads(p)
    for entry in fields(settings):
        assert entry.default is not MISSING
        kind = entry.metadata.get("kind") or KINDS[type(entry.default)]
        name = f"--{entry.name.replace('_', '-')}"
        p.add_argument(name, type=kind, default=entry.default, help=entry.metadata.get("help"))
    return p


def add_threads(p: argparse.ArgumentParser, default: int = 0) -> None:
    """`--threads`."""
    p.add_argument("--threads", type=command.threads, default=default, help="CPU threads; 0 leaves torch's choice")


def set_threads(args: argparse.Namespace) -> None:
    """Give torch its threads."""
    if args.threads:
        torch.set_num_threads(args.threads)


def settings_of(args: argparse.Namespace, settings: type[S]) -> S:
    """The settings among the arguments. Raises ValueError for what they refuse."""
    return settings(**{entry.name: getattr(args, entry.name) for entry in fields(settings)})


def text_of(args: argparse.Namespace) -> str | None:
    """What the file of `--text` holds, None without one."""
    return read_text(args.text) if args.text else None


def _is_runs(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.safetensors", "latest", "episodes"))
