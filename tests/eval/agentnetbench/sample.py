"""Recorded tasks of our own in the published layout: every type of action, alternatives, gaps in the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = (320, 200)


def action(kind: str, x: float | None = None, y: float | None = None, box: list | None = None, **params: Any) -> dict:
    place = {} if x is None else {"position": {"x": x, "y": y}}
    boxes = [] if box is None else [{"category_id": 1, "rel_bbox": box, "abs_bbox": [0, 0, 1, 1], "area": 1.0}]
    return {"type": kind, "params": place | params, "metadata": {"bboxes": boxes} if boxes else {}}


def step(number: int, image: str, *truth: dict, others: list | None = None, **more: Any) -> dict:
    told = {"observation": "A page.", "thought": f"Thought {number}", "low_level_instruction": f"Do {number}."}
    about = {"step_num": number, "image": image, "action": "pyautogui.click(x=0.5, y=0.5)", "milestone": False}
    about |= {"inner_monologue": told, "ground_truth_actions": list(truth)}
    return about | ({} if others is None else {"alternative_options": others}) | more


def trajectory(task: str, steps: list[dict], **more: Any) -> dict:
    about = {"task_id": task, "high_level_task_description": f"Solve {task}.", "user_task_description": task}
    return about | {"steps": steps} | more


FORM = trajectory(
    "form",
    [
        step(0, "form_0.png", action("click", 0.25, 0.25, [0.2, 0.2, 0.1, 0.1]), others=[[action("click", 0.9, 0.9)]]),
        step(2, "form_2.png", action("write", text="Ada Lovelace"), action("press", keys=["enter"])),
        step(3, "form_3.png", action("moveTo", 0.5, 0.5), action("scroll", 0.5, 0.5, amount=-3)),
        step(4, "form_4.png", action("terminate", status="success")),
    ],
)
SHELL = trajectory(
    "shell",
    [
        step(0, "shell_0.png", action("hotkey", keys=["ctrl", "V"])),
        step(1, "shell_1.png", action("moveTo", 0.1, 0.1), action("dragTo", 0.8, 0.8)),
        step(2, "shell_2.png", action("rightClick", 0.4, 0.6), others=[]),
        step(3, "shell_3.png", action("doubleClick", 0.4, 0.6)),
        step(4, "shell_4.png", action("tripleClick", 0.4, 0.6)),
        step(5, "shell_5.png", action("hscroll", amount=4)),
        step(6, "shell_6.png", action("press", keys=["F"])),
    ],
    meta_info={"system": "Darwin"},
)


def write(folder: Path, *trajectories: dict) -> Path:
    """The trajectories with a picture per step."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for one in trajectories:
        (folder / f"{one['task_id']}.json").write_text(json.dumps(one))
        for shown in one["steps"]:
            picture = Image.new("RGB", SIZE, "white")
            ImageDraw.Draw(picture).rectangle((20, 20 + 10 * shown["step_num"], 120, 120), fill="navy")
            picture.save(folder / "images" / shown["image"])
    return folder
