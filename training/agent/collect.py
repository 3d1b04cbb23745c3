"""Record oracle episodes for training: `python -m training.agent.collect --minutes 60`.

A scripted solution plays real pages at training seeds; every screenshot is kept with the action taken there and, for
grounding, with questions about what else is on the screen. Files are added to the folder round by round, so
a trainer can read along; a second start goes on with fresh seeds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentkv import envs
from agentkv.envs import oracle
from agentkv.envs.actions import Action, Click, Finished, Type
from agentkv.envs.browser import Browser
from agentkv.errors import EXPLAINED
from textkv.command import count, output_folder, positive, run, seed
from training.agent.drawn import click, say, snap
from training.agent.episodes import write_episodes
from training.agent.shape import RESIZED
from training.agent.tasks import TASKS

FIRST_EVALUATION_SEED = 1_000_000
_POINTED = ("button", "link", "tab", "field", "password", "checkbox", "radio", "textarea", "shape", "swatch")


def answer_of(action: Action, size: tuple[int, int]) -> str:
    """The action in the model's words; `size` = CSS (width, height) of the screenshot. Raises ValueError for other
    kinds.
    """
    if isinstance(action, Click):
        return click(action.x, action.y, size)
    if isinstance(action, Type) and not set(action.text) & set("\\'\n"):
        return f"Action: type(content='{action.text}')"
    if isinstance(action, Finished):
        return say(action.answer)
    raise ValueError(f"the mini model is not trained on {action!r}")


def questions(elements: list[dict[str, Any]], size: tuple[int, int], rng: random.Random) -> list[list[str]]:
    """Grounding questions about the elements of a screen (`envs.oracle.describe`): [goal, answer, task] each."""
    names = [str(e["text"]).strip() for e in elements]
    asks = []
    for element, name in zip(elements, names, strict=True):
        if not 0 < len(name) <= 14 or names.count(name) > 1 or "'" in name or '"' in name:
            continue
        x, y = element["box"][0] + element["box"][2] / 2, element["box"][1] + element["box"][3] / 2
        if element["kind"] in _POINTED:
            goal = rng.choice((f'Click on the "{name}" {element["kind"]}.', f"Click on {name}.", f'Click on "{name}".'))
            asks.append([goal, click(x, y, size), f"real-{element['kind']}"])
        px, py = snap(x, size[0], RESIZED[0]), snap(y, size[1], RESIZED[1])
        asks.append([f"Read ({px},{py})", say(name), "real-read"])
    return asks


def record(env: envs.WebEnv, seed: int, screens: list[np.ndarray], rng: random.Random) -> dict | None:
    """Play one episode, append its screenshots to `screens`; None if the script failed on this seed."""
    observation, info = env.reset(seed=seed)
    height, width, _ = observation["screenshot"].shape
    steps = []
    for action in oracle.solve(env):
        asks = questions(oracle.describe(env), (width, height), rng)
        steps.append({"screen": len(screens), "answer": answer_of(action, (width, height)), "asks": asks})
        screens.append(observation["screenshot"])
        observation, _, _, _, info = env.step(action)
    if not info["success"]:
        return None
    return {"task": env.task.id, "seed": seed, "goal": observation["goal"], "steps": steps}


def collect(folder: Path, tasks: list[str], minutes: float, each: int, start: int) -> None:
    """Rounds of `each` episodes per task, one file per task and round, until `minutes` have passed."""
    begin, rng = time.monotonic(), random.Random(start)
    with Browser() as browser:
        pages = {task: envs.make(task, browser) for task in tasks}
        seed = start
        while time.monotonic() - begin < minutes * 60:
            for task, env in pages.items():
                screens: list[np.ndarray] = []
                found = [record(env, s, screens, rng) for s in range(seed, seed + each)]
                episodes = [episode for episode in found if episode]
                if episodes:
                    write_episodes(folder / f"{task}-{seed:07d}.npz", screens, episodes)
                print(f"{time.monotonic() - begin:.0f} s {task} seed {seed}: {len(episodes)}/{each}", flush=True)
                if time.monotonic() - begin > minutes * 60:
                    return
            seed += each
            each = min(2 * each, 40)
            if seed + each > FIRST_EVALUATION_SEED:
                raise ValueError(f"seed {seed} would enter the evaluation seeds; use --start 0")


def next_seed(folder: Path) -> int:
    """The first seed after those recorded in `folder`."""
    seeds = [int(path.stem.rsplit("-", 1)[1]) for path in folder.glob("*.npz")]
    return max(seeds, default=-100) + 100


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.agent.collect", description=__doc__.split("\n\n")[0])
    own = output_folder(lambda folder: any(folder.glob("*.npz")), "python -m training.agent.collect")
    p.add_argument("--folder", type=own, default="runs/mini/episodes", help="where the episodes go")
    p.add_argument("--minutes", type=positive, default=60.0, help="until it ends (60)")
    p.add_argument("--each", type=count, default=4, help="episodes per task in the first round (doubles up to 40)")
    p.add_argument("--task", action="append", choices=TASKS, help="only this task; may be repeated")
    p.add_argument("--start", type=seed, help="first seed (default: after the recorded ones)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.agent.collect", parser(), work, argv, explained=EXPLAINED)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Record."""
    start = next_seed(args.folder) if args.start is None else args.start
    collect(args.folder, args.task or list(TASKS), args.minutes, args.each, start)


if __name__ == "__main__":
    sys.exit(main())
