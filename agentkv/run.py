"""`python -m agentkv.run`: a GUI agent plays web tasks with one or several cache methods, side by side on equal seeds.

Everything that can be wrong with the request (method, task, budget, model folder, browser, disk) is checked before any
work; such an error is one line on stderr and exit code 2. The run is a folder of traces (`agentkv.trace`); the table,
`summary.json` and `report.html` are drawn from them, so an interrupted run resumes and loses no finished episode.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from agentkv.agent import Agent
from agentkv.answering import SharedModel
from agentkv.changes import ChangesAgent
from agentkv.envs.browser import Browser
from agentkv.envs.dialogs import POLICIES
from agentkv.errors import EXPLAINED, user_errors
from agentkv.models import AGENTS, EMBEDDED, ModelAdapter, load_adapter
from agentkv.persistent import PersistentAgent
from agentkv.play import LIVE, Plan, Play, open_env, open_folder, task_of
from agentkv.reading import Recorded, read_about, read_run
from agentkv.replay import find_run, recorded, replay, replay_table
from agentkv.report import write_report
from agentkv.stats import UNITS, summarise
from agentkv.tables import method_table, stdout_console, task_table
from agentkv.trace import RUN, need_space
from textkv import resolve_method
from textkv.arguments import budget, device, methods
from textkv.command import (
    count,
    episodes,
    existing_path,
    names,
    output_folder,
    readable_folder,
    results_file,
    run,
    scale,
    seed,
    some_text,
    token_count,
    write_rows,
)
from textkv.provenance import run_meta

# What the embedded model has learned: eight pages of MiniWoB++, three of them with several steps, and four pages that
# need memory.
DEFAULT_TASKS = (
    "click-test",
    "click-tab",
    "click-dialog",
    "click-color",
    "click-collapsible",
    "focus-text-2",
    "enter-text",
    "enter-password",
    "memory-code",
    "memory-colour",
    "memory-order",
    "memory-place",
)
AGENTS_BY_CACHE = {"fresh": Agent, "persistent": PersistentAgent, "changes": ChangesAgent}
EPISODES = 5
HISTORY = 5  # screenshots in a prompt, as in the paper; fewer where the family was trained with fewer
ANSWER = 1024  # until the family is known
EVALUATION_SEEDS = 1_000_000  # training uses the seeds below
REPORT_BYTES = 20_000_000
STEPS_GUESSED = 10  # per episode, to guess the space that the screenshots take
SMALL = 100_000_000  # parameters
VLM_SCALE = 4.0  # a MiniWoB screen of 160 x 210 is too small for a large model; at 4 it is 690 visual tokens
QUERY_HEADS_NOTE = (
    "stores one copy per query head, as released, so its bytes are its share of tokens times the group size."
)


def _is_run(folder: Path) -> bool:
    """Whether the folder is a run: another is moved aside, or gone on with."""
    return (folder / RUN).is_file()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m agentkv.run",
        description="Let a GUI agent play web tasks with compressed KV caches; every method plays the same seeds.",
    )
    p.add_argument(
        "--model", type=some_text, default="mini", help=f"{', '.join(EMBEDDED)}, a folder, or a hub id of a family"
    )
    p.add_argument(
        "--agent",
        type=some_text,
        help=f"prompt and grammar: {', '.join(AGENTS)}, or module:Class; default: the checkpoint's",
    )
    p.add_argument(
        "--tasks", type=names, default=(), help="comma-separated task names (default: those the mini model learned)"
    )
    p.add_argument("--episodes", type=episodes, help="episodes per task and method (default 5; 1 with --url)")
    p.add_argument("--seed", type=seed, default=EVALUATION_SEEDS, help="first seed; training used those below 1000000")
    p.add_argument(
        "--method",
        type=methods(),
        default="gui-kv",
        help="comma-separated methods or compositions: full,gui-kv,h2o+adakv",
    )
    p.add_argument(
        "--budget", type=budget, default="0.4", help="share of the prompt's tokens to keep (0.4), or a number (512t)"
    )
    p.add_argument(
        "--history",
        type=count,
        help="screenshots in a prompt, the current one included (default: the family's, at most 5)",
    )
    p.add_argument(
        "--cache",
        choices=tuple(AGENTS_BY_CACHE),
        help="fresh reads the whole prompt at every step, in the authors' layout; persistent only what is new; changes "
        "of a new screenshot only what looks different (default: what the checkpoint was trained for, as its "
        "agent.json says, else fresh)",
    )
    _add_live_page(p)
    p.add_argument("--headed", action="store_true", help="show the browser window")
    p.add_argument("--chromium", type=some_text, help="path of the browser to use")
    p.add_argument("--device", type=device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--device-scale", type=scale, help="device pixels per CSS pixel of a screenshot")
    p.add_argument("--max-steps", type=count, default=None, help="steps per episode (default: the task's own limit)")
    p.add_argument(
        "--max-new-tokens", type=token_count, help="length limit of one answer (default: the family's; 64 for mini)"
    )
    p.add_argument(
        "--out",
        type=output_folder(_is_run, "python -m agentkv.run"),
        help="run folder (default runs/<time>); an earlier run there is moved aside",
    )
    p.add_argument("--json", type=results_file("agentkv.run"), help="write the figures here too")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out: finished episodes are kept")
    p.add_argument("--replay", type=existing_path, metavar="DIR", help="act a recorded run again, without the model")
    return p


def _add_live_page(p: argparse.ArgumentParser) -> None:
    """A page of the user's in place of tasks, and what the agent may do there."""
    p.add_argument("--url", type=some_text, help="play this live page instead of tasks; needs --goal")
    p.add_argument("--goal", type=some_text, help="what to do on --url, in words")
    p.add_argument("--expect", type=some_text, help="words that the last page of --url shows when the goal was met")
    p.add_argument(
        "--allow", type=names, default=(), help="comma-separated further origins that the page of --url may load from"
    )
    p.add_argument("--dialogs", choices=POLICIES, default="dismiss", help="answer to alert, confirm, prompt (dismiss)")
    p.add_argument(
        "--files", type=readable_folder, metavar="DIR", help="folder whose files the agent may upload (default: none)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 1 when a replay differs, 2 for a request that cannot be carried out, 130 after Ctrl-C."""
    return run(
        "agentkv.run", parser(), work, argv, explained=EXPLAINED, kept="what was recorded is kept, --resume goes on"
    )


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Play, or act a recorded run again."""
    return replay_command(args) if args.replay else play_command(args, argv)


def play_command(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check, play, summarise."""
    with user_errors():
        plan = make_plan(args)
        out = out_folder(args)
        need_space(out, space_needed(plan))
    with open_browser(args, plan) as browser:
        with user_errors():
            adapter = load(plan)
            plan = fitted(plan, args, adapter)
            kind = AGENTS_BY_CACHE[plan.cache]
            agents = {m: kind(adapter, m, plan.budget, plan.max_new_tokens) for m in plan.methods}
            meta = run_meta("agentkv.run", argv, args.seed, chromium=browser.version, units=UNITS)
            open_folder(out, plan, args.resume, meta, notes(plan))
        Play(plan, agents, browser, out, {m: budget_of(m, plan) for m in plan.methods}).run()
    finish(out, args.json)


def make_plan(args: argparse.Namespace) -> Plan:
    """The request as a `Plan`. Raises ValueError naming what is wrong."""
    number = args.episodes if args.episodes is not None else (1 if args.url else EPISODES)
    for method in args.method:
        resolve_method(method, args.budget)
    plan = Plan(
        model=args.model,
        methods=tuple(args.method),
        budget=args.budget,
        tasks=tasks_of(args),
        seeds=tuple(range(args.seed, args.seed + number)),
        history=HISTORY if args.history is None else args.history,
        max_steps=args.max_steps,
        max_new_tokens=ANSWER if args.max_new_tokens is None else args.max_new_tokens,
        device=args.device,
        device_scale=args.device_scale or (1.0 if args.model in EMBEDDED or args.url else VLM_SCALE),
        url=args.url or "",
        goal=args.goal or "",
        allow=tuple(args.allow),
        expect=args.expect or "",
        agent=args.agent,
        dialogs=args.dialogs,
        files=str(args.files or ""),
        cache=args.cache or "fresh",
    )
    for task in plan.tasks:
        task_of(task, plan)
    return plan


def tasks_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The tasks asked for. Raises ValueError when they and --url do not fit together."""
    if bool(args.url) != bool(args.goal):
        raise ValueError("--url and --goal belong together: give the address of a page and what to do there")
    if args.expect and not args.url:
        raise ValueError("--expect is for --url; tasks know themselves when they are solved")
    if args.url and args.tasks:
        raise ValueError("--url and --tasks exclude each other: a live page is a task of its own")
    return (LIVE,) if args.url else tuple(args.tasks) or DEFAULT_TASKS


def load(plan: Plan, weights: bool = True) -> ModelAdapter:
    """The model of the plan, quietly; bf16 on a GPU, fp32 on a CPU; without `weights` for one that is run elsewhere."""
    logging.disable_progress_bar()
    try:
        dtype = torch.bfloat16 if "cuda" in plan.device else torch.float32
        adapter = load_adapter(plan.model, plan.device, dtype, plan.agent, weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model {plan.model}: {str(error).splitlines()[0]}") from error
    if not weights:
        return adapter
    if plan.device == "cpu" and adapter.model.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        # A small model gains nothing from threads, and waits for them as soon as the browser wants a core.
        torch.set_num_threads(1)
    return adapter


def load_shared(plan: Plan) -> SharedModel:
    """The same model for agents in other processes."""
    return SharedModel(load(plan).model)


def fitted(plan: Plan, args: argparse.Namespace, adapter: ModelAdapter) -> Plan:
    """The plan with what the command line left to the family: scale, screenshots in a prompt, length of an answer, and
    whether the cache lives from step to step."""
    return replace(
        plan,
        device_scale=args.device_scale or fitting_scale(plan, adapter),
        history=args.history or min(HISTORY, adapter.history_frames),
        max_new_tokens=args.max_new_tokens or adapter.answer_tokens,
        cache=args.cache or adapter.cache,
    )


def fitting_scale(plan: Plan, adapter: ModelAdapter) -> float:
    """The plan's scale, or 1 for a small model, whose image processor would only shrink such screenshots again."""
    pixels = max(width * height for width, height in (task_of(t, plan).viewport for t in plan.tasks))
    return plan.device_scale if pixels * plan.device_scale**2 <= adapter.processor.size["longest_edge"] else 1.0


def budget_of(method: str, plan: Plan) -> float | str:
    """The figure "budget" of a method's rows: a share as a number, tokens as "512t"; the full cache has no budget."""
    budget = resolve_method(method, plan.budget).budget
    if method == "full":
        return 1.0
    return str(budget) if budget.fraction is None else budget.fraction


def out_folder(args: argparse.Namespace) -> Path:
    """Where the run goes. Raises ValueError for a --resume that does not say which run."""
    if args.resume and args.out is None:
        raise ValueError("--resume needs --out DIR: the folder of the run to go on with")
    return args.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def space_needed(plan: Plan) -> int:
    """Bytes that the screenshots and the page will take, roughly: half a byte per pixel of flat colours."""
    pixels = sum(width * height for width, height in (task_of(t, plan).viewport for t in plan.tasks))
    shots = len(plan.seeds) * len(plan.methods) * STEPS_GUESSED * pixels * plan.device_scale**2
    return int(shots * 0.5) + REPORT_BYTES


def notes(plan: Plan) -> list[str]:
    """Footnotes of the table."""
    fat = [m for m in plan.methods if resolve_method(m).capabilities.stores_query_heads]
    return [f"{', '.join(fat)}: {QUERY_HEADS_NOTE}"] if fat else []


def finish(out: Path, extra: Path | None) -> None:
    """Draw the table, summary.json and report.html from the traces in `out`, and say where they are."""
    recorded = read_run(out)
    about, rows = recorded.about, summarise(recorded.episodes)
    for path in (out / "summary.json", extra):
        write_rows(path, about["meta"], rows)
    page = write_report(out)
    console = stdout_console()
    console.print(method_table(rows))
    for note in (*about["notes"], *left_out(recorded)):
        console.print(note)
    if len(about["tasks"]) > 1:
        console.print(task_table(rows))
    print(*filter(None, (out / "summary.json", extra, page)), sep="\n")


def left_out(recorded: Recorded) -> list[str]:
    """A note if episodes are damaged: how many, and the first."""
    lines = recorded.damaged
    return [f"{len(lines)} damaged, left out, and played again by --resume: {lines[0]}"] if lines else []


def open_browser(args: argparse.Namespace, plan: Plan) -> Browser:
    """The browser of the command line; a live page keeps the machine's fonts, tasks are drawn with the project's."""
    return Browser(args.chromium, args.headed, machine_fonts=bool(plan.url))


def replay_command(args: argparse.Namespace) -> int:
    """Act recorded episodes again; 1 when a reward differs."""
    with user_errors():
        about = read_about(find_run(args.replay))
        recorded(args.replay)
        plan = Plan(**{f.name: about[f.name] for f in fields(Plan) if f.name in about})
    with open_browser(args, plan) as browser, user_errors():
        rows = list(replay(args.replay, cache(lambda task: open_env(task, plan, browser))))
    for row in rows:
        if row["damaged"]:
            print(row["damaged"], file=sys.stderr)
    stdout_console().print(replay_table(rows))
    wrong = [r for r in rows if not r["same"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} episodes gave the same rewards")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
