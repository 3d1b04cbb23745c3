"""Traces: what is written can be read, at any moment; a full disk and a damaged file say which folder."""

import errno
import json
import os
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agentkv import trace
from agentkv.agent import run_episode
from agentkv.envs.actions import Click, Hotkey
from agentkv.grammars import ParseError
from agentkv.play import Plan, open_folder
from agentkv.reading import read_episode, read_run, read_steps
from agentkv.trace import ACTIONS, EpisodeTrace, action_from_dict, action_to_dict
from tests.agentkv.fake_episodes import META, FakeEnv, FakePolicy, fake_run
from textkv.disk import NoSpace, disk_errors

ABOUT = {"method": "gui-kv", "budget": 0.4, "task": "click-tab", "seed": 3}

numbers = st.floats(-1e4, 1e4)
parts = st.tuples(st.builds(Click, numbers, numbers), st.builds(Hotkey, st.tuples(st.text())))
VALUES = {"str": st.text(), "float": numbers, "tuple[str, ...]": st.tuples(st.text(), st.text())}
VALUES |= {"Literal['success', 'failure']": st.sampled_from(["success", "failure"])}
VALUES |= {"float | None": numbers | st.none(), "tuple[Single, ...]": parts}


@st.composite
def any_action(draw):
    cls = draw(st.sampled_from(list(ACTIONS.values())))
    values = {f.name: draw(VALUES.get(f.type, st.sampled_from(["up", "left"]))) for f in fields(cls)}
    return cls(**values)


@settings(deadline=None)
@given(any_action())
def test_every_action_survives_json(action):
    assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action


def test_actions_are_those_of_the_environment():
    assert len(ACTIONS) == 23
    here = {"Click", "DoubleClick", "TripleClick", "RightClick", "MiddleClick"}  # without a point: at the pointer
    told = [f.default for name, cls in ACTIONS.items() for f in fields(cls) if name not in here]
    assert None not in told
    assert action_to_dict(Hotkey(("Control", "a"))) == {"type": "Hotkey", "keys": ("Control", "a")}
    assert action_to_dict(ParseError("no")) is None


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="action type 'Exec' is none of Click"):
        action_from_dict({"type": "Exec", "code": "1"})


def test_an_episode_is_complete_after_every_step(tmp_path):
    folder = tmp_path / "e"
    writer = EpisodeTrace(folder, ABOUT)

    def keep(step):
        writer.step(step)
        lines = read_steps(folder)
        assert len(lines) == step.index + 1 and lines[-1]["action"] == action_to_dict(step.decision.action)
        picture = np.asarray(Image.open(folder / lines[-1]["screenshot"]))
        assert np.array_equal(picture, step.screenshot)
        assert read_episode(folder) is None, "not finished yet"

    writer.finish(run_episode(FakeEnv(needed=2), FakePolicy(share=0.5), 3, on_step=keep), crashes=1)
    writer.close()
    episode = read_episode(folder)
    assert {k: episode[k] for k in ABOUT} == ABOUT
    assert (episode["success"], episode["stop"], episode["crashes"], len(episode["steps"])) == (True, "done", 1, 3)
    frames = episode["steps"][2]["frames"]
    assert [f["step"] for f in frames] == [0, 1, 2] and frames[0]["grid"] == [3, 4] and len(frames[0]["kept"]) == 12
    assert set(frames[0]["kept"]) <= {0, 100} and frames[1]["span"] == [22, 34]


def test_an_unfinished_try_leaves_nothing_behind(tmp_path):
    writer = EpisodeTrace(tmp_path / "e", ABOUT)
    run_episode(FakeEnv(needed=5), FakePolicy(), 3, on_step=writer.step)
    writer.close()
    EpisodeTrace(tmp_path / "e", ABOUT).close()
    assert os.listdir(tmp_path / "e") == ["steps.jsonl"] and not (tmp_path / "e" / "steps.jsonl").read_text()


def test_names_with_slashes_stay_inside_the_run(tmp_path):
    folder = trace.episode_folder(tmp_path, "cake+gear(4)", "../x", 7)
    assert folder == tmp_path / "episodes" / "cake+gear(4)" / "..%2Fx" / "7"


def test_a_run_is_read_in_the_order_of_its_plan(tmp_path):
    run = fake_run(tmp_path / "r", {"full": FakePolicy(), "gui-kv": FakePolicy(share=0.4)}, ("b", "a"))
    recorded = read_run(run)
    assert recorded.about["methods"] == ["full", "gui-kv"]
    assert [(e["method"], e["task"]) for e in recorded.episodes[::2]] == [
        ("full", "b"),
        ("full", "a"),
        ("gui-kv", "b"),
        ("gui-kv", "a"),
    ]


def test_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run.json: it is not the --out folder of a run"):
        read_run(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    trace.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        trace.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = EpisodeTrace(tmp_path / "e", ABOUT)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"/e: the disk is full; free some space, then --resume goes on"):
        run_episode(FakeEnv(), FakePolicy(), 3, on_step=writer.step)
    writer.close()


def test_other_errors_of_the_disk_pass(tmp_path):
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError("no")


def test_too_little_space_is_said_before(tmp_path):
    trace.need_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(NoSpace, match=r"out: [\d]+ MB free, about 10{9} MB needed for the traces; free some space or"):
        trace.need_space(tmp_path / "out", 10**15)


def test_an_earlier_run_is_moved_aside(tmp_path, capsys):
    plan = Plan("mini", ("full",), "0.4", ("a",), (1,))
    for _ in range(3):
        open_folder(tmp_path / "r", plan, False, META, [])
    assert sorted(os.listdir(tmp_path)) == ["r", "r.1", "r.2"]
    assert f"the earlier run in {tmp_path}/r is now in {tmp_path}/r.1" in capsys.readouterr().err


def test_resume_joins_plans_and_refuses_other_settings(tmp_path):
    out = tmp_path / "r"
    open_folder(out, Plan("mini", ("full",), "0.4", ("a",), (1, 2)), False, META, ["x"])
    open_folder(out, Plan("mini", ("gui-kv",), "0.4", ("a", "b"), (2, 3)), True, META, ["x", "y"])
    about = read_run(out).about
    assert [about[k] for k in ("methods", "tasks", "seeds", "notes", "episodes")] == [
        ["full", "gui-kv"], ["a", "b"], [1, 2, 3], ["x", "y"], 3,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"was played with budget='0.4', now it is '0.2': --resume needs the same"):
        open_folder(out, Plan("mini", ("full",), "0.2", ("a",), (1,)), True, META, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": ()}, "episodes=0 plays nothing; use 1 or more"),
        ({"history": 0}, "history=0 would hide the current screenshot too; use 1"),
        ({"max_steps": 0}, "max_steps=0 plays nothing; use 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no room for an answer; use 64"),
        ({"device_scale": -1.0}, "device_scale=-1.0 is no size; use 1, 2 or 4"),
    ],
)
def test_a_plan_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"model": "mini", "methods": ("full",), "budget": "0.4", "tasks": ("a",), "seeds": (1,), **wrong})


def test_clicks_are_kept_to_the_last_digit(tmp_path):
    value = action_to_dict(Click(1 / 3, 2 / 3))
    assert action_from_dict(json.loads(json.dumps(value))) == Click(1 / 3, 2 / 3)
