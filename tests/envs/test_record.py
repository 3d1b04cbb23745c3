"""Scripted episodes in the layout of AgentNetBench: what the files say, and that they replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from agentkv.envs.actions import Click, Drag, Finished, Hotkey, RightClick, Scroll, Type, Wait
from agentkv.envs.record import boxes, code, element_at, main, recorded, words
from agentkv.eval.agentnetbench.figures import replay_rows
from agentkv.eval.agentnetbench.records import read

SIZE = (200, 100)
BUTTON = {"text": "OK", "kind": "button", "box": [20, 10, 40, 20], "points": []}
PAGE = {"text": "", "kind": "text", "box": [0, 0, 200, 100], "points": []}


def test_the_smallest_element_is_what_was_meant() -> None:
    assert element_at([PAGE, BUTTON], 30, 20) is BUTTON and element_at([PAGE, BUTTON], 100, 50) is PAGE
    assert element_at([BUTTON], 100, 50) is None and boxes(None, SIZE, 1.0) == {}
    (box,) = boxes(BUTTON, SIZE, 2.0)["bboxes"]
    assert box["rel_bbox"] == [0.1, 0.1, 0.2, 0.2] and box["abs_bbox"] == [40, 20, 80, 40] and box["area"] == 3200


@pytest.mark.parametrize(
    ("action", "line"),
    [(Click(50, 25), "pyautogui.click(x=0.25, y=0.25)"), (Type("it's"), 'pyautogui.write(message="it\'s")'),
     (Drag(0, 0, 100, 50), "pyautogui.moveTo(x=0.0, y=0.0)\npyautogui.dragTo(x=0.5, y=0.5)"),
     (Scroll(100, 50, "down", 300), "pyautogui.moveTo(x=0.5, y=0.5)\npyautogui.scroll(-3)"),
     (Scroll(0, 0, "right", 200), "pyautogui.moveTo(x=0.0, y=0.0)\npyautogui.hscroll(2)"),
     (Hotkey(("Enter",)), "pyautogui.press(keys=['enter'])"), (RightClick(0, 0), "pyautogui.rightClick(x=0.0, y=0.0)"),
     (Hotkey(("Control", "ArrowUp")), "pyautogui.hotkey('ctrl', 'up')"),
     (Finished(), "computer.terminate(status='success')")],
)  # fmt: skip
def test_actions_have_words(action, line: str) -> None:
    assert code(recorded(action, BUTTON, SIZE, 1.0)) == line


def test_what_a_recording_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="no words for Wait"):
        recorded(Wait(), None, SIZE, 1.0)


def test_thoughts_are_told_where_a_task_takes_thinking() -> None:
    told = words(Click(1, 1), BUTTON, True)
    assert (told["thought"], told["low_level_instruction"]) == ("OK", "Click on the button 'OK'.")
    assert words(Click(1, 1), BUTTON, False)["thought"] == "" and words(Type("a"), None, True)["thought"] == "a"


def test_bad_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--tasks", "click-tset"], ["--episodes", "0"], ["--device-scale", "0"]):
        assert main(["--out", str(tmp_path / "a"), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "a").exists()


@pytest.mark.browser
def test_episodes_become_tasks_that_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", str(tmp_path), "--tasks", "memory-first,enter-text", "--episodes", "1", "--device-scale", "2"]
    assert main(argv) == 0
    assert "2 tasks recorded, 7 steps" in capsys.readouterr().out
    tasks, problems = read(tmp_path)
    assert problems == [] and [len(one.steps) for one in tasks] == [3, 4]
    for protocol in ("v1", "v2", "gui_kv"):
        assert replay_rows(tasks, [protocol])[0]["accuracy"] == 1.0
    with Image.open(tasks[0].steps[0].image) as picture:
        assert picture.size == (320, 420)
    (x, y), box = tasks[0].steps[0].options[0][0].point, tasks[0].steps[0].options[0][0].boxes[0]
    assert box[0] <= x <= box[0] + box[2] and box[1] <= y <= box[1] + box[3]
    first = json.loads((tmp_path / "memory-first-1000000.json").read_text())
    assert first["high_level_task_description"] and first["steps"][0]["action"].startswith("pyautogui.click(x=")
    assert main(argv) == 0 and "0 tasks recorded" in capsys.readouterr().out


@pytest.mark.browser
def test_a_task_on_a_site_is_recorded_with_its_scrolling_sideways(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--tasks", "site-board-add", "--episodes", "1"]) == 0
    tasks, problems = read(tmp_path)
    assert problems == [] and any("pyautogui.hscroll(5)" in step.code for step in tasks[0].steps)
    for protocol in ("v1", "v2", "gui_kv"):
        assert replay_rows(tasks, [protocol])[0]["accuracy"] == 1.0
