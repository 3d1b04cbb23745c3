"""`python -m textkv.masa`: convert a pretrained model, turn one with atoms into plain weights, train one.

python -m textkv.masa convert --model smollm2 --atoms 1 --groups 15 --reduction 0.2 --text FILE --out FOLDER
python -m textkv.masa export --model FOLDER --out PLAIN
python -m textkv.masa train --atoms 2 --text FILE     # at the root of a checkout

Every command of text models takes `--model FOLDER` of either form. Calibration reads the first nine tenths of a text,
as the measuring commands read the last; without --text, sentences of a small grammar stand in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textkv import models
from textkv.arguments import device
from textkv.command import count, fraction, hand_over, natural, output_folder, run, some_text, text_file, token_count
from textkv.disk import whole_folder
from textkv.masa.checkpoint import save
from textkv.masa.conversion import Conversion, convert
from textkv.mini.filler import sentences
from textkv.models.atoms import FILE, is_atoms
from textkv.records import read_text

TRAINING = "training.masa.train"
PLAIN = "model.safetensors"
GRAMMAR_SEED = 33
DTYPES = ("float32", "bfloat16", "float16")


def rows_of(tokenizer: PreTrainedTokenizerBase, text: str | None, texts: int, length: int) -> Tensor:
    """Rows to calibrate on, int64 [texts, length]: evenly spaced pieces of the first nine tenths of a text, or of a
    small grammar's sentences.

    Raises:
        ValueError: the text is too short.
    """
    if text is None:  # a sentence has at least five tokens
        text = "".join(" " + " ".join(words) for words in sentences(max(16, texts * length // 4), GRAMMAR_SEED))
    else:
        text = text[: len(text) * 9 // 10]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens to calibrate on, {length} are needed; give a longer one")
    begins = torch.linspace(0, len(ids) - length, texts).long()
    return ids[begins[:, None] + torch.arange(length)]


def converted(args: argparse.Namespace) -> None:
    """Convert, write and tell."""
    wanted = Conversion(
        atoms=args.atoms,
        groups=args.groups,
        reduction=None if args.atoms_only else args.reduction,
        projections=args.projections,
    )
    model, tokenizer = models.load(args.model, device=args.device)
    text = read_text(args.text) if args.text else None
    made = convert(model, wanted, rows_of(tokenizer, text, args.texts, args.length))
    about = {"model": args.model, "cuts": made.cuts, "reduction": made.reduction, "atoms": args.atoms}
    file = save(model, args.out, tokenizer, getattr(torch, args.dtype), about)
    others = sum(p.numel() for name, p in model.named_parameters() if ".parametrizations." not in name)
    attention = sum(group.plain_parameters for group in made.groups)
    plain = (others + attention) * getattr(torch, args.dtype).itemsize
    Console().print(
        f"{file}: {file.stat().st_size:,} bytes, with plain weights {plain:,}; {made.parameters:,} attention "
        f"parameters of {made.plain_parameters:,}, {made.reduction:.1%} fewer; groups {made.cuts}",
        soft_wrap=True,
        markup=False,
    )


def exported(args: argparse.Namespace) -> None:
    """Write the plain form of a folder with atoms."""
    place = models.resolve(args.model)
    if not is_atoms(place):
        raise ValueError(f"model {args.model} holds no {FILE}; it has plain weights already")
    model, tokenizer = models.load(args.model, dtype=getattr(torch, args.dtype))
    with whole_folder(args.out) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    print(args.out)


def _holds(own: str, folder: Path) -> bool:
    return (folder / own).is_file()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m textkv.masa", description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(required=True, dest="command", metavar="command")
    make = commands.add_parser("convert", help="a pretrained model in terms of atoms, without training")
    make.add_argument("--atoms", type=natural, required=True, help="matrices of each group and projection")
    make.add_argument("--groups", type=count, default=1, help="groups of consecutive layers (default 1)")
    make.add_argument("--reduction", type=fraction, default=0.2, help="share of attention weights to go (default 0.2)")
    make.add_argument("--atoms-only", action="store_true", help="no low rank rests, whatever the reduction is then")
    make.add_argument("--projections", type=some_text, default="qkvo", help="which are converted (default qkvo)")
    make.add_argument("--text", type=text_file, help="plain text to calibrate on; default: a small grammar's sentences")
    make.add_argument("--texts", type=count, default=32, help="pieces of it (default 32)")
    make.add_argument("--length", type=token_count, default=256, help="tokens of a piece (default 256)")
    make.add_argument("--device", type=device, default="", help="cpu, cuda ... (default: a GPU where there is one)")
    plain = commands.add_parser("export", help="plain weights of a folder with atoms")
    for command, own in ((make, FILE), (plain, PLAIN)):
        command.add_argument("--model", type=some_text, required=True, help="mini, smollm2, a folder, or a hub id")
        kind = output_folder(partial(_holds, own), f"python -m textkv.masa (it has no {own})")
        command.add_argument("--out", type=kind, required=True, help="folder to write")
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the numbers on disk")
    commands.add_parser("train", add_help=False, help=f"a small model from scratch: python -m {TRAINING}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:  # its options are the trainer's own
        return run("textkv.masa train", argparse.ArgumentParser(), lambda *_: hand_over(TRAINING, argv[1:]), [])
    return run("textkv.masa", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Do what was asked for."""
    {"convert": converted, "export": exported}[args.command](args)
