"""Recorded actions once more, without the model: the same page, seed and actions must give the same rewards.

What differs is a page that is not reproducible, a changed browser or a damaged trace; the table says which episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentkv.reading import inside, open_picture, read_about, read_picture, read_steps
from agentkv.trace import RUN, STEPS, action_from_dict


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
    screenshots that are equal to the pixel, "same" asks for equal rewards on every step. An episode that is damaged is
    not acted: "damaged" says why.
    """
    run = find_run(folder)
    about = read_about(run)
    for episode in recorded(folder):
        method, task, seed = (unquote(part) for part in episode.parts[-3:])
        row = {"method": method, "task": task, "seed": seed, "steps": 0, "recorded": 0.0, "replayed": 0.0}
        row |= {"screens": 0, "same": False, "damaged": ""}
        try:
            if task not in about["tasks"] or not seed.isdecimal():
                raise ValueError(f"{episode}: {task!r} with seed {seed!r} is not of the run in {run}")
            steps = read_steps(inside(run, episode))
            pictures = [open_picture(read_picture(episode, step["screenshot"])) for step in steps]
        except ValueError as error:
            yield row | {"damaged": str(error)}
            continue
        rewards, screens = _act_again(open_env(task), int(seed), steps, pictures)
        before = [s["reward"] for s in steps]
        yield row | {
            "seed": int(seed),
            "steps": len(steps),
            "recorded": before[-1] if before else 0.0,
            "replayed": rewards[-1] if rewards else 0.0,
            "screens": screens,
            "same": rewards == before,
        }


def _act_again(
    env: Any, seed: int, steps: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]
) -> tuple[list[float], int]:
    """(reward of every step, number of equal screenshots); an unreadable answer did nothing then and does so now."""
    obs, _ = env.reset(seed=seed)
    rewards, equal = [], 0
    for step, picture in zip(steps, pictures, strict=True):
        equal += np.array_equal(obs["screenshot"], np.asarray(picture))
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
