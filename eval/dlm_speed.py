"""`python -m eval.speed dlm`: what a step of diffusion decoding costs outside the model, beside the model's forward.

The loop, the rule and the cache policy are what is left of a step when the model's `forward` is taken out. `calls` =
operations of torch per step outside of it, by the profiler, `calls_forward` those inside; `overhead` = seconds outside
over seconds inside, medians over the steps of all rounds (on a CPU those of the processor: give it one thread, as
OMP_NUM_THREADS=1). "mini" is the embedded LLaDA with its weights; the others are LLaDA's graph in the shape of a known
model with random weights, as many layers as `--layers` says: "smollm2" 576 wide with 49,152 words, "llada" 4,096 wide
with 126,464 (4 GB in fp32 without layers, 0.9 GB for each).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from dlm.cache import resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import decode
from dlm.mini import load_mini
from dlm.models import LLaDAConfig, LLaDAModelLM
from textkv.command import checked, choices, count, names, run, token_count, write_rows
from textkv.provenance import run_meta

from .arguments import add_outputs

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {"d_model": 576, "n_heads": 9, "mlp_hidden_size": 1536, "vocab_size": 49_152, "n_layers": 30},
    "llada": {"d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12_288, "vocab_size": 126_464, "n_layers": 32},
}
_FORWARD = "the model's forward"


def caches(text: str) -> list[str]:
    """Comma-separated cache policies. Raises ValueError for one that cannot be built."""
    found = names(text)
    for one in found:
        resolve_cache(one)
    return found


def shaped(name: str, layers: int | None, device: str) -> PreTrainedModel:
    """ "mini", or LLaDA's graph in one of `SHAPES` with random weights; in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name == "mini":
        return load_mini("llada", dtype, device)[0]
    shape = SHAPES[name] | ({} if layers is None else {"n_layers": layers})
    config = LLaDAConfig(**shape, mask_token_id=0, eos_token_id=1, pad_token_id=1, max_sequence_length=65_536)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LLaDAModelLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Watch:
    """Seconds in and between the calls of a model's forward.

    Attributes:
        inside, outside: of each call, and from its end to the next one's beginning.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.inside, self.outside = model, [], []
        self.end: float | None = None

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            return time.perf_counter()
        # What the processor did for us: other work on the machine makes neither part longer.
        return time.process_time()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls of one generation."""
        plain, self.end = self.model.forward, None

        def forward(*args: Any, **kwargs: Any) -> Any:
            """The model's own, between two looks at the clock."""
            start = self._clock()
            if self.end is not None:
                self.outside.append(start - self.end)
            with record_function(_FORWARD):
                out = plain(*args, **kwargs)
            self.end = self._clock()
            self.inside.append(self.end - start)
            return out

        self.model.forward = forward
        try:
            yield
        finally:
            del self.model.forward


def operations(trace: profile) -> tuple[float, float]:
    """Operations of torch per forward in a trace: outside of the forwards, and in them."""
    spans = [event.time_range for event in trace.events() if event.name == _FORWARD]
    called = [event.time_range for event in trace.events() if event.name.startswith("aten::")]
    # What comes before the first forward or after the last is of no step.
    called = [at for at in called if spans[0].start <= at.start and at.end <= spans[-1].end]
    inside = sum(any(span.start <= at.start and at.end <= span.end for span in spans) for at in called)
    return (len(called) - inside) / (len(spans) - 1), inside / len(spans)


@torch.inference_mode()
def measure(
    model: PreTrainedModel, policies: Sequence[str], length: int, generated: int, steps: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row per cache policy: `generated` tokens behind a prompt of `length`, in `steps` forwards."""
    mask = model.decoding_spec.mask_id
    ids = torch.randint(2, 90, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids = ids.masked_fill(ids == mask, 90)
    watches = {name: Watch(model) for name in policies}

    def answer(name: str, forwards: int) -> None:
        config = DecodingConfig(gen_length=generated, steps=forwards, cache=name, eos="none")
        decode(model, ids, config=config)

    least = DecodingConfig(gen_length=generated).blocks
    traced = {}
    for name in policies:
        answer(name, least)  # warms up
        with profile(activities=[ProfilerActivity.CPU]) as trace, Watch(model).watching():
            answer(name, min(generated, 2 * least))
        traced[name] = operations(trace)
    for _ in range(rounds):  # in turns: what else the machine does falls on all
        for name in policies:
            with watches[name].watching():
                answer(name, steps)
    for name, watch in watches.items():
        outside, inside = median(watch.outside), median(watch.inside)
        yield {
            "method": name, "tokens_seen": length, "gen_length": generated, "device": str(model.device),
            "layers": model.config.num_hidden_layers, "n": len(watch.inside), "calls": traced[name][0],
            "calls_forward": traced[name][1], "seconds_outside": outside, "seconds_forward": inside,
            "overhead": outside / inside,
        }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per model and cache."""
    made = Table("model", "layers", "cache", "calls outside", "calls inside", "outside ms", "forward ms", "share")
    for row in rows:
        made.add_row(
            row["model"], str(row["layers"]), row["method"], f"{row['calls']:.0f}", f"{row['calls_forward']:.0f}",
            f"{1000 * row['seconds_outside']:.2f}", f"{1000 * row['seconds_forward']:.2f}", f"{row['overhead']:.1%}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.speed dlm", description=__doc__.split("\n\n")[0])
    p.add_argument("--models", type=choices("mini", *SHAPES), default="mini,smollm2", help="of mini, smollm2, llada")
    p.add_argument("--caches", type=checked(caches), default="dual,prefix,freecache", help="comma-separated caches")
    p.add_argument("--length", type=token_count, default=256, help="tokens of the prompt")
    p.add_argument("--gen-length", type=token_count, default=64, help="tokens to write")
    p.add_argument("--steps", type=count, default=32, help="forwards of a generation")
    p.add_argument("--layers", type=count, help="layers of the random models (default: as the known model has)")
    p.add_argument("--rounds", type=count, default=3)
    add_outputs(p, when=", after every model")
    return p


def main(argv: Sequence[str]) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.speed dlm", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    # Refused before weights are made. A step outside of the model lies between two forwards.
    DecodingConfig(gen_length=args.gen_length, steps=args.steps)
    for name in ("gen_length", "steps"):
        if (value := getattr(args, name)) < 2:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: what is between two forwards is measured; use 2 or more"
            )
    rows: list[dict[str, Any]] = []
    meta = run_meta("eval.speed", ["dlm", *argv], 0)
    for name in args.models:
        model = shaped(name, args.layers, args.device)
        for row in measure(model, args.caches, args.length, args.gen_length, args.steps, args.rounds):
            rows.append({"model": name} | row)
        write_rows(args.json, meta, rows)
        del model
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
