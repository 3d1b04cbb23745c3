"""Reading trajectories: what is optional, and what is left out with a line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from agentkv.eval.agentnetbench.records import read
from tests.eval.agentnetbench.sample import FORM, SHELL, action, step, trajectory, write


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    folder = write(tmp_path, FORM, SHELL)
    (folder / "mapping_ids.json").write_text("[]")
    (form, shell), problems = read(folder)
    assert problems == [] and (form.task, form.goal, form.mac, shell.mac) == ("form", "Solve form.", False, True)
    assert [s.number for s in form.steps] == [0, 2, 3, 4], "numbers have gaps"
    first = form.steps[0]
    assert len(first.options) == 2 and first.options[0][0].boxes == ((0.2, 0.2, 0.1, 0.1),)
    assert (first.thought, first.instruction) == ("Thought 0", "Do 0.")
    assert first.image == folder / "images" / "form_0.png"
    assert form.steps[2].options[0][1].amount == -3 and len(form.steps[1].options) == 1


def test_steps_with_little_are_read(tmp_path: Path) -> None:
    truth = [{"type": "triple_click", "params": {"position": {"x": 1, "y": 0}}}]
    bare = {"image": "a_0.png", "ground_truth_actions": truth, "step_num": 0}
    folder = write(tmp_path, trajectory("a", [bare], high_level_task_description=None))
    (one,), problems = read(folder)
    assert problems == [] and one.goal == "a" and one.steps[0].options[0][0].type == "tripleclick"
    assert one.steps[0].thought == "" and one.steps[0].options[0][0].boxes == ()


BROKEN = {
    "cut.json": ('{"task_id": "cut", "steps": [', "not JSON"),
    "list.json": ("[1, 2]", "not a trajectory"),
    "empty.json": ('{"task_id": "empty", "high_level_task_description": "x", "steps": []}', "none of its steps"),
    "goal.json": ('{"task_id": "goal", "steps": [{}]}', "no high_level_task_description"),
    "deep.json": ("[" * 100_000, "left out"),
    "twice.json": (json.dumps(FORM), "in another file already"),
}


def test_what_cannot_be_read_is_one_line_and_the_rest_is_used(tmp_path: Path) -> None:
    folder = write(tmp_path, FORM)
    for name, (text, _) in BROKEN.items():
        (folder / name).write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    found, problems = read(folder)
    assert [one.task for one in found] == ["form"] and len(problems) == len(BROKEN) + 1
    for name, (_, said) in BROKEN.items():
        (line,) = [line for line in problems if line.startswith(name)]
        assert said in line and "\n" not in line


@pytest.mark.parametrize(
    ("change", "said"),
    [({"ground_truth_actions": None}, "no list of actions"), ({"ground_truth_actions": []}, "no list of actions"),
     ({"ground_truth_actions": [{"type": "click", "params": {}}]}, "no position"),
     ({"ground_truth_actions": [action("click", float("nan"), 0.5)]}, "not a finite number"),
     ({"ground_truth_actions": [action("click", 10**400, 0.5)]}, "left out"),
     ({"ground_truth_actions": [action("press", keys=[3])]}, "not names"),
     ({"ground_truth_actions": [{"params": {}}]}, "no type"), ({"step_num": 0}, "has this number"),
     ({"ground_truth_actions": [action("click", 0.5, 0.5, [1, 2])]}, "not [x, y, width, height]")],
)  # fmt: skip
def test_a_bad_step_is_left_out_by_name(tmp_path: Path, change: dict, said: str) -> None:
    task = copy.deepcopy(FORM)
    task["steps"][1] |= change
    folder = write(tmp_path, FORM)
    (folder / "form.json").write_text(json.dumps(task))
    (one,), (line,) = read(folder)
    assert [s.number for s in one.steps] == [0, 3, 4] and said in line and line.startswith("form step")


def test_a_bad_alternative_leaves_the_step(tmp_path: Path) -> None:
    task = trajectory("a", [step(0, "a_0.png", action("click", 0.5, 0.5), others=[[], [action("click", 0.1, 0.1)]])])
    (one,), (line,) = read(write(tmp_path, task))
    assert len(one.steps[0].options) == 2 and "alternative 1" in line


def test_pictures_are_looked_at_only_where_they_are_needed(tmp_path: Path) -> None:
    folder = write(tmp_path, FORM)
    images = folder / "images"
    (images / "form_0.png").unlink()
    (images / "form_2.png").write_bytes((images / "form_2.png").read_bytes()[:60])
    task = json.loads((folder / "form.json").read_text())
    task["steps"][2]["image"] = "../form.json"
    (folder / "form.json").write_text(json.dumps(task))
    (one,), problems = read(folder)
    assert [s.image is None for s in one.steps] == [True, True, True, False]
    for line, said in zip(problems, ("there is no image", "cannot be read", "not a file name"), strict=True):
        assert said in line and "form step" in line
    assert read(folder, look=False)[1] == []


def test_no_data_is_said_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no <task>\.json"):
        read(tmp_path, look=False)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no trajectory could be read: a.json"):
        read(tmp_path, look=False)
    with pytest.raises(FileNotFoundError, match="--images"):
        read(tmp_path)
