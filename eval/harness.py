"""`python -m eval.harness --model FOLDER --methods full,snapkv --budget 0.2 --tasks NAME`: LM Evaluation Harness tasks.

LongBench, RULER and whatever else the harness knows, with the prompt's cache compressed before anything is answered.
Task data comes from where the harness looks for it (its own cache, or `--include` for task files of yours); the task
gsm8k can be given its file with `--data`. Needs the extra `harness`. Text is generated, or continuations are scored,
after the method has acted: scoring prompt and continuation in one forward, as the harness does by itself, would never
show a method anything.

`--model dlm` is the embedded diffusion model and `--model dlm:FOLDER` one in a folder or on the hub; `--methods` are
then caches and rules, "none,freecache+threshold(0.9)", beside which stands "none" with fewer steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.config import add_arguments, from_arguments
from dlm.sources import dtype_of, model_info, open_model
from textkv import MethodCache, use
from textkv.arguments import budget
from textkv.command import count, existing_path, names, readable_folder, run, some_text, write_rows
from textkv.devices import device_of
from textkv.provenance import run_meta

from . import gsm8k
from .arguments import add_outputs, checked_budget
from .decoding import arms_of
from .harness_dlm import PREFIX, DiffusionLM
from .textbench import FULL, MODEL_HELP, held, load_text_model

TEXT_METHODS, DIFFUSION_METHODS = "full,snapkv", "freecache,freecache+threshold(0.9)"
GEN_LENGTH = 256  # of a diffusion model


class CachedLM(HFLM):
    """The harness's own transformers model, with a fresh `MethodCache` for every prompt.

    Attributes:
        held: what each batch's cache held after its prompt, bytes and tokens per sequence.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str, budget: str, batch: int
    ) -> None:
        super().__init__(pretrained=use(model), tokenizer=tokenizer, batch_size=batch)
        self._method, self._budget = method, budget
        self.held: list[dict[str, float]] = []

    def _cache(self) -> MethodCache:
        return MethodCache(self.model, self._method, budget=self._budget)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        cache = self._cache()
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        self.held.append(held(cache, len(context)))
        return out

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it), each after its compressed prompt."""
        found = []
        for _, context, continuation in tqdm(requests, disable=disable_tqdm, desc="continuations"):
            prompt = torch.tensor([context[-(self.max_length - len(continuation)) :]], device=self.device)
            wanted = torch.tensor(continuation, device=self.device)
            cache = self._cache()
            first = self.model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[0]
            self.held.append(held(cache, 1))
            rest = self.model(input_ids=wanted[None, :-1], past_key_values=cache).logits[0] if len(wanted) > 1 else None
            logits = (first if rest is None else torch.cat([first, rest])).float()
            total = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
            found.append((total, bool((logits.argmax(-1) == wanted).all())))
        return found


def measure(args: argparse.Namespace, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method, task and metric of the harness."""
    model, tokenizer = load_text_model(args.model, args.device)
    tasks, rows = Tasks(args), []
    for method in methods:
        share = "1.0" if method == FULL else args.budget
        lm = CachedLM(model, tokenizer, method, share, args.batch)
        scores = list(tasks.scores(lm))
        names = dict.fromkeys(name for x in lm.held for name in x)  # a hook that never ran took no time
        figures = {name: sum(x.get(name, 0.0) for x in lm.held) / len(lm.held) for name in names}
        rows += [{"method": method, "budget": share} | score | figures for score in scores]
    return rows


def measure_diffusion(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row per cache and rule, task and metric; the figures of a row are of all its answers."""
    plain = from_arguments(args, gen_length=GEN_LENGTH)
    arms = arms_of(args.methods, plain, guided=False)
    model_info(name)  # refused before weights are read
    device = device_of(args.device or None)
    model, tokenizer = open_model(name, device, dtype_of(None, device))
    tasks, rows = Tasks(args), []
    for arm in arms:
        lm = DiffusionLM(model, tokenizer, arm.config, batch=args.batch)
        rows += [{"method": arm.name} | score | lm.totals for score in tasks.scores(lm)]
    return rows


class Tasks:
    """The tasks that are asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.manager = TaskManager(include_path=str(args.include) if args.include else None)
        # Read here, so that a file that is missing is told before weights are read.
        given = {"gsm8k": gsm8k.harness_task(args.data)} if args.data else {}
        self.tasks, self.limit = [given.get(name, name) for name in args.tasks], args.limit

    def scores(self, lm: LM) -> Iterator[dict[str, Any]]:
        """What `lm` reaches: task, metric, score, n of each."""
        results = simple_evaluate(
            model=lm, tasks=self.tasks, task_manager=self.manager, limit=self.limit, log_samples=False
        )
        for task, metrics in results["results"].items():
            for name, value in metrics.items():
                if isinstance(value, float) and "stderr" not in name:
                    number = results["n-samples"][task]["effective"]
                    yield {"task": task, "metric": name.split(",")[0], "score": value, "n": number}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per row: what was kept of a prompt, or what a diffusion model computed."""
    if "kv_bytes" not in rows[0]:
        made = Table("method", "task", "metric", "score", "n", "forwards", "query tokens", "seconds")
        for row in rows:
            cells = (row["method"], row["task"], row["metric"], f"{row['score']:.3f}", str(row["n"]))
            made.add_row(*cells, f"{row['forwards']:,}", f"{row['query_tokens']:,}", f"{row['seconds']:.1f}")
        return made
    made = Table("method", "budget", "task", "metric", "score", "n", "bytes of full")
    for row in rows:
        share = row["kv_bytes"] / row["kv_bytes_full"]
        cells = (row["method"], row["budget"], row["task"], row["metric"], f"{row['score']:.3f}", str(row["n"]))
        made.add_row(*cells, f"{share:.3f}")
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.harness", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--model", type=some_text, default="mini", help=f"{MODEL_HELP}; dlm or dlm:FOLDER: a diffusion model"
    )
    # Checked once the model is known: caches and rules of a diffusion model are no methods.
    p.add_argument("--methods", type=names, help=f"methods ({TEXT_METHODS}), or caches and rules ({DIFFUSION_METHODS})")
    p.add_argument("--budget", type=budget, default="0.2", help="share of the prompt's tokens to keep, or 64t")
    p.add_argument(
        "--tasks", type=names, required=True, help="comma-separated task names of the harness, e.g. longbench_qasper"
    )
    p.add_argument("--include", type=readable_folder, help="folder with task files of your own")
    p.add_argument("--data", type=existing_path, metavar="FILE", help="of gsm8k: its test.jsonl, or the folder")
    p.add_argument("--limit", type=count, help="examples per task (default: all)")
    p.add_argument("--batch", type=count, default=1, help="prompts that run together (default 1)")
    add_outputs(p)
    length = f"of a diffusion model: tokens to generate ({GEN_LENGTH})"
    add_arguments(p.add_argument_group("diffusion"), ("gen_length", "block_length", "steps", "eos"), gen_length=length)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.harness", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    kind, _, name = args.model.partition(":")
    if kind == PREFIX:
        args.methods = args.methods or names(DIFFUSION_METHODS)
        rows = measure_diffusion(args, name or "mini")
    else:
        args.methods = args.methods or names(TEXT_METHODS)
        checked_budget(args.methods, args.budget)
        rows = measure(args, args.methods)
    Console().print(table(rows))
    write_rows(args.json, run_meta("eval.harness", argv, 0), rows)


if __name__ == "__main__":
    sys.exit(main())
