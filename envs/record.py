"""`python -m envs.record --out DIR`: scripted episodes as recorded tasks, in the layout of AgentNetBench.

    DIR/<task>-<seed>.json         goal and steps: picture, right action with the box of its element, words about it
    DIR/images/<task>-<seed>_<step>.png

So an evaluation of next actions runs on real pages without anything to download. Points are shares of the screen, as in
the benchmark. Episodes that are there already are passed over; a script that fails on its seed leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from textkv.command import choices, episodes, output_folder, run, scale, seed, some_text

from . import oracle
from .actions import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    TripleClick,
    Type,
)
from .browser import Browser, ChromiumMissing
from .catalogue import make, site_ids
from .memory import PAGES
from .miniwob import MiniwobMissing
from .sites import SitesMissing
from .web import WebEnv

FORMATS = ("agentnetbench",)
FIRST_SEED = 1_000_000  # the embedded models are trained on seeds below
FIELDS = ("field", "password", "textarea")
POINTED: dict[type, str] = {
    Click: "click",
    DoubleClick: "doubleClick",
    RightClick: "rightClick",
    MiddleClick: "middleClick",
    TripleClick: "tripleClick",
    Move: "moveTo",
}
Element = dict[str, Any]


def shares(x: float, y: float, size: tuple[int, int]) -> dict[str, float]:
    """A CSS point as shares of the screen, with 4 digits as published recordings have."""
    return {"x": round(x / size[0], 4), "y": round(y / size[1], 4)}


def element_at(elements: Sequence[Element], x: float, y: float) -> Element | None:
    """The smallest element of `oracle.describe` whose box holds a CSS point."""
    holding = [
        one
        for one in elements
        if one["box"][0] <= x <= one["box"][0] + one["box"][2] and one["box"][1] <= y <= one["box"][1] + one["box"][3]
    ]
    return min(holding, key=lambda one: one["box"][2] * one["box"][3], default=None)


def boxes(element: Element | None, size: tuple[int, int], scale: float) -> dict[str, Any]:
    """`metadata` of an action on an element: where a click counts as right."""
    if element is None:
        return {}
    x, y, width, height = element["box"]
    relative = [x / size[0], y / size[1], width / size[0], height / size[1]]
    pixels = [side * scale for side in element["box"]]
    return {"bboxes": [{"category_id": 1, "rel_bbox": relative, "abs_bbox": pixels, "area": pixels[2] * pixels[3]}]}


def recorded(action: Action, element: Element | None, size: tuple[int, int], scale: float) -> list[dict[str, Any]]:
    """An action as a list of atomic ones. Raises ValueError for one that the layout has no words for."""
    about = boxes(element, size, scale)
    match action:
        case _ if type(action) in POINTED:
            return [_atom(POINTED[type(action)], {"position": shares(action.x, action.y, size)}, about)]
        case Drag(x, y, to_x, to_y) if x is not None and y is not None:
            start = _atom("moveTo", {"position": shares(x, y, size)}, about)
            return [start, _atom("dragTo", {"position": shares(to_x, to_y, size)})]
        case Scroll(x, y, way, pixels) if x is not None and y is not None:
            place = {"position": shares(x, y, size)}
            clicks = max(round(pixels / 100), 1) * (1 if way in ("up", "right") else -1)
            kind = "scroll" if way in ("up", "down") else "hscroll"
            return [_atom("moveTo", place, about), _atom(kind, place | {"amount": clicks})]
        case Type(text):
            return [_atom("write", {"text": text})]
        case Hotkey(keys):
            return [_atom("press" if len(keys) == 1 else "hotkey", {"keys": [_key(key) for key in keys]})]
        case Finished(_, status):
            return [_atom("terminate", {"status": status})]
    raise ValueError(f"a recording has no words for {action!r}")


def _key(name: str) -> str:
    """pyautogui's name of one of Playwright's keys."""
    return {"Control": "ctrl"}.get(name, name.removeprefix("Arrow").lower())


def _atom(kind: str, params: dict[str, Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "params": params, "metadata": metadata or {}}


def code(atoms: Sequence[dict[str, Any]]) -> str:
    """The same as lines of pyautogui, as recordings carry them beside the ground truth."""
    return "\n".join(_line(atom["type"], atom["params"]) for atom in atoms)


def _line(kind: str, params: dict[str, Any]) -> str:
    match kind:
        case "write":
            return f"pyautogui.write(message={params['text']!r})"
        case "press":
            return f"pyautogui.press(keys={params['keys']!r})"
        case "hotkey":
            return f"pyautogui.hotkey({', '.join(map(repr, params['keys']))})"
        case "scroll" | "hscroll":
            return f"pyautogui.{kind}({params['amount']})"
        case "terminate":
            return f"computer.terminate(status={params['status']!r})"
    return f"pyautogui.{kind}(x={params['position']['x']}, y={params['position']['y']})"


def words(action: Action, element: Element | None, thoughtful: bool) -> dict[str, str]:
    """`inner_monologue`: the action in a sentence and, where the task takes thinking (`thoughtful`), what it is for."""
    name = str(element["text"]).strip() if element else ""
    kind = str(element["kind"]) if element else "screen"
    thought = "field" if kind in FIELDS else name
    match action:
        case Click():
            sentence = f"Click on the {kind} '{name}'." if name else f"Click on the {kind}."
        case Type(text):
            thought, sentence = text, f"Type '{text}'."
        case Finished():
            sentence = "Say that the task is done."
        case _:
            sentence = f"{type(action).__name__} on the {kind}."
    return {"observation": "", "thought": thought if thoughtful else "", "low_level_instruction": sentence}


def record(env: WebEnv, seed: int, folder: Path) -> int:
    """Play one scripted episode into `folder`: its steps; 0, and no file, if the script did not solve this seed."""
    name, size, scale = f"{env.task.id}-{seed}", env.task.viewport, env.device_scale
    observation, info = env.reset(seed=seed)
    goal, steps, shots = observation["goal"], [], []
    for action in oracle.solve(env):
        pointed = getattr(action, "x", None) is not None
        element = element_at(oracle.describe(env, 1), action.x, action.y) if pointed else None
        atoms, image = recorded(action, element, size, scale), f"{name}_{len(steps)}.png"
        told = words(action, element, env.task.id in PAGES)
        about = {"step_num": len(steps), "image": image, "action": code(atoms), "milestone": False}
        steps.append(about | {"inner_monologue": told, "ground_truth_actions": atoms})
        shots.append(observation["screenshot"])
        observation, *_, info = env.step(action)
    if not info["success"]:
        return 0
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for step, shot in zip(steps, shots, strict=True):
        Image.fromarray(shot).save(folder / "images" / step["image"], optimize=True)
    screen = {"width": size[0], "height": size[1]}
    about = {"applications": [], "websites": [env.task.id], "system": "Linux", "screen_resolution": screen}
    told = {"task_id": name, "high_level_task_description": goal, "user_task_description": goal}
    # Written last: a file names no picture that is not there.
    part = folder / f"{name}.part"
    part.write_text(json.dumps(told | {"meta_info": about, "steps": steps}, indent=1), encoding="utf-8")
    part.replace(folder / f"{name}.json")
    return len(steps)


def _told(env: WebEnv, seed: int, folder: Path) -> int:
    """`record`, with a line for an episode that is left out."""
    try:
        steps, why = record(env, seed, folder), "the script did not solve it"
    except ValueError as error:
        steps, why = 0, str(error)
    if not steps:
        print(f"{env.task.id} seed {seed}: {why}; left out", file=sys.stderr)
    return steps


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m envs.record", description=__doc__.split("\n\n")[0])
    p.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="layout of the files (agentnetbench)")
    p.add_argument(
        "--tasks",
        type=choices(*oracle.SCRIPTS),
        help="comma-separated (default: the memory pages, with --sites all tasks on sites)",
    )
    p.add_argument("--sites", action="store_true", help="the tasks of envs.sites")
    p.add_argument("--episodes", type=episodes, default=2, help="per task (default 2)")
    p.add_argument("--seed", type=seed, default=FIRST_SEED, help=f"first seed (default {FIRST_SEED})")
    p.add_argument("--device-scale", type=scale, default=1.0, help="pixels of a picture per CSS pixel (default 1)")
    p.add_argument(
        "--out",
        type=output_folder(_is_recording, "python -m envs.record"),
        required=True,
        help="folder of the recordings; made if it is not there",
    )
    p.add_argument("--chromium", type=some_text, help="path of the browser to use")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 when a script failed on a seed, else as `textkv.command.run` says."""
    explained = (ChromiumMissing, MiniwobMissing, SitesMissing)
    return run("envs.record", parser(), work, argv, explained=explained, kept="the same command goes on")


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Record what is missing."""
    counts: list[int] = []
    tasks = args.tasks or (site_ids() if args.sites else PAGES)
    with Browser(args.chromium) as browser:
        for task in tasks:
            env = make(task, browser, args.device_scale)
            for seed in range(args.seed, args.seed + args.episodes):
                if (args.out / f"{task}-{seed}.json").exists():
                    continue
                counts.append(_told(env, seed, args.out))
            env.close()
    print(f"{args.out}: {sum(map(bool, counts))} tasks recorded, {sum(counts)} steps")
    return int(0 in counts)


def _is_recording(folder: Path) -> bool:
    return (folder / "images").is_dir()


if __name__ == "__main__":
    sys.exit(main())
