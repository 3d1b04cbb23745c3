"""Damage is local: it costs the episode that it is in, said in a line, and that episode is played again."""

import json
import os
import shutil
from pathlib import Path

import pytest

from agentkv.envs.tab import Manners
from agentkv.play import Plan, Play, open_folder
from agentkv.reading import is_whole, read_run
from agentkv.replay import replay
from agentkv.report import write_report
from tests.agentkv.fake_episodes import META, FakeEnv, FakePolicy, fake_run

SECRET = "the secret of another file"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "r", {"full": FakePolicy()}, seeds=2)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "r")


def first(run: Path) -> Path:
    return run / "episodes" / "full" / "click-tab" / "1000000"


def changed(folder: Path, **fields) -> None:
    """The second step with other fields."""
    path = folder / "steps.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | fields)
    path.write_text("\n".join(lines) + "\n")


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def line(text):
    def damage(folder):
        path = folder / "steps.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")

    return damage


def without_a_line(folder):
    path = folder / "steps.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def linked(folder):
    (folder / "001.png").unlink()
    (folder / "001.png").symlink_to("/etc/hostname")


def linked_away(folder):
    aside = folder.parents[4] / "aside"
    shutil.move(folder, aside)
    folder.symlink_to(aside)


FRAME = {"step": 0, "span": [1, 2], "grid": [1, 2], "kept": [0, 100]}
DAMAGE = {
    "a torn line": line('{"step": 1, "scr'),
    "no UTF-8": lambda folder: (folder / "steps.jsonl").write_bytes(b"\xff\n"),
    "deep nesting": line("[" * 50_000),
    "a huge number": line('{"step": ' + "9" * 5_000 + "}"),
    "a list for an object": line("[]"),
    "no line": without_a_line,
    "no steps": lambda folder: (folder / "steps.jsonl").unlink(),
    "a folder for steps": lambda folder: ((folder / "steps.jsonl").unlink(), (folder / "steps.jsonl").mkdir()),
    "no picture": lambda folder: (folder / "001.png").unlink(),
    "half a picture": lambda folder: os.truncate(folder / "001.png", 40),
    "a text as picture": raw("001.png", SECRET.encode()),
    "a link as picture": linked,
    "a link as episode": linked_away,
    "an absolute name": lambda folder: changed(folder, screenshot="/etc/hostname"),
    "a name above": lambda folder: changed(folder, screenshot="../../../../run.json"),
    "a name with a backslash": lambda folder: changed(folder, screenshot="..\\run.json"),
    "a name with a zero": lambda folder: changed(folder, screenshot="a\0"),
    "a long name": lambda folder: changed(folder, screenshot="a" * 5_000),
    "another step": lambda folder: changed(folder, step=0),
    "an unknown action": lambda folder: changed(folder, action={"type": "Exec"}),
    "an action without a field": lambda folder: changed(folder, action={"type": "Type"}),
    "an action of another type": lambda folder: changed(folder, action={"type": "Type", "text": 5}),
    "an action in lists": lambda folder: changed(folder, action={"type": ["Type"]}),
    "a text as reward": lambda folder: changed(folder, reward="1"),
    "a share of 256": lambda folder: changed(folder, frames=[FRAME | {"kept": [0, 256]}]),
    "a grid that does not fit": lambda folder: changed(folder, frames=[FRAME | {"grid": [1, 3]}]),
    "a frame of the future": lambda folder: changed(folder, frames=[FRAME | {"step": 2}]),
    "a frame before the first": lambda folder: changed(folder, frames=[FRAME | {"step": -1}]),
    "a list for frames": lambda folder: changed(folder, frames=[[]]),
    "no result": raw("episode.json", b""),
    "a list for the result": raw("episode.json", b"[]"),
    "a result without fields": raw("episode.json", b"{}"),
    "a result of another episode": lambda folder: shutil.copy(folder.parent / "1000001" / "episode.json", folder),
}

FOREIGN = {name for name in DAMAGE if "link" in name or "name" in name or name == "a text as picture"}


@pytest.mark.parametrize(("fault", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_damage_costs_one_episode_and_is_told(run, fault, damage, reliability):
    damage(first(run))
    recorded = read_run(run)
    assert [e["seed"] for e in recorded.episodes] == [1_000_001]
    (told,) = recorded.damaged
    assert str(run) in told and "\n" not in told and len(told) < 6_000
    page = write_report(run).read_text()
    assert told[:40] in page and "root:" not in page and SECRET not in page
    kind, outcome = (2, "nothing of another file is embedded") if fault in FOREIGN else (4, "told, and played again")
    reliability(kind, fault, "agentkv.report", outcome)


@pytest.mark.parametrize(("fault", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_the_rest_is_replayed(run, fault, damage, reliability):
    damage(first(run))
    rows = list(replay(run, lambda task: FakeEnv()))
    assert [row["same"] for row in rows if row["seed"] in (1_000_001, "1000001")] == [True]
    assert all(bool(row["damaged"]) is not row["same"] for row in rows if row["damaged"])
    reliability(2 if fault in FOREIGN else 4, fault, "agentkv.run --replay", "the other episodes are acted")


def test_a_damaged_episode_is_played_again(run, monkeypatch, capsys):
    (first(run) / "001.png").unlink()
    plan = Plan("mini", ("full",), "0.4", ("click-tab",), (1_000_000, 1_000_001))
    open_folder(run, plan, True, META, [])
    monkeypatch.setattr("agentkv.play.open_env", lambda *_: Env())
    before = (first(run).parent / "1000001" / "steps.jsonl").stat().st_mtime_ns
    Play(plan, {"full": FakePolicy()}, None, run, quiet=True).run()
    told = capsys.readouterr().err
    assert "001.png" in told and "it is played again" in told
    assert is_whole(first(run)) and read_run(run).damaged == []
    assert (first(run).parent / "1000001" / "steps.jsonl").stat().st_mtime_ns == before


class Env(FakeEnv):
    """What `Play` asks of an environment beside."""

    manners = Manners()

    def close(self):
        """Nothing is open."""


ABOUT = {
    "a list": b"[]",
    "no JSON": b"{",
    "deep": b"[" * 50_000,
    "no methods": lambda about: about.pop("methods"),
    "a text for methods": lambda about: about.update(methods="full"),
    "a number as method": lambda about: about.update(methods=[1]),
    "a method above": lambda about: about.update(methods=[".."]),
    "a task with a zero": lambda about: about.update(tasks=["a\0"]),
    "a text as seed": lambda about: about.update(seeds=["1"]),
    "a seed below zero": lambda about: about.update(seeds=[-1]),
    "a share as seed": lambda about: about.update(seeds=[0.5]),
    "a list for meta": lambda about: about.update(meta=[]),
    "a text as history": lambda about: about.update(history="5"),
}


@pytest.mark.parametrize(("fault", "damage"), ABOUT.items(), ids=ABOUT)
def test_settings_that_no_run_has_are_one_line(run, fault, damage, reliability):
    path = run / "run.json"
    if callable(damage):
        about = json.loads(path.read_text())
        damage(about)
        path.write_text(json.dumps(about))
    else:
        path.write_bytes(damage)
    before = path.read_bytes()
    plan = Plan("mini", ("full",), "0.4", ("click-tab",), (1_000_000,))
    for use in (read_run, write_report, lambda run: open_folder(run, plan, True, META, []),
                lambda run: list(replay(run, lambda task: FakeEnv()))):  # fmt: skip
        with pytest.raises(ValueError, match="run.json") as caught:
            use(run)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    reliability(4, f"run.json: {fault}", "agentkv.run --resume", "refused in one line")


def test_a_run_of_an_earlier_version_goes_on(run):
    path = run / "run.json"
    about = json.loads(path.read_text())
    for later in ("cache", "dialogs", "files", "agent", "expect", "allow", "notes"):
        del about[later]
    path.write_text(json.dumps(about))
    for steps in run.rglob("steps.jsonl"):
        lines = [json.loads(one) for one in steps.read_text().splitlines()]
        for one in lines:
            for later in ("left_out", "told", "files", "dialogs", "viewport"):
                del one[later]
        steps.write_text("".join(json.dumps(one) + "\n" for one in lines))
    open_folder(run, Plan("mini", ("full",), "0.4", ("click-tab",), (1_000_000,)), True, META, [])
    assert len(read_run(run).episodes) == 2 and write_report(run).stat().st_size > 10_000


def test_a_run_is_not_gone_on_with_through_links(run, tmp_path):
    shutil.move(run / "episodes" / "full", tmp_path / "aside")
    (run / "episodes" / "full").symlink_to(tmp_path / "aside")
    with pytest.raises(ValueError, match="leads out of the run; a run holds no links"):
        open_folder(run, Plan("mini", ("full",), "0.4", ("click-tab",), (1_000_000,)), True, META, [])
    assert (tmp_path / "aside" / "click-tab" / "1000000" / "episode.json").exists()
