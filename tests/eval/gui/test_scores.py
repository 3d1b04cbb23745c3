"""Benchmarks on samples of our own: what is read, what is left out, and what an answer is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from agentkv.envs.actions import (
    CallUser,
    Click,
    Drag,
    Finished,
    LongPress,
    OpenApp,
    PressBack,
    PressHome,
    Scroll,
    Type,
    Wait,
)
from agentkv.eval.gui.__main__ import BENCHMARKS
from agentkv.eval.gui.gui_odyssey import likeness
from agentkv.eval.gui.items import read
from agentkv.eval.gui.mind2web import f1
from agentkv.eval.gui.swipes import swiped

SIZE = (200, 400)


def sample(folder: Path, entries: list, name: str = "data.json") -> Path:
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    for picture in ("a.png", "b.png", "sub/c.png", "u1.png"):
        Image.new("RGB", SIZE, "white").save(folder / "images" / picture)
    (folder / name).write_text(json.dumps(entries))
    return folder


def asked(folder: Path, name: str):
    """The benchmark, its items and what was left out."""
    benchmark = BENCHMARKS.find(name)()
    return benchmark, *read(benchmark, folder)


def worth(benchmark, item, *actions) -> float:
    return benchmark.score(item.sized(SIZE), actions, SIZE)["accuracy"]


SPOT = {
    "img_filename": "a.png",
    "bbox": [10, 20, 30, 40],
    "instruction": "Open it",
    "ui_type": "icon",
    "platform": "web",
}


@pytest.mark.parametrize("name", ["screenspot", "osworld-g"])
def test_a_place_is_right_inside_its_box(tmp_path, name):
    bad = [SPOT | {"bbox": [30, 20, 10, 40]}, SPOT | {"instruction": " "}, SPOT | {"img_filename": "none.png"}, 7]
    bad += [SPOT | {"img_filename": "../data.json"}, SPOT | {"bbox": [1, 2, float("inf"), 4]}]
    benchmark, (item,), problems = asked(sample(tmp_path, [SPOT, *bad]), name)
    assert (item.group, item.goal, item.task) == ("web icon", "Open it", "a.png") and len(problems) == 6
    assert [worth(benchmark, item, Click(x, y)) for x, y in ((10, 20), (30, 40), (31, 30), (20, 41))] == [1, 1, 0, 0]
    assert worth(benchmark, item) == 0 and worth(benchmark, item, Type("x"), LongPress(15, 30)) == 1
    assert "is not the name of a file" in problems[4] and "no inside" in problems[0]


def test_ui_vision(tmp_path):
    entry = {"image_path": "sub/c.png", "bbox": [0, 0, 9, 9], "prompt_to_evaluate": "Save", "category": "Edit"}
    benchmark, (item,), _ = asked(sample(tmp_path, [entry]), "ui-vision")
    assert item.group == "Edit" and worth(benchmark, item, Click(4, 4)) == 1


def test_mind2web(tmp_path):
    step = {"annotation_id": "t", "task": "Buy", "bbox": [10, 10, 50, 30], "operation": "TYPE", "value": "New York"}
    steps = [step | {"action_uid": "u1"}, step | {"action_uid": "u2", "screenshot": "b.png", "operation": "SELECT",
             "bbox": {"x": 10, "y": 10, "width": 40, "height": 20}, "previous_actions": ["[link] A -> CLICK"]},
             step | {"action_uid": "u3", "operation": "HOVER"}]  # fmt: skip
    benchmark, (typed, chosen), problems = asked(sample(tmp_path, steps), "mind2web")
    assert typed.truth.box == chosen.truth.box and chosen.before == ("[link] A -> CLICK",) and len(problems) == 1

    def scores(item, *actions):
        return tuple(benchmark.score(item.sized(SIZE), actions, SIZE).values())

    assert scores(typed, Click(20, 20), Type("new york")) == (1, 1, 1)
    assert scores(typed, Type("New York")) == (0, 0, 1)
    assert scores(typed, Click(20, 20), Type("York")) == (0, 1, pytest.approx(0.8))
    assert scores(chosen, Click(20, 20), Type("New York")) == (1, 1, 1)
    assert scores(chosen, Click(20, 20)) == (0, 1, 0)
    assert f1("", "x") == 0 and f1("a a b", "a b b") == pytest.approx(2 / 3)


def test_android_control(tmp_path):
    nodes = [(0, 0, 200, 400), (10, 10, 60, 60), (20, 20, 40, 40), (90, 9, 80, 8)]
    tree = [{"bbox_pixels": dict(zip(("x_min", "y_min", "x_max", "y_max"), node, strict=True))} for node in nodes]

    def step(**action):
        about = {"screenshot": "a.png", "goal": "Do it", "step_instruction": "Tap", "accessibility_tree": tree}
        return about | {"action": action, "previous_actions": ["Open"]}

    right = [
        (step(action_type="click", x=30, y=30), Click(21, 39), Click(45, 45)),
        (step(action_type="long_press", x=15, y=15), LongPress(59, 59), Click(15, 15)),
        (step(action_type="scroll", direction="down"), Scroll(None, None, "down"), Drag(50, 50, 50, 90)),
        (step(action_type="input_text", text="Ada  Lovelace"), Type("ada lovelace"), Type("Ada")),
        (step(action_type="open_app", app_name="Maps"), OpenApp("maps"), OpenApp("Mail")),
        (step(action_type="navigate_back"), PressBack(), PressHome()),
        (step(action_type="navigate_home"), PressHome(), PressBack()),
        (step(action_type="wait"), Wait(), Click(1, 1)),
        (step(action_type="status", goal_status="infeasible"), Finished(status="failure"), Finished()),
    ]
    bad = [step(action_type="click", x=300, y=3), step(action_type="fly"), step(action_type="status", goal_status="?")]
    folder = sample(tmp_path, [entry for entry, *_ in right] + bad)
    benchmark, items, problems = asked(folder, "android-control")
    assert len(items) == len(right) and len(problems) == 3 and "no node" in problems[0]
    for item, (_, good, wrong) in zip(items, right, strict=True):
        assert (worth(benchmark, item, good), worth(benchmark, item, wrong), worth(benchmark, item)) == (1, 0, 0), item
    assert worth(benchmark, items[2], Drag(50, 90, 50, 20)) == 1  # a finger that goes up shows what is below
    assert items[0].truth.box == (20, 20, 40, 40) and items[0].before == ("Open",)
    low = asked(folder, "android-control-low")[1][0]
    assert (items[0].goal, low.goal) == ("Do it", "Tap")


def test_gui_odyssey(tmp_path):
    def step(action, info, **more):
        return {"screenshot": "a.png", "action": action, "info": info, "low_level_instruction": f"do {action}"} | more

    right = [
        (step("CLICK", [[500, 500]], sam2_bbox=[400, 400, 900, 600]), Click(178, 200), Click(190, 300)),
        (step("CLICK", [[100, 100]]), Click(40, 60), Click(80, 40)),
        (step("CLICK", "KEY_HOME"), PressHome(), PressBack()),
        (step("LONG_PRESS", [[100, 100]]), LongPress(20, 40), Click(20, 40)),
        (step("SCROLL", [[500, 800], [510, 300]]), Scroll(None, None, "down"), Scroll(None, None, "up")),
        (step("TYPE", "weather"), Type("Weathers"), Type("music")),
        (step("COMPLETE", ""), Finished(), Finished(status="failure")),
        (step("INCOMPLETE", ""), CallUser(), Finished()),
    ]
    steps = [entry for entry, *_ in right]
    steps += [step("CLICK", "KEY_APPSELECT"), step("CLICK", [["a", 1]]), step("SCROLL", [[1, 1], [1, 1]]), 3]
    episode = {"episode_id": "e", "task_info": {"category": "Tools", "instruction": "Do it"}, "steps": steps}
    folder = sample(tmp_path, [episode, {"episode_id": "f"}], "all_anno.json")
    benchmark, items, problems = asked(folder, "gui-odyssey")
    assert len(items) == len(right) + 1 and len(problems) == 4 and items[2].before == ("do CLICK", "do CLICK")
    for item, (_, good, wrong) in zip(items, right, strict=False):
        assert (worth(benchmark, item, good), worth(benchmark, item, wrong), worth(benchmark, item)) == (1, 0, 0), item
    assert worth(benchmark, items[-1], PressHome()) == 0
    assert likeness("kitten", "sitting") == pytest.approx(1 - 3 / 7) and likeness("", "") == 1


def test_swipes():
    assert [swiped(0, 0, *to) for to in ((0, -9), (0, 9), (-9, 1), (9, 1), (0, 0))] == [
        "down",
        "up",
        "right",
        "left",
        "",
    ]


def test_what_cannot_be_read_at_all_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        asked(tmp_path / "none", "screenspot")
    folder = sample(tmp_path, [])
    (folder / "more.json").write_text("{")
    with pytest.raises(ValueError, match="nothing of screenspot can be read.*more.json"):
        asked(folder, "screenspot")
