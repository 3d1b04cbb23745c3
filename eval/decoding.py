"""`python -m eval.decoding`: what cache policies and unmasking rules of diffusion models save, and what they cost.

Every arm of the grid answers the same problems with one model and one rule for ends of text; arms take turns batch by
batch, so that their seconds were measured side by side. Besides the arms asked for there are always "none" (no cache,
the model's own rule), which all ratios refer to, and the same with half and a quarter of the steps: a cache that is no
better than fewer steps is no use. Totals are over all problems; a ratio says how many times less than "none".
`--json` is rewritten after every round, and a second start with the same file goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from agentkv.tables import format_bytes
from dlm.cache import list_caches, resolve_cache
from dlm.config import DecodingConfig, add_arguments, from_arguments
from dlm.decode import decode_prompts
from dlm.mini.problems import FIRST_EVALUATION_SEED, SHARES, final_answer, make_problem
from dlm.models import DecodingSpec, answer_text
from dlm.prompts import check_prompt
from dlm.sources import DTYPES, MINI_GUIDES, MINI_MODELS, dtype_of, model_info, open_guide, open_model
from dlm.unmask import Guider, is_rule, list_rules, parse_rule
from textkv import arguments, command
from textkv.expression import parse_call, split_parts
from textkv.provenance import run_meta

from . import gsm8k
from .tallies import TOTALS, Arm, Tally, compared, read_tallies, row_of

BASE = "none"
PRUNED = "dual+suffix"
GEN_LENGTH = {"arithmetic": 64, "hard": 50, "gsm8k": 256}
MODELS = {"hard": "mini-hard"}  # of a task; the others have "mini"
FEWER = (2, 4)  # what the steps are divided by in the arms without cache
WIDTH = 160  # of the table where there is no terminal
OPTIONS = ("gen_length", "block_length", "steps", "eos", "temperature")  # of the command; the grid has the others


@dataclass(frozen=True)
class Asked:
    """A problem: the prompt as text, and whether an answer to it is right."""

    prompt: str
    right: Callable[[str], bool]


def split_entry(entry: str) -> tuple[str, str | None]:
    """ "cache+method+rule" as (cache with its method, rule); None where the last part is no rule.

    Raises:
        ValueError: malformed text, or a rule without a cache in front.
    """
    parts = split_parts(entry)
    if not is_rule(parse_call(parts[-1])[0]):
        return entry, None
    if len(parts) == 1:
        raise ValueError(f"grid entry {entry!r} names no cache; write {BASE}+{entry}, or freecache+{entry}")
    return "+".join(parts[:-1]), parts[-1]


def _go_together(plain: DecodingConfig, cache: str, rule: str) -> bool:
    try:
        parse_rule(rule).check(plain, resolve_cache(cache), hooked=False)
    except ValueError:
        return False
    return True


def arms_of(entries: list[str], plain: DecodingConfig, guided: bool) -> list[Arm]:
    """ "none" first, then the grid, then "none" with fewer steps.

    Args:
        entries: ["all"] (every cache of models that see everything, and a pruned one, with every rule), or those of
            the grid.
        plain: the lengths and conventions that all arms share.
        guided: whether there is a guide.

    Raises:
        ValueError: an entry that cannot work.
    """
    if entries == ["all"]:
        rules = [rule for rule in list_rules() if guided or rule != "guided"]
        caches = [*list_caches(block_causal=False), PRUNED]
        entries = [f"{cache}+{rule}" for cache in caches for rule in rules if _go_together(plain, cache, rule)]
    arms = [Arm(BASE, replace(plain, cache=BASE))]
    for entry in entries:
        cache, rule = split_entry(entry)
        asks = rule is not None and parse_call(rule)[0] == "guided"
        if asks and not guided:
            raise ValueError(f"grid entry {entry!r} needs a guide; name one with --guide")
        if rule is not None:
            parse_rule(rule).check(plain, resolve_cache(cache), hooked=False)
        resolve_cache(cache)
        if entry != BASE:
            arms.append(Arm(entry, replace(plain, cache=cache, unmask=rule, guided=asks)))
    for part in FEWER:
        steps = max(plain.blocks, plain.steps // part)
        if all(steps != arm.config.steps for arm in arms if arm.config.cache == BASE):
            arms.append(Arm(f"{BASE}, fewer steps ({steps})", replace(plain, cache=BASE, steps=steps)))
    return arms


def problems(task: str, n: int, data: Path | None, shots: Path | None, chat: bool) -> list[Asked]:
    """The first `n` problems of a task.

    Raises:
        ValueError: a file that is missing or holds fewer problems.
        FileNotFoundError: a file that is not there.
    """
    if task in SHARES:
        made = [make_problem(FIRST_EVALUATION_SEED + i, task=task) for i in range(n)]
        return [Asked(p.prompt, lambda text, total=p.total: final_answer(text) == total) for p in made]
    if data is None:
        raise ValueError("--task gsm8k needs --data FILE: GSM8K's test.jsonl")
    questions = gsm8k.read_questions(data)
    if len(questions) < n:
        raise ValueError(f"{data} has {len(questions)} problems and --n is {n}; use at most --n {len(questions)}")
    worked = gsm8k.read_questions(shots) if shots else ()
    return [
        Asked(gsm8k.prompt(q, worked, chat), lambda text, answer=q.answer: gsm8k.number_in(text) == answer)
        for q in questions[:n]
    ]


@dataclass(frozen=True)
class Bench:
    """The models and the problems.

    Attributes:
        prompts: of the problems, as ids.
        size: problems of a batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    guide: Guider | None
    asked: Sequence[Asked]
    prompts: Sequence[list[int]]
    size: int
    seed: int

    def warm_up(self, arms: Sequence[Arm]) -> None:
        """One short answer by every arm: what is set up at the first call is nobody's time."""
        for arm in arms:
            short = replace(arm.config, gen_length=2, block_length=1, steps=2)
            decode_prompts(self.model, self.prompts[:1], short, self.guide, self.seed)

    def round(self, arms: Sequence[Arm], first: int) -> list[Tally]:
        """What each arm does with the batch that begins with problem `first`; nobody is always the first to answer."""
        turn = first // self.size % len(arms)
        tallies = [Tally() for _ in arms]
        answers = {i: self.answer(arms[i], first, tallies[i]) for i in (*range(turn, len(arms)), *range(turn))}
        for i, tally in enumerate(tallies):
            tally.same = "".join(str(int(mine == his)) for mine, his in zip(answers[i], answers[0], strict=True))
        return tallies

    def answer(self, arm: Arm, first: int, tally: Tally) -> list[list[int]]:
        """Adds the batch that begins with problem `first` to the arm's tally; the answers' tokens."""
        asked, prompts = (x[first : first + self.size] for x in (self.asked, self.prompts))
        done = decode_prompts(self.model, prompts, arm.config, self.guide, self.seed + first)
        texts = [answer_text(self.tokenizer, row, self.model.decoding_spec.eos_ids) for row in done.ids.tolist()]
        tally.right += "".join(str(int(one.right(text))) for one, text in zip(asked, texts, strict=True))
        for name in TOTALS:
            tally.totals[name] += getattr(done.stats, name)
        tally.totals["committed"] += sum(done.stats.committed)
        tally.totals["tokens"] += sum(done.stats.text_tokens)
        tally.cache_bytes = max(tally.cache_bytes, done.stats.cache_bytes)
        tally.cache_bytes_peak = max(tally.cache_bytes_peak, done.stats.cache_bytes_peak)
        return done.ids.tolist()


@dataclass(frozen=True)
class Setting:
    """What a bench is opened with, where it is opened: the sources of its models and problems, and prompts as ids.

    `guide`: None = no arm asks one.
    """

    model: str
    guide: str | None
    device: str
    dtype: torch.dtype
    problems: tuple[Any, ...]  # arguments of `problems`
    prompts: Sequence[list[int]]
    size: int
    seed: int
    arms: Sequence[Arm]

    def open(self) -> Bench:
        """Reads the weights; every arm has answered once."""
        logging.disable_progress_bar()
        model, tokenizer = open_model(self.model, self.device, self.dtype)
        guide = None if self.guide is None else open_guide(self.guide, self.device, self.dtype, tokenizer)
        bench = Bench(model, tokenizer, guide, problems(*self.problems), self.prompts, self.size, self.seed)
        bench.warm_up(self.arms)
        return bench

    def rounds(self, crew: command.Crew, firsts: Sequence[int]) -> Iterator[list[Tally]]:
        """What each arm does with the batches that begin with problems `firsts`, in this order, whoever does them."""
        if crew.alone or not firsts:
            bench = self.open() if firsts else None
            yield from (bench.round(self.arms, first) for first in firsts)
            return
        early: dict[int, list[Tally]] = {}
        due = iter(firsts)
        with crew.open(Setting.open, self) as there:
            first = next(due)
            for (_, number), tallies in there.results(Bench.round, [(self.arms, number) for number in firsts]):
                early[number] = tallies
                while first in early:
                    yield early.pop(first)
                    first = next(due, None)


def measure(
    setting: Setting,
    crew: command.Crew,
    about: dict[str, Any],
    meta: dict[str, Any],
    spec: DecodingSpec,
    path: Path | None,
) -> list[dict[str, Any]]:
    """The rows of all arms, in their order; `path` is gone on with if it exists, and rewritten after every round.

    Raises:
        ValueError: `path` holds another measurement.
    """
    arms = setting.arms
    tallies = read_tallies(arms, meta, path)

    def rows() -> list[dict[str, Any]]:
        return [row_of(*each, tallies[0], about, spec) for each in zip(arms, tallies, strict=True)]

    firsts = range(len(tallies[0].right), len(setting.prompts), setting.size)
    told = "problems" if setting.size == 1 else "batches"
    for done in track(setting.rounds(crew, firsts), told, len(firsts), console=Console(stderr=True)):
        for tally, later in zip(tallies, done, strict=True):
            tally.add(later)
        command.write_rows(path, meta, rows())
    finished = compared(rows())
    command.write_rows(path, meta, finished)
    return finished


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per arm: accuracy, then what it took less than "none"; bytes of the cache at the end, and the most."""
    about = rows[0]
    title = f"{about['task']}, {about['n']} problems, {about['gen_length']} tokens in blocks of {about['block_length']}"
    title += "; x = times less than none, equal = answers that are none's"
    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    made.add_column("arm", overflow="fold")
    figures = ("forwards", "x", "query tokens", "x", "guider", "tokens/forward", "seconds", "x")
    for name in ("accuracy (95 %)", "equal", *figures):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("cache", "peak"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        name = row["arm"] if row["unmask"] in row["arm"] else f"{row['arm']} ({row['unmask']})"
        made.add_row(
            name,
            f"{row['accuracy']:.1%} ({row['low']:.0%}-{row['high']:.0%})",
            f"{row['equal']:.1%}",
            f"{row['forwards']:,}",
            f"{row['forwards_ratio']:.2f}",
            f"{row['query_tokens']:,}",
            f"{row['query_tokens_ratio']:.2f}",
            f"{row['guider_forwards']:,}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds_ratio']:.2f}",
            format_bytes(row["cache_bytes"]),
            format_bytes(row["cache_bytes_peak"]),
        )
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.decoding", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--task", choices=tuple(GEN_LENGTH), default="arithmetic",
        help="word problems of 1 to 3 steps; hard: of 4 to 6, which the mini guide was not made for; gsm8k",
    )  # fmt: skip
    p.add_argument(
        "--data", type=command.existing_path, metavar="FILE", help="problems of gsm8k: its test.jsonl, or their folder"
    )
    p.add_argument(
        "--shots",
        type=command.existing_path,
        metavar="FILE",
        help="worked gsm8k problems to put in front of each question",
    )
    p.add_argument(
        "--model",
        type=command.some_text,
        help="mini (a small LLaDA), mini-dream, mini-hard, a folder, or a hub id (default: mini; mini-hard for hard)",
    )
    p.add_argument(
        "--guide",
        type=command.some_text,
        help="none, mini, a folder, or a hub id (default: mini with the mini models, else none)",
    )
    p.add_argument(
        "--grid", type=command.names, default="freecache,freecache+threshold(0.9)", help="cache+rule, ... or all"
    )
    p.add_argument("--n", type=command.question_count, default=20, help="problems (20)")
    p.add_argument("--batch-size", type=command.count, default=1, help="problems that are answered together (1)")
    lengths = ", ".join(f"{tokens} for {task}" for task, tokens in GEN_LENGTH.items())
    add_arguments(p, OPTIONS, gen_length=f"tokens to generate ({lengths})", eos="what an end of text does, in all arms")
    p.add_argument("--seed", type=command.seed, default=0, help="of the random numbers (0)")
    command.add_crew(p, 1, "each with the models; 1 = this one")
    p.add_argument(
        "--device", type=arguments.device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    )
    p.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument(
        "--json", type=command.results_file("eval.decoding"), help="write the rows here; gone on with if it exists"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return command.run("eval.decoding", parser(), work, argv, kept="the same command with --json goes on")


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print."""
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(run(args, argv)))


def run(args: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Checks everything, loads the models, measures; the rows."""
    if args.shots and args.task != "gsm8k":
        raise ValueError("--shots is for --task gsm8k; the arithmetic models need no example")
    args.model = args.model or MODELS.get(args.task, "mini")
    guide = args.guide or (next(iter(MINI_GUIDES)) if args.model in MINI_MODELS else "none")
    plain = from_arguments(args, gen_length=GEN_LENGTH[args.task])
    if not plain.gen_length:
        raise ValueError("gen_length=0 is no number of tokens to generate; these problems have no gaps, use at least 1")
    arms = arms_of(args.grid, plain, guide != "none")
    asks = any(arm.config.guided for arm in arms)
    crew = command.Crew.of(args)
    # Workers on other machines run in other folders.
    where = [x and x.absolute() if crew.elsewhere else x for x in (args.data, args.shots)]
    problems(args.task, args.n, *where, chat=False)  # are they there, before a hub is asked
    known = model_info(args.model, guide if asks else None)
    chat = args.task == "gsm8k" and known.tokenizer.chat_template is not None and args.shots is None
    source = args.task, args.n, *where, chat
    prompts = [known.ids(plain, one.prompt, chat) for one in problems(*source)]
    for arm in arms:
        check_prompt(arm.config, known.spec, prompts[0])
    about = {"task": args.task, "model": args.model, "guide": guide if asks else "none", "batch": args.batch_size}
    about |= {name: getattr(plain, name) for name in OPTIONS if name != "steps"}
    dtype = dtype_of(args.dtype, args.device)
    said = about | {"arms": [arm.name for arm in arms], "steps": plain.steps, "n": args.n, "seed": args.seed}
    said |= {"device": args.device, "dtype": str(dtype), "data": str(args.data), "shots": str(args.shots)}
    meta = run_meta("eval.decoding", argv, args.seed, bench=said)
    read_tallies(arms, meta, args.json)
    setting = Setting(
        args.model, guide if asks else None, args.device, dtype, source, prompts, args.batch_size, args.seed, arms
    )
    return measure(setting, crew, about, meta, known.spec, args.json)


if __name__ == "__main__":
    sys.exit(main())
