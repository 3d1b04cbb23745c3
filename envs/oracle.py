"""Scripted solutions of the tasks: training data, end-to-end tests and proof that every task can be solved.

`solve(env)` looks at the live page before each action and yields one action at a time; the caller steps the
environment. `describe(env)` lists what is on the screen and where, for grounding data. `python -m envs.oracle
--seeds 50` checks every script and prints a table; `--sites` does so for the tasks on sites, beside a policy of random
actions. It exits with 1 when a single seed of a script fails.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from textkv import command as commands

from . import catalogue
from .actions import Action
from .browser import Browser, ChromiumMissing
from .miniwob import MiniwobMissing
from .scripted import across, memory, miniwob, sites
from .scripted.look import LOOK, Look
from .sites import SITES, SitesMissing
from .web import WebEnv

SCRIPTS = {**memory.SCRIPTS, **miniwob.SCRIPTS, **sites.SCRIPTS, **across.SCRIPTS}


def task_ids() -> list[str]:
    """The tasks that have a script, but those of sites: these need pages that are fetched (`catalogue.site_ids`)."""
    return [name for name in SCRIPTS if name not in SITES]


def solve(env: WebEnv, rng: random.Random | None = None) -> Iterator[Action]:
    """Actions that solve the running episode, each chosen after the one before was executed by `env.step`.

    The same seed gives the same actions; `rng` spreads the click points inside their elements. Stops when the
    episode is over. Raises ValueError for a task without a script.
    """
    script = SCRIPTS.get(env.task.id)
    if script is None:
        raise ValueError(f"there is no script for {env.task.id!r}; scripts exist for {', '.join(SCRIPTS)}")
    if env.tab is None:
        raise RuntimeError("there is no episode yet; call reset() first")
    for action in script(Look(env.tab, env.goal, rng)):
        yield action
        if env.over:
            return


_DESCRIBE = f"""
(most) => {{
  {LOOK}
  const NATIVE = 'a, button, input, select, textarea, [role=button], [role=tab], [onclick], '
    + '[data-label], .alink, .color';
  const DRAWN = 'svg circle, svg rect, svg polygon, svg text';
  const quiet = '#query, #reward-display, #sync-task-cover, #click-canvas, script, style';
  const tidy = (text) => (text || '').replace(/\\s+/g, ' ').trim();
  const ownText = (e) => tidy([...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(' '));
  const FORMS = {{rect: 'rectangle', polygon: 'triangle', circle: 'circle'}};
  const kind = (e) => {{
    const tag = e.tagName.toLowerCase();
    if (e.dataset.label) return e.matches('svg') ? 'shape' : 'swatch';
    if (e.dataset.color) return 'swatch';
    if (tag === 'input') return /^(text|search|email|number|tel|url)$/.test(e.type) ? 'field' : e.type;
    if (e.matches(DRAWN)) return tag === 'text' ? 'character' : 'shape';
    if (e.matches('[role=tab], .ui-tabs-anchor')) return 'tab';
    if (e.matches('.alink, a')) return 'link';
    return e.matches(NATIVE) ? tag : 'text';
  }};
  const label = (e) => {{
    const tag = e.tagName.toLowerCase();
    if (e.dataset.label) return e.dataset.label;
    if (e.dataset.color) return e.dataset.color;
    if (e.matches('svg text')) return `${{e.getAttribute('fill') || ''}} ${{tidy(e.textContent)}}`.trim();
    if (e.matches(DRAWN)) return e.id || `${{e.getAttribute('fill') || ''}} ${{FORMS[tag]}}`.trim();
    if (tag === 'input' && /^(button|submit)$/.test(e.type)) return e.value;
    if (e.labels && e.labels.length) return tidy(e.labels[0].textContent);
    const before = e.matches('input, textarea') && e.previousElementSibling;
    if (before && before.tagName === 'LABEL') return tidy(before.textContent);
    if (e.matches('input, textarea')) return tidy(e.getAttribute('aria-label') || e.placeholder || e.value);
    return tidy(e.title || '') && !tidy(e.textContent) ? tidy(e.title) : tidy(e.textContent);
  }};
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {{
    if (e.closest(quiet)) continue;
    const inside = e.parentElement.closest(NATIVE);
    const wanted = e.matches(NATIVE) || e.matches(DRAWN) || ownText(e);
    if (!wanted || (inside && !e.matches(NATIVE))) continue;
    if ([...e.querySelectorAll(NATIVE)].some((inner) => label(inner) === label(e))) continue;
    const points = hits(e, most);
    if (!points.length) continue;
    const r = e.getBoundingClientRect();
    const [x, y] = [Math.max(r.left, 0), Math.max(r.top, 0)];
    found.push({{
      text: label(e), kind: kind(e),
      box: [x, y, Math.min(r.right, innerWidth) - x, Math.min(r.bottom, innerHeight) - y], points,
    }});
  }}
  return found;
}}
"""


def describe(env: WebEnv, most: int = 81) -> list[dict[str, object]]:
    """Every visible element of the screen: `text` (its label, "" if it has none), `kind`, `box` and `points`.

    box: [x, y, width, height] in CSS px, clipped to the screen. points: [[x, y], ...] at which a click reaches it, at
    most `most` of the 81 that are tried: one is enough to know that it is visible, and most are found at the first try.
    Kinds: button, link, tab, text, field, password, checkbox, radio, textarea, select, shape, swatch, character.
    """
    if env.tab is None:
        raise RuntimeError("there is no episode yet; call reset() first")
    return env.tab.evaluate(_DESCRIBE, most)


def run(env: WebEnv, seed: int, rng: random.Random | None = None) -> tuple[float, int]:
    """One scripted episode: (raw reward, steps)."""
    _, info = env.reset(seed=seed)
    for action in solve(env, rng):
        *_, info = env.step(action)
    return info["raw_reward"], info["steps"]


def by_chance(env: WebEnv, seed: int) -> tuple[float, int]:
    """One episode of random actions (`ActionSpace.sample`): (raw reward, steps)."""
    env.action_space.seed(seed)
    _, info = env.reset(seed=seed)
    while not env.over:
        *_, info = env.step(env.action_space.sample())
    return info["raw_reward"], info["steps"]


def check(
    ids: Sequence[str], seeds: int, first: int = 0, jitter: bool = False, policy: str = "script"
) -> Iterator[dict[str, object]]:
    """Play every task on `seeds` seeds from `first`, by its script or at random (`policy`).

    Rows, as they come: policy, task, n, solved, success with its 95 % interval (low, high), steps (mean), failed (the
    seeds). Each finished task is reported on stderr too, because a full check takes minutes.
    """
    with Browser() as browser:
        for task_id in ids:
            env = catalogue.make(task_id, browser, reuse_tab=True)
            runs = {}
            for seed in range(first, first + seeds):
                rng = random.Random(seed) if jitter else None
                try:
                    runs[seed] = by_chance(env, seed) if policy == "random" else run(env, seed, rng)
                except Exception as error:  # a script that is lost is a failed seed; the table must go on
                    runs[seed] = (0.0, 0)
                    print(f"{task_id} seed {seed}: {error}", file=sys.stderr)
            env.close()
            row = _row(policy, task_id, runs)
            print(f"{policy} {task_id}: {row['solved']} of {seeds}", file=sys.stderr)
            yield row


def _row(policy: str, task: str, runs: Mapping[Any, tuple[float, int]]) -> dict[str, object]:
    failed = [seed for seed, (reward, _) in runs.items() if reward != 1]
    solved = len(runs) - len(failed)
    low, high = _interval(solved, len(runs))
    steps = sum(count for _, count in runs.values()) / max(len(runs), 1)
    row = {"policy": policy, "task": task, "n": len(runs), "solved": solved, "success": solved / max(len(runs), 1)}
    return row | {"low": low, "high": high, "steps": steps, "failed": failed}


def _interval(solved: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval; this folder imports no other of ours, so not the one of `textkv`."""
    if n == 0:
        return 0.0, 1.0
    middle, half = solved + z * z / 2, z * math.sqrt(solved * (n - solved) / n + z * z / 4)
    return max((middle - half) / (n + z * z), 0.0), min((middle + half) / (n + z * z), 1.0)


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """One row over the tasks of `rows`; `failed` holds task and seed."""
    n, solved = sum(row["n"] for row in rows), sum(row["solved"] for row in rows)
    low, high = _interval(solved, n)
    steps = sum(row["steps"] * row["n"] for row in rows) / max(n, 1)
    row = {"policy": rows[0]["policy"], "task": "all", "n": n, "solved": solved, "success": solved / max(n, 1)}
    failed = [[row["task"], seed] for row in rows for seed in row["failed"]]
    return row | {"low": low, "high": high, "steps": steps, "failed": failed}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tasks, what was solved, the mean number of steps; failures of the scripts by seed."""
    made = Table("policy", "task", "solved", "success", "95 % interval", "steps", "failed seeds")
    for row in rows:
        failed = str(row["failed"]) if row["failed"] and row["policy"] == "script" and row["task"] != "all" else ""
        share = f"{row['low']:.1%} .. {row['high']:.1%}"
        cells = (f"{row['solved']} of {row['n']}", f"{row['success']:.1%}", share, f"{row['steps']:.1f}", failed)
        made.add_row(str(row["policy"]), str(row["task"]), *cells)
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m envs.oracle", description="Check the scripted solutions.")
    p.add_argument("--sites", action="store_true", help="the tasks of envs.sites, by script and at random")
    p.add_argument("--seeds", type=commands.natural, help="seeds per task (default 50, with --sites 3)")
    p.add_argument(
        "--random", type=commands.natural, help="episodes of random actions per task (default 0, with --sites 4)"
    )
    p.add_argument("--first", type=commands.seed, default=0, help="first seed (default 0)")
    p.add_argument("--task", action="append", choices=list(SCRIPTS), help="only this task; may be repeated")
    p.add_argument("--jitter", action="store_true", help="spread the click points inside their elements")
    p.add_argument("--json", type=commands.results_file("envs.oracle"), help="write the figures here too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 when a script fails on a seed, else as `textkv.command.run` says."""
    return commands.run("envs.oracle", parser(), work, argv, explained=(ChromiumMissing, MiniwobMissing, SitesMissing))


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Play, and print the table."""
    ids = args.task or (catalogue.site_ids() if args.sites else task_ids())
    seeds = (3 if args.sites else 50) if args.seeds is None else args.seeds
    chances = (4 if args.sites else 0) if args.random is None else args.random
    command = shlex.join(["python", "-m", "envs.oracle", *argv])
    meta = {"command": command, "seeds": seeds, "random": chances, "first": args.first}
    rows: list[dict[str, object]] = []
    for policy, episodes in (("script", seeds), ("random", chances)):
        for row in check(ids, episodes, args.first, args.jitter and policy == "script", policy) if episodes else ():
            rows.append(row)
            commands.write_rows(args.json, meta, rows)
    parts = [[row for row in rows if row["policy"] == policy] for policy in ("script", "random")]
    rows += [total(part) for part in parts if part]
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    commands.write_rows(args.json, meta, rows)
    return int(any(row["failed"] for row in parts[0]))


if __name__ == "__main__":
    sys.exit(main())
