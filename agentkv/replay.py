"""Recorded actions once more, without the model: the same page, seed and actions must give the same rewards.

What differs is a page that is not reproducible, a changed browser or a damaged trace; the table says which episode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentkv.trace import RUN, STEPS, action_from_dict, read_steps


def find_run(folder: Path) -> Path:
    """The run that `folder` is, or that the episode `folder` belongs to. Raises ValueError when there is none."""
    for place in (folder.resolve(), *folder.resolve().parents[:4]):
        if (place / RUN).exists():
            return place
    raise ValueError(f"{folder} is neither a run nor an episode of one: no {RUN} in it or above it")


def recorded(folder: Path) -> list[Path]:
    """The episode folders in or below `folder`, unfinished ones included. Raises ValueError when there are none."""
    found = sorted(p.parent for p in folder.resolve().rglob(STEPS))
    if not found:
        raise ValueError(f"{folder} holds no recorded episode (no {STEPS})")
    return found


def replay(folder: Path, open_env: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Replay every episode in `folder`, yielding a dict per episode.

    `open_env(task)` gives the environment. "recorded" and "replayed" are the last rewards, "screens" counts the
    screenshots that are equal to the pixel, "same" asks for equal rewards on every step.
    """
    run = find_run(folder)
    about = json.loads((run / RUN).read_text())
    for episode in recorded(folder):
        method, task, seed = (unquote(part) for part in episode.parts[-3:])
        steps = read_steps(episode)
        if task not in about["tasks"]:
            raise ValueError(f"{episode}: {task!r} is no task of the run in {run}")
        rewards, screens = _act_again(open_env(task), int(seed), steps, episode)
        before = [s["reward"] for s in steps]
        yield {
            "method": method,
            "task": task,
            "seed": int(seed),
            "steps": len(steps),
            "recorded": before[-1] if before else 0.0,
            "replayed": rewards[-1] if rewards else 0.0,
            "screens": screens,
            "same": rewards == before,
        }


def _act_again(env: Any, seed: int, steps: list[dict[str, Any]], folder: Path) -> tuple[list[float], int]:
    """(reward of every step, number of equal screenshots); an unreadable answer did nothing then and does so now."""
    obs, _ = env.reset(seed=seed)
    rewards, equal = [], 0
    for step in steps:
        equal += np.array_equal(obs["screenshot"], np.asarray(Image.open(folder / step["screenshot"]).convert("RGB")))
        if step["action"] is None:
            rewards.append(0.0)
            continue
        obs, _, terminated, truncated, info = env.step(action_from_dict(step["action"]))
        rewards.append(float(info["raw_reward"]))
        if terminated or truncated:
            break
    return rewards, equal


def replay_table(rows: list[dict[str, Any]]) -> Table:
    """What `replay` yielded, one line per episode."""
    table = Table(title="recorded actions, played again", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for name in ("method", "task"):
        table.add_column(name)
    for name in ("seed", "steps", "reward then", "reward now", "equal screens", "same"):
        table.add_column(name, justify="right")
    for r in rows:
        cells = (r["method"], r["task"], r["seed"], r["steps"], f"{r['recorded']:.2f}", f"{r['replayed']:.2f}")
        table.add_row(*map(str, cells), f"{r['screens']} of {r['steps']}", "yes" if r["same"] else "NO")
    return table
