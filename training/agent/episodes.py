"""Recorded oracle episodes on disk: one .npz (screenshots, uint8) with its JSON header per file, no pickle.

A file holds many episodes of one task: `screens` [N, height, width, 3], and `episodes`, a JSON text: a list of
{"task", "seed", "goal", "steps": [{"screen": index, "answer": text, "asks": [[goal, answer, task], ...]}, ...]}.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from textkv.records import checked, listed, parse
from training.agent.drawn import think
from training.agent.packing import Ask, Turn
from training.agent.tasks import MEMORY

# earlier screenshots in a prompt: as `agentkv.run` does by default, and all that the model was made for
HISTORY_FRAMES = (4, 8)


def write_episodes(path: Path, screens: list[np.ndarray], episodes: list[dict]) -> None:
    """Write one file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, screens=np.stack(screens), episodes=np.array(json.dumps(episodes)))
    os.replace(partial, path)


class EpisodeStore:
    """All recorded episodes of a folder, by task; new files are picked up by `refresh` at most every 20 seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_task: dict[str, list[tuple[np.ndarray, dict]]] = {}
        self._known: set[str] = set()
        self._checked = 0.0

    def __len__(self) -> int:
        return sum(len(episodes) for episodes in self.by_task.values())

    def refresh(self) -> None:
        """Read the files that came since the last look."""
        if time.monotonic() - self._checked < 20.0 and self._known:
            return
        self._checked = time.monotonic()
        for path in sorted(self.folder.glob("*.npz")):
            if path.name not in self._known:
                self._known.add(path.name)
                try:
                    self._take(path)
                except (OSError, ValueError, LookupError, EOFError, BadZipFile) as error:
                    print(f"{path}: {' '.join(str(error).split())}; left out", file=sys.stderr)

    def _take(self, path: Path) -> None:
        """All episodes of a file, or none."""
        with np.load(path) as data:
            screens, found = data["screens"], listed(parse(str(data["episodes"])), dict, "episodes")
        if not found:
            raise ValueError("it holds no episode")
        for episode in found:
            checked(episode, {"task": str, "goal": str, "steps": list})
            for step in listed(episode["steps"], dict, "steps"):
                if not 0 <= checked(step, {"screen": int, "answer": str, "asks": list})["screen"] < len(screens):
                    raise ValueError(f"there is no screen {step['screen']}")
        for episode in found:
            self.by_task.setdefault(episode["task"], []).append((screens, episode))

    def sample(self, rng: random.Random) -> list[Turn]:
        """A random task's random episode as turns; long episodes keep the screenshots of one window of steps, as
        prompts do.
        """
        screens, episode = rng.choice(self.by_task[rng.choice(list(self.by_task))])
        return turns_of(screens, episode, rng)


def _named(step: dict) -> str:
    """What the step's action is for, in the words of the drawn replicas (`training.agent.drawn_memory`)."""
    typed = re.match(r"Action: type\(content='(.*)'\)", step["answer"])
    names = [goal for goal, answer, task in step["asks"] if answer == step["answer"]]
    if typed or not names:
        return typed.group(1) if typed else "field"
    quoted = re.match(r'Click on (?:the )?"?(?:field (?=\d))?(.+?)"?(?: button| shape| swatch)?\.$', names[0])
    return quoted.group(1) if quoted else "field"


def thoughtful(episode: dict) -> list[tuple[str, str]]:
    """(answer, task it counts for) per step: on pages that need memory, the answer says first what it is for."""
    steps, task = episode["steps"], episode["task"]
    if task not in MEMORY:
        return [(step["answer"], task) for step in steps]
    names = [_named(step) for step in steps]
    return [
        (think(name, step["answer"]), "memory-next" if name in ("Next", "field", "OK") else task)
        for name, step in zip(names, steps, strict=True)
    ]


def turns_of(screens: np.ndarray, episode: dict, rng: random.Random) -> list[Turn]:
    """Turns of one episode. Where it is longer than a prompt's history, one window ends at a random step: earlier steps
    are text, and only the last step of the window is asked (the others would see too little)."""
    steps, goal, said = episode["steps"], episode["goal"], thoughtful(episode)
    last, blind, frames = len(steps) - 1, rng.random() < 0.05, rng.choice(HISTORY_FRAMES)
    long = last > frames
    if blind or (long and rng.random() < 0.8):
        last = rng.randint(0 if blind else frames + 1, last) if last else 0
    elif long:
        last = frames
    only_last = blind or last > frames
    first_frame = last if blind else max(0, last - frames)
    turns = []
    for index, step in enumerate(steps[: last + 1]):
        image = screens[step["screen"]] if index >= first_frame else None
        asks = []
        if image is not None and not (only_last and index < last):
            asks = [Ask(goal, *said[index])]
            extra = step.get("asks", [])
            asks += [Ask(*ask) for ask in rng.sample(extra, min(len(extra), 6))]
        turns.append(Turn(image, asks, said[index][0] if index < last else None, goal))
    return turns
