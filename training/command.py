"""The arguments of the training commands: one option for each setting, `--runs`, `--start` and `--threads`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from training.trainer import Settings


def parser_of(settings: type[Settings], prog: str, doc: str, runs: str) -> argparse.ArgumentParser:
    """The parser of a training command."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of state and exported weights")
    parser.add_argument("--start", type=Path, help="model folder to begin a new training with")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    for entry in fields(settings):
        assert entry.default is not MISSING
        name = f"--{entry.name.replace('_', '-')}"
        parser.add_argument(name, type=type(entry.default), default=entry.default, help=entry.metadata.get("help"))
    return parser


def read(
    parser: argparse.ArgumentParser, settings: type[Settings], argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Settings]:
    """The parsed arguments and the settings among them; torch's threads are set."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return args, settings(**{entry.name: getattr(args, entry.name) for entry in fields(settings)})
    except ValueError as error:
        parser.error(str(error))
