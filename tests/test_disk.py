"""A disk that fills up in the middle: one line that names the place, and a later start that loses nothing."""

import json
import os
import sys
from contextlib import contextmanager

import pytest
import torch

from agentkv.envs.tab import Manners
from agentkv.eval.outcomes import Outcome, Outcomes
from agentkv.play import Plan, Play, open_folder
from agentkv.reading import read_run
from dlm.batch import answer_all, read_items
from tests.agentkv.fake_episodes import META, FakeEnv, FakePolicy
from textkv.disk import NoSpace, whole_folder, write_whole
from training.state import read_counters, save_state

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")


@contextmanager
def full(size: int):
    """No file may grow beyond `size` bytes: the system refuses the write that would, in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Env(FakeEnv):
    """What `Play` asks of an environment beside."""

    manners = Manners()

    def close(self):
        """Nothing is open."""


@pytest.mark.parametrize("size", [20, 700, 900, 1_500])
def test_a_run_goes_on_where_the_disk_was_full(tmp_path, monkeypatch, size, reliability):
    monkeypatch.setattr("agentkv.play.open_env", lambda *_: Env())
    plan, out = Plan("mini", ("full",), "0.4", ("click-tab",), (1, 2)), tmp_path / "r"

    def played():
        open_folder(out, plan, True, META, [])
        Play(plan, {"full": FakePolicy()}, None, out, quiet=True).run()

    open_folder(out, plan, True, META, [])
    with full(size), pytest.raises(NoSpace, match="the disk is full; free some space, then --resume goes on") as caught:
        played()
    assert str(out) in str(caught.value) and not list(out.rglob("*.part"))
    played()
    recorded = read_run(out)
    assert len(recorded.episodes) == 2 and recorded.damaged == []
    reliability(5, f"no file over {size} bytes", "agentkv.run", "one line, and --resume plays the rest")


def outcome(first: int) -> Outcome:
    return Outcome("snapkv", "0.5", "fact", "known", first, [True, False], [1.0, 0.5], {"kv_bytes": 1.0})


def test_a_board_measures_again_what_was_torn(tmp_path, capsys, reliability):
    path = tmp_path / "o.jsonl"
    board = Outcomes(path, {"n": 4})
    board.add(outcome(0))
    with full(path.stat().st_size + 30), pytest.raises(NoSpace, match="o.jsonl: the disk is full"):
        board.add(outcome(2))
    again = Outcomes(path, {"n": 4})
    assert [line.first for line in again.done.values()] == [0]
    again.add(outcome(2))
    assert [line.first for line in Outcomes(path, {"n": 4}).done.values()] == [0, 2]
    reliability(5, "full in the middle of a line", "eval.board", "one line, and the next start measures it again")


def test_a_board_drops_damaged_lines_alone(tmp_path, capsys, reliability):
    path = tmp_path / "o.jsonl"
    board = Outcomes(path, {"n": 4})
    for first in (0, 2, 4):
        board.add(outcome(first))
    lines = path.read_text().splitlines()
    for broken in ("[]", "{", '{"first": 1}', lines[2].replace("[true, false]", '"11"'), "[" * 9_000):
        path.write_text("\n".join([*lines[:2], broken, *lines[3:]]) + "\n")
        assert [line.first for line in Outcomes(path, {"n": 4}).done.values()] == [0, 4]
        assert f"{path}:3: " in capsys.readouterr().err
        assert path.read_text().splitlines() == [*lines[:2], *lines[3:]]
        reliability(4, "a damaged line", "eval.board", "that batch is measured again, and told")


def test_a_strangers_file_beside_a_board_is_left(tmp_path):
    path = tmp_path / "o.jsonl"
    path.write_text("my notes")
    with pytest.raises(ValueError, match="is no file of outcomes"):
        Outcomes(path, {"n": 4})
    assert path.read_text() == "my notes"


def test_answers_go_on_where_the_disk_was_full(tmp_path, reliability):
    (tmp_path / "in").write_text("".join(json.dumps({"prompt": "p" * 40 + str(n)}) + "\n" for n in range(6)))
    items, out = read_items(tmp_path / "in"), tmp_path / "out"

    def answers(chunk):
        return [{"text": "a" * 40} for _ in chunk]

    with full(400), pytest.raises(NoSpace, match="out: the disk is full"):
        answer_all(items, out, 2, "s", answers)
    answer_all(items, out, 2, "s", answers)
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    reliability(5, "full in the middle of a line", "dlm.generate --batch", "one line, and the same command goes on")


def test_a_training_keeps_its_last_state(tmp_path, reliability):
    model, path = torch.nn.Linear(64, 64), tmp_path / "state.safetensors"
    average = {name: x.detach().clone() for name, x in model.named_parameters()}
    save_state(path, model, average, (), {"step": 1})
    with full(5_000), pytest.raises(NoSpace, match="state.safetensors: the disk is full"):
        save_state(path, model, average, (), {"step": 2})
    assert read_counters(path) == {"step": 1} and os.listdir(tmp_path) == ["state.safetensors"]
    reliability(5, "no file over 5,000 bytes", "training", "one line, and the last state is whole")


def test_a_folder_is_whole_or_as_it_was(tmp_path, reliability):
    folder = tmp_path / "new" / "model"
    for fault in (NoSpace, KeyboardInterrupt):
        with pytest.raises(fault), full(100), whole_folder(folder) as draft:
            (draft / "config.json").write_text("{}")
            if fault is KeyboardInterrupt:
                raise KeyboardInterrupt
            (draft / "model.safetensors").write_bytes(b"x" * 1_000)
        assert not list((tmp_path / "new").iterdir())
    for content in ("old", "newer"):
        with whole_folder(folder) as draft:
            (draft / "config.json").write_text(content)
        assert (folder / "config.json").read_text() == content
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(NoSpace, match="model: the disk is full"), full(100), whole_folder(folder) as draft:
        (draft / "config.json").write_text("x" * 1_000)
    assert sorted(os.listdir(folder)) == ["config.json", "mine.txt"] and os.listdir(tmp_path / "new") == ["model"]
    assert (folder / "config.json").read_text() == "newer"
    for command in ("textkv.masa convert", "textkv.masa export", "training"):
        reliability(5, "no file over 100 bytes", command, "one line, and the folder is as it was")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "a"
    write_whole(path, b"old")
    with full(100), pytest.raises(NoSpace):
        write_whole(path, b"x" * 1_000)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "new") == ["a"]
