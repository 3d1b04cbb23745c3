"""Scripted solutions of the tasks: training data, end-to-end tests and proof that every task can be solved.

`solve(env)` looks at the live page before each action and yields one action at a time; the caller steps the
environment. `describe(env)` lists what is on the screen and where, for grounding data. `python -m envs.oracle
--seeds 50` checks every script and prints a table; it exits with 1 when a single seed fails.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from . import catalogue
from .actions import Action
from .browser import Browser
from .scripted import memory, miniwob, sites
from .scripted.look import LOOK, Look
from .web import WebEnv

SCRIPTS = {**memory.SCRIPTS, **miniwob.SCRIPTS, **sites.SCRIPTS}


def task_ids() -> list[str]:
    """The tasks of `envs.task_ids()` and `envs.site_ids()` that have a script."""
    return list(SCRIPTS)


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
() => {{
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
    const points = hits(e);
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


def describe(env: WebEnv) -> list[dict[str, object]]:
    """Every visible element of the screen: `text` (its label, "" if it has none), `kind`, `box` and `points`.

    box: [x, y, width, height] in CSS px, clipped to the screen. points: [[x, y], ...] at which a click reaches it.
    Kinds: button, link, tab, text, field, password, checkbox, radio, textarea, select, shape, swatch, character.
    """
    if env.tab is None:
        raise RuntimeError("there is no episode yet; call reset() first")
    return env.tab.evaluate(_DESCRIBE)


def run(env: WebEnv, seed: int, rng: random.Random | None = None) -> tuple[float, int]:
    """One scripted episode: (raw reward, steps)."""
    _, info = env.reset(seed=seed)
    for action in solve(env, rng):
        *_, info = env.step(action)
    return info["raw_reward"], info["steps"]


def check(ids: Sequence[str], seeds: int, first: int = 0, jitter: bool = False) -> list[dict[str, object]]:
    """Solve every task on `seeds` seeds from `first`; rows with task, seeds, solved, steps (mean) and the failed seeds.

    Each finished task is reported on stderr, because a full check takes minutes.
    """
    rows: list[dict[str, object]] = []
    with Browser() as browser:
        for task_id in ids:
            env = catalogue.make(task_id, browser, reuse_tab=True)
            runs = {}
            for seed in range(first, first + seeds):
                rng = random.Random(seed) if jitter else None
                try:
                    runs[seed] = run(env, seed, rng)
                except Exception as error:  # a script that is lost is a failed seed; the table must go on
                    runs[seed] = (0.0, 0)
                    print(f"{task_id} seed {seed}: {error}", file=sys.stderr)
            env.close()
            failed = [seed for seed, (reward, _) in runs.items() if reward != 1]
            steps = sum(count for _, count in runs.values()) / max(len(runs), 1)
            solved = seeds - len(failed)
            rows.append({"task": task_id, "seeds": seeds, "solved": solved, "steps": steps, "failed": failed})
            print(f"{task_id}: {solved} of {seeds}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command: prints the table, returns 1 when a seed fails."""
    parser = argparse.ArgumentParser(prog="python -m envs.oracle", description="Check the scripted solutions.")
    parser.add_argument("--seeds", type=int, default=50, help="seeds per task (default 50)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--task", action="append", choices=task_ids(), help="only this task; may be repeated")
    parser.add_argument("--jitter", action="store_true", help="spread the click points inside their elements")
    options = parser.parse_args(argv)
    rows = check(options.task or task_ids(), options.seeds, options.first, options.jitter)
    table = Table("task", "seeds", "solved", "steps", "failed seeds")
    for row in rows:
        table.add_row(
            str(row["task"]), str(row["seeds"]), str(row["solved"]), f"{row['steps']:.1f}", str(row["failed"] or "")
        )
    Console(width=100).print(table)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
