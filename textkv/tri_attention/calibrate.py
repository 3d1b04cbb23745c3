"""Find out where a model's queries lie before the rotary embedding, and write them down.

    python -m textkv.tri_attention calibrate --model FOLDER --text FILE    # writes FOLDER/tri_attention.safetensors
    python -m textkv.tri_attention calibrate --model mini                  # the embedded text model's

Any plain text will do: the centres hardly depend on it, which is what the method rests on. The model reads up to 32,768
tokens once, in pieces that it knows positions for; every position counts the same. Without --text, sentences of a small
grammar stand in.

Queries are those that the model hands to attention, turned back by their positions: after any norm of queries, and with
what a scaled RoPE multiplies in. The authors' script takes the bare projection, which is another vector where queries
are normed (Qwen3).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.attention import release, runs_on_ours
from textkv.cache import MethodCache
from textkv.command import output_file, run, some_text, text_file, token_count
from textkv.duo.identify import add_running, load_model
from textkv.evidence import Evidence, Needs, QueryCentres
from textkv.kinds import text_config, text_model
from textkv.layer import Layer
from textkv.method import Method
from textkv.mini.filler import sentences
from textkv.positions import RotarySpec
from textkv.records import read_text as file_text
from textkv.tri_attention.centres import FILE, Centres

TOKENS = 32_768
GRAMMAR_SEED = 21


def _is_centres(path: Path) -> bool:
    try:
        Centres.load(path)
    except (ValueError, OSError):
        return False
    return True


OUT = output_file(_is_centres, "python -m textkv.tri_attention")


@dataclass(frozen=True)
class Watch(Method):
    """Keeps everything and adds up the centres of every layer's queries in `found`, by the layer's number."""

    found: dict[int, QueryCentres] = field(default_factory=dict)

    name: ClassVar = "watch"

    @property
    def evicts(self) -> bool:
        """Never: only queries are of interest."""
        return False

    def needs(self) -> Needs:
        """Where queries lie, turned back to before RoPE."""
        return Needs(rope=True, query_centres=True)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Adds this piece's centres to those of the pieces before."""
        number, new = layer.kind.number, evidence.centres
        self.found[number] = self.found[number] + new if number in self.found else new


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, ids: torch.Tensor, length: int | None = None, start: int | None = None, name: str = ""
) -> Centres:
    """The centres of `model`, read from the ids int64 [n] of ordinary text.

    Args:
        name: of the model, for the reader of the file.
        length: tokens of a piece, each of which is read from position 0 on; None = all that the model knows.
        start: id of the token that every piece begins with; None = none.

    Raises:
        ValueError: no text, a length that leaves no room, or a layer of which nobody knows how its keys turn.
    """
    length = length or text_config(model).max_position_embeddings
    room = length - (start is not None)
    if room < 1 or not len(ids):
        raise ValueError(f"{len(ids)} tokens in pieces of length={length}: give a text, and at least 2 tokens a piece")
    was_ours, watch, decoder = runs_on_ours(text_config(model)), Watch(), text_model(model)
    try:
        for piece in ids.split(room):
            piece = piece if start is None else torch.cat([piece.new_tensor([start]), piece])
            cache = MethodCache(model, watch)
            # The decoder alone: logits over a vocabulary would weigh more than all the rest.
            decoder(input_ids=piece[None].to(model.device), past_key_values=cache, use_cache=True)
        rotary = cache.context.rotary
    finally:
        if not was_ours:
            release(model)
    layers = {
        number: QueryCentres(seen.count.cpu(), seen.mean.cpu(), seen.lengths.cpu())
        for number, seen in sorted(watch.found.items())
    }
    told = {str(number): concentration(of_layer, rotary[number]) for number, of_layer in layers.items()}
    settings = {"tokens": len(ids), "length": length, "concentration": told}
    return Centres(layers, name, settings)


def concentration(centres: QueryCentres, rotary: RotarySpec) -> list[float]:
    """How narrowly the queries of each head lie around their centre, 0 = in all directions, 1 = all on it: the summed
    lengths of the mean's pairs over those of the queries. Empty for a layer that does not turn."""
    if not rotary.inv_freq.numel():
        return []
    shares = rotary.lengths(centres.mean[0]).sum(-1) / centres.lengths[0].sum(-1).clamp(min=1e-30)
    return [round(share, 3) for share in shares.tolist()]


def read_text(tokenizer: PreTrainedTokenizerBase, text: str | None, tokens: int) -> torch.Tensor:
    """The first `tokens` ids int64 [n] of a text, or of sentences of a small grammar."""
    if text is None:  # a sentence has at least five words and a word is at least one token
        text = "".join(" " + " ".join(words) for words in sentences(max(16, tokens // 4), GRAMMAR_SEED))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:tokens], dtype=torch.int64)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m textkv.tri_attention", description="Query centres of a model.")
    command = p.add_subparsers(required=True, metavar="command").add_parser(
        "calibrate",
        help="read a text, write the centres of the queries",
        description=__doc__.split("\n\n")[0],
    )
    command.add_argument(
        "--model",
        type=some_text,
        required=True,
        help="mini, a name of `python -m textkv.models list`, a folder, or a hub id",
    )
    command.add_argument("--text", type=text_file, help="plain text; default: sentences of a small grammar")
    command.add_argument(
        "--out",
        type=OUT,
        help=f"file of the centres; default: {FILE} beside the model",
    )
    command.add_argument("--tokens", type=token_count, default=TOKENS, help=f"tokens to read at most; {TOKENS}")
    command.add_argument("--length", type=token_count, help="tokens of a piece; default: all that the model knows")
    add_running(command)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("textkv.tri_attention", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Calibrate, write the centres, print how concentrated the queries are."""
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(args.model)
    out = args.out or OUT(str(folder / FILE if folder.is_dir() else FILE))
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype), args.device)
    text = file_text(args.text) if args.text else None
    ids = read_text(tokenizer, text, args.tokens)
    name = folder.resolve().name if folder.is_dir() else args.model
    made = calibrate(model, ids, args.length, tokenizer.bos_token_id, name)
    made.save(out)
    told = f"{out}: centres of {len(made.layers)} layers from {len(ids)} tokens"
    shares = torch.tensor([x for of_layer in made.settings["concentration"].values() for x in of_layer])
    if len(shares):
        spread = f"{shares.min():.2f} to {shares.max():.2f}, median {shares.median():.2f}"
        told += f"; concentration of {len(shares)} query heads {spread}"
    Console().print(told, soft_wrap=True, markup=False)
