"""`python -m dlm.generate`: a diffusion language model goes on from a prompt, or from every prompt of a file.

Everything that can be wrong with the request (lengths, cache, rule, guide, prompt, files, device) is checked before any
weights are loaded; such an error is one line on stderr and exit code 2. `--show` draws the canvas while it is unmasked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.batch import Item, answer_all, bad_item, digest, read_done, read_items, to_answer
from dlm.config import DecodingConfig, add_arguments, from_arguments
from dlm.decode import Decoded, StuckError, decode_prompts
from dlm.ends import cut_at
from dlm.models import answer_text
from dlm.show import Painter
from dlm.sources import DTYPES, ModelInfo, dtype_of, model_info, open_guide, open_model
from dlm.unmask import Guider
from textkv.arguments import device
from textkv.command import count, output_file, readable, results_file, run, seed, some_text, text_file, write_rows
from textkv.provenance import run_meta
from textkv.records import read_text

NO_GUIDE = "none"
STDOUT = Path("-")
ROW = b'{"line": '  # what each answer of --batch begins with


def _is_answers(path: Path) -> bool:
    """By its beginning; whether each line answers the same prompts is asked when these are known (`dlm.batch`)."""
    with path.open("rb") as file:
        return ROW.startswith(file.read(len(ROW)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m dlm.generate", description=__doc__.split("\n\n")[0])
    prompt = p.add_argument_group("prompt, one of").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=some_text, metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", type=_prompt, metavar="F", help="read it from a file, or - for stdin")
    prompt.add_argument(
        "--batch", type=readable, metavar="IN.jsonl", help='a prompt a line: {"prompt": ...}; needs --out'
    )
    prompt.add_argument(
        "--infill", type=some_text, metavar="TEXT", help="fill its gaps: <mask:8> stands for eight tokens"
    )
    p.add_argument(
        "--out",
        type=output_file(_is_answers, "python -m dlm.generate"),
        metavar="OUT.jsonl",
        help="answers of --batch; gone on with if it exists",
    )
    p.add_argument("--strict", action="store_true", help="refuse a --batch file with a line that cannot be answered")
    p.add_argument("--batch-size", type=count, default=8, help="prompts of --batch that are written together (8)")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    p.add_argument(
        "--model", type=some_text, default="mini", help="mini (a small LLaDA), mini-dream, a folder, or a hub id"
    )
    p.add_argument(
        "--guide", type=some_text, default=NO_GUIDE, help="none, mini, a folder, or a hub id of a causal model"
    )
    add_arguments(p)
    p.add_argument("--seed", type=seed, default=0, help="of the random numbers (0)")
    p.add_argument("--show", action="store_true", help="draw the canvas while it is unmasked")
    p.add_argument("--stats", action="store_true", help="say what it cost")
    p.add_argument("--json", type=_json, nargs="?", const=STDOUT, metavar="FILE", help="figures and text as JSON")
    p.add_argument("--device", type=device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    return p


@dataclass(frozen=True)
class Writer:
    """The models, and how they are to write."""

    config: DecodingConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    guide: Guider | None
    seed: int

    def text(self, done: Decoded, row: int = 0) -> str:
        """A row's answer, up to its end of text or stop string; with gaps the whole text."""
        # In a text with gaps an end inside of one ends nothing: it only says that the gap was too long.
        ends = () if self.config.infill else self.model.decoding_spec.eos_ids
        text = answer_text(self.tokenizer, done.ids[row].tolist(), ends)
        cut = cut_at(text, self.config.stop)
        return text if cut is None else cut

    def decode(self, prompts: list[list[int]], seed: int | list[int], on_step: Painter | None = None) -> Decoded:
        """Answers to prompts, lists of ids."""
        return decode_prompts(self.model, prompts, self.config, self.guide, seed, on_step, self.tokenizer)


def _prompt(text: str) -> Path:
    return STDOUT if text == str(STDOUT) else text_file(text)


def _json(text: str) -> Path:
    return STDOUT if text == str(STDOUT) else results_file("dlm.generate")(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 when the rule got stuck, else as `textkv.command.run` says."""
    return run("dlm.generate", parser(), work, argv, kept="what --batch has written is kept, the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Answer a prompt, or those of a file."""
    try:
        return batch_command(args) if args.batch else prompt_command(args, argv)
    # Not the request's fault but the rule's, hence another exit code.
    except StuckError as error:
        print(f"dlm.generate: {error}", file=sys.stderr)
        return 1


def prompt_command(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """One prompt: its text, and what was asked for besides."""
    if args.out is not None:
        raise ValueError("--out is for --batch; one answer is printed, or written with --json FILE")
    if args.show and args.json == STDOUT:
        raise ValueError("--show and --json both want the terminal; use --json FILE")
    prompt = read_prompt(args)
    config, known = make_request(args)
    ids = known.ids(config, prompt, args.chat)
    if unknown := ids.count(known.tokenizer.unk_token_id):
        print(f"dlm.generate: {args.model} does not know {unknown} words of the prompt", file=sys.stderr)
    writer = make_writer(args, config)
    painter = Painter(writer.tokenizer, prompt, Console()) if args.show else None
    # The terminal is given back also when a rule gets stuck or Ctrl-C comes.
    with painter or nullcontext():
        done = writer.decode([ids], writer.seed, painter)
    text = writer.text(done)
    row = about(args, writer) | {"prompt": prompt, "text": text, "tokens": done.stats.text_tokens[0]}
    row |= done.stats.columns()
    if args.json is not None:
        meta = run_meta("dlm.generate", argv, args.seed)
        if args.json == STDOUT:
            print(json.dumps({"meta": meta, "rows": [row]}, indent=1))
        else:
            write_rows(args.json, meta, [row])
    if args.json != STDOUT:
        print(text)
        if args.stats:
            print(f"\ncache {row['cache']}, unmask {row['unmask']}, guide {row['guide']}, {row['tokens']} tokens")
            print("\n".join(f"{name:<20}{_number(value)}" for name, value in done.stats.columns().items()))
    return 0


def batch_command(args: argparse.Namespace) -> int:
    """Every prompt of a file."""
    if args.out is None:
        raise ValueError("--batch needs --out OUT.jsonl: the file that the answers go to")
    if args.show or args.json is not None:
        raise ValueError("--show and --json are for one prompt; the answers of --batch are in --out")
    if args.out.resolve() == args.batch.resolve():
        raise ValueError(f"--out {args.out} is the file of --batch itself; give another one")
    # Files first: they cost nothing to read, and a finished run needs no model at all.
    items = read_items(args.batch, args.strict)
    # Everything that an answer depends on, and nothing else: its digest marks each line of the file.
    said = asdict(make_config(args)) | {"model": args.model, "guide": args.guide, "chat": args.chat}
    said |= {"seed": args.seed, "batch_size": args.batch_size, "dtype": args.dtype, "stats": args.stats}
    mark = digest(said)
    done = read_done(args.out, items, mark)
    if done == {item.line for item in items}:
        print(f"all {len(items)} answers are in {args.out} already")
        return 0
    config, known = make_request(args)
    # All prompts before any weights: one that is too long in line 900 is known in the first second.
    ids: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        if item.error is None:
            try:
                ids[item.line] = known.ids(config, item.prompt, args.chat)
            except ValueError as error:
                items[place] = bad_item(item, str(error), args.batch, args.strict)
    unknown = {line: count for line, row in ids.items() if (count := row.count(known.tokenizer.unk_token_id))}
    if unknown:
        print(
            f"dlm.generate: {args.model} does not know {sum(unknown.values())} words of {len(unknown)} prompts, the "
            f"first in line {min(unknown)}",
            file=sys.stderr,
        )
    writer = make_writer(args, config) if to_answer(items, done) else None

    def answer(chunk: list[Item]) -> list[dict[str, Any]]:
        prompts = [ids[item.line] for item in chunk]
        # A seed for each line, so that a run that was gone on with draws the same tokens.
        done = writer.decode(prompts, [writer.seed + item.line - 1 for item in chunk])
        cost = {"batch": len(chunk), **done.stats.columns()} if args.stats else {}
        tokens = done.stats.text_tokens
        return [{"text": writer.text(done, i), "tokens": tokens[i]} | cost for i in range(len(chunk))]

    written = answer_all(items, args.out, args.batch_size, mark, answer)
    print(f"{written} answers written to {args.out}, {len(items)} in all")
    if failed := sum(item.error is not None for item in items):
        print(f'dlm.generate: {failed} lines could not be answered; their rows say why in "error"', file=sys.stderr)
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text, without the line break at its end. Raises ValueError for an empty one."""
    if args.infill is not None:
        text, where = args.infill, "--infill"
    elif args.prompt is not None:
        text, where = args.prompt, "--prompt"
    elif str(args.prompt_file) == "-":
        text, where = sys.stdin.read(), "stdin"
    else:
        text, where = read_text(args.prompt_file), str(args.prompt_file)
    if not text.strip():
        raise ValueError(f"the prompt in {where} is empty; give some text to go on from")
    # A file ends with a line break that its author did not mean as a part of the prompt.
    return text.rstrip("\n")


def make_config(args: argparse.Namespace) -> DecodingConfig:
    """The decoding configuration; raises ValueError for what cannot work."""
    gaps = {"infill": True, "gen_length": 0} if args.infill is not None else {}
    config = from_arguments(args, guided=args.guide != NO_GUIDE, **gaps)
    if gaps and (args.chat or config.guided):
        raise ValueError("--infill fills gaps in a text as it is; leave out --chat and --guide")
    config.check_guide()
    return config


def make_request(args: argparse.Namespace) -> tuple[DecodingConfig, ModelInfo]:
    """All that can be known before weights are read; raises ValueError or FileNotFoundError for what cannot work."""
    config = make_config(args)
    return config, model_info(args.model, args.guide if config.guided else None)


def make_writer(args: argparse.Namespace, config: DecodingConfig) -> Writer:
    """Loads the models."""
    dtype = dtype_of(args.dtype, args.device)
    model, tokenizer = open_model(args.model, args.device, dtype)
    guide = open_guide(args.guide, args.device, dtype, tokenizer) if config.guided else None
    return Writer(config, model, tokenizer, guide, args.seed)


def about(args: argparse.Namespace, writer: Writer) -> dict[str, Any]:
    """What the figures of a row belong to."""
    named = {"model": args.model, "guide": args.guide, "seed": writer.seed}
    return named | writer.config.columns(writer.model.decoding_spec)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
