"""`python -m eval.speed dlm`: what a step of diffusion decoding costs outside the model, beside the model's forward.

The loop, the rule and the cache policy are what is left of a step when the model's `forward` is taken out. `calls` =
operations of torch per step outside of it, by the profiler, `calls_forward` those inside; `overhead` = seconds outside
over seconds inside, medians over the steps of all rounds (on a CPU those of the processor: give it one thread, as
OMP_NUM_THREADS=1). "mini" is the embedded LLaDA with its weights; the others are LLaDA's graph in the shape of a known
model with random weights, as many layers as `--layers` says: "smollm2" 576 wide with 49,152 words, "llada" 4,096 wide
with 126,464 (4 GB in fp32 without layers, 0.9 GB for each).

A policy that freezes slots may hand them to a method, as "freecache+kivi(4)": beside "freecache", where they stay as
they are, `frozen_ratio` = seconds of its forwards over those of the policy alone, what the method does when slots come
to it included, medians over the rounds.

`--fast-dllm DIR` puts the authors' Fast-dLLM beside ours: the same weights and prompt, in turns, in this process, from
a checkout of theirs (see `eval.peers.fast_dllm`: what is in DIR is run). `seconds_step` = a whole generation over its
forwards; `forward_ratio` and `step_ratio` = our seconds over theirs, medians over the rounds; `equal_tokens` = share of
answers' tokens that both write.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from textkv.command import checked, choices, count, names, readable_folder, run, token_count, write_rows
from textkv.provenance import run_meta

from .arguments import add_outputs
from .peers.fast_dllm import GENERATIONS, LIBRARY, Checkout

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {"d_model": 576, "n_heads": 9, "mlp_hidden_size": 1536, "vocab_size": 49_152, "n_layers": 30},
    "llada": {"d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12_288, "vocab_size": 126_464, "n_layers": 32},
}
_FORWARD = "the model's forward"
OURS = "ours"


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
        forwards, steps: of each generation, seconds per forward: those inside, and all.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.inside, self.outside = model, [], []
        self.forwards: list[float] = []
        self.steps: list[float] = []
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
        begin, before = self._clock(), len(self.inside)

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
        calls = self.inside[before:]
        self.forwards.append(sum(calls) / len(calls))
        self.steps.append((self._clock() - begin) / len(calls))


def operations(trace: profile) -> tuple[float, float]:
    """Operations of torch per forward in a trace: outside of the forwards, and in them."""
    spans = [event.time_range for event in trace.events() if event.name == _FORWARD]
    called = [event.time_range for event in trace.events() if event.name.startswith("aten::")]
    # What comes before the first forward or after the last is of no step.
    called = [at for at in called if spans[0].start <= at.start and at.end <= spans[-1].end]
    inside = sum(any(span.start <= at.start and at.end <= span.end for span in spans) for at in called)
    return (len(called) - inside) / (len(spans) - 1), inside / len(spans)


@dataclass
class Arm:
    """Whose loop decodes with which cache.

    Attributes:
        answer: forwards -> tokens int64 [1, G].
        calls: operations of torch per step, outside and inside of the forward.
    """

    cache: str
    library: str
    watch: Watch
    answer: Callable[[int], torch.Tensor]
    calls: tuple[float, float] = (0.0, 0.0)
    ids: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> tuple[str, str]:
        """What no other arm has."""
        return self.cache, self.library


def arms_of(
    model: PreTrainedModel, policies: Sequence[str], ids: torch.Tensor, generated: int, theirs: Checkout | None
) -> list[Arm]:
    """Ours with every policy, and theirs with those that they have."""

    def ours(name: str) -> Callable[[int], torch.Tensor]:
        def answer(forwards: int) -> torch.Tensor:
            config = DecodingConfig(gen_length=generated, steps=forwards, cache=name, eos="none")
            return decode(model, ids, config=config).ids

        return answer

    arms = [Arm(name, OURS, Watch(model), ours(name)) for name in policies]
    if theirs is None:
        return arms
    peer, block = theirs.model(model), DecodingConfig(gen_length=generated).block_length

    def authors(name: str) -> Callable[[int], torch.Tensor]:
        def answer(forwards: int) -> torch.Tensor:
            lengths = {"steps": forwards, "gen_length": generated, "block_length": block}
            made, _ = theirs.answer(name)(peer, ids, **lengths, mask_id=model.decoding_spec.mask_id)
            return made[:, ids.shape[1] :]

        return answer

    return [*arms, *(Arm(name, LIBRARY, Watch(peer), authors(name)) for name in policies if name in GENERATIONS)]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    policies: Sequence[str],
    length: int,
    generated: int,
    steps: int,
    rounds: int,
    theirs: Checkout | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per cache policy and library: `generated` tokens behind a prompt of `length`, in `steps` forwards."""
    mask = model.decoding_spec.mask_id
    ids = torch.randint(2, 90, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids = ids.masked_fill(ids == mask, 90)
    arms = arms_of(model, policies, ids, generated, theirs)
    least = DecodingConfig(gen_length=generated).blocks
    for arm in arms:
        arm.answer(least)  # warms up
        with profile(activities=[ProfilerActivity.CPU]) as trace, Watch(arm.watch.model).watching():
            arm.answer(min(generated, 2 * least))
        arm.calls = operations(trace)
    for _ in range(rounds):  # in turns: what else the machine does falls on all
        for arm in arms:
            with arm.watch.watching():
                arm.ids = [arm.answer(steps)]
    known = {arm.name: arm for arm in arms}
    for arm in arms:
        about = {"method": arm.cache, "library": arm.library, "tokens_seen": length, "gen_length": generated}
        about |= {"device": str(model.device), "layers": model.config.num_hidden_layers}
        yield about | _figures(arm) | _frozen(arm, known) | _beside(arm, known.get((arm.cache, LIBRARY)))


def _figures(arm: Arm) -> dict[str, Any]:
    """What an arm took."""
    watch = arm.watch
    outside, inside = median(watch.outside), median(watch.inside)
    return {
        "n": len(watch.inside), "calls": arm.calls[0], "calls_forward": arm.calls[1], "seconds_outside": outside,
        "seconds_forward": inside, "overhead": outside / inside, "seconds_step": median(watch.steps),
    }  # fmt: skip


def _frozen(arm: Arm, known: dict[tuple[str, str], Arm]) -> dict[str, Any]:
    """An arm whose method keeps frozen slots against that of its policy alone, where it was measured too."""
    policy, _, method = arm.cache.partition("+")
    alone = known.get((policy, arm.library))
    if not method or alone is None:
        return {}
    pairs = zip(arm.watch.forwards, alone.watch.forwards, strict=True)
    return {"frozen_ratio": median(mine / dense for mine, dense in pairs)}


def _beside(arm: Arm, peer: Arm | None) -> dict[str, Any]:
    """Ours against theirs, round by round; nothing for theirs itself."""
    if peer is None or peer is arm:
        return {}
    mine, theirs = arm.watch, peer.watch
    pairs = {"forward_ratio": (mine.forwards, theirs.forwards), "step_ratio": (mine.steps, theirs.steps)}
    ratios = {name: median(a / b for a, b in zip(*both, strict=True)) for name, both in pairs.items()}
    return ratios | {"equal_tokens": (arm.ids[0] == peer.ids[0]).double().mean().item()}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per model, cache and library; columns of ratios where there is another library."""
    ratios = {"forward_ratio": "forward x", "step_ratio": "step x", "equal_tokens": "equal", "frozen_ratio": "frozen x"}
    ratios = {name: head for name, head in ratios.items() if any(name in row for row in rows)}
    made = Table("model", "layers", "cache", "calls outside", "calls inside", "outside ms", "forward ms", "share")
    for name in ("step ms", *ratios.values()):
        made.add_column(name)
    for row in rows:
        cache = row["method"] if row["library"] == OURS else f"{row['method']} ({row['library']})"
        made.add_row(
            row["model"], str(row["layers"]), cache, f"{row['calls']:.0f}", f"{row['calls_forward']:.0f}",
            f"{1000 * row['seconds_outside']:.2f}", f"{1000 * row['seconds_forward']:.2f}", f"{row['overhead']:.1%}",
            f"{1000 * row['seconds_step']:.2f}", *(f"{row[name]:.2f}" if name in row else "" for name in ratios),
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
    p.add_argument(
        "--fast-dllm", type=readable_folder, metavar="DIR",
        help="a checkout of Fast-dLLM to put beside ours; the code in it is run",
    )  # fmt: skip
    add_outputs(p, when=", after every model")
    return p


def main(argv: Sequence[str]) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.speed dlm", parser(), work, argv)


def checkout_of(args: argparse.Namespace) -> Checkout | None:
    """The checkout that is asked for; None = none is.

    Raises:
        ValueError: lengths or caches that the authors' code does not have, or a folder that is no checkout.
    """
    if args.fast_dllm is None:
        return None
    config = DecodingConfig(gen_length=args.gen_length, steps=args.steps)
    for name, parts in (("gen_length", config.block_length), ("steps", config.blocks)):
        value = getattr(args, name)
        if value % parts:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is no multiple of {parts}, as {LIBRARY} needs it with blocks of "
                f"{config.block_length}; use {value // parts * parts + parts}"
            )
    if not set(args.caches) & set(GENERATIONS):
        raise ValueError(f"--caches {','.join(args.caches)}: {LIBRARY} has {', '.join(GENERATIONS)}; name one of them")
    return Checkout.of(args.fast_dllm)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    # Refused before weights are made. A step outside of the model lies between two forwards.
    DecodingConfig(gen_length=args.gen_length, steps=args.steps)
    for name in ("gen_length", "steps"):
        if (value := getattr(args, name)) < 2:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: what is between two forwards is measured; use 2 or more"
            )
    theirs = checkout_of(args)
    rows: list[dict[str, Any]] = []
    meta = run_meta("eval.speed", ["dlm", *argv], 0)
    for name in args.models:
        model = shaped(name, args.layers, args.device)
        for row in measure(model, args.caches, args.length, args.gen_length, args.steps, args.rounds, theirs):
            rows.append({"model": name} | row)
        write_rows(args.json, meta, rows)
        del model
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
