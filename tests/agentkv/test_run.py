"""The command on a real browser with scripted policies in the model's place: play, resume, replay, Ctrl-C."""

import json
import os
import signal
import socket
from dataclasses import replace

import pytest

from agentkv import play, run
from agentkv.agent import ScriptPolicy
from agentkv.envs import oracle
from agentkv.envs.actions import Click
from agentkv.envs.browser import Browser, BrowserCrashed
from agentkv.play import Plan, Play, open_folder
from agentkv.reading import read_run
from tests.agentkv.fake_episodes import META, tiny_adapter

pytestmark = pytest.mark.browser
TASKS, SEED = ("click-tab", "memory-colour"), 1_000_000


class Oracle(ScriptPolicy):
    """Solves the task; `at` is called with the number of decisions so far."""

    def __init__(self, at=lambda count: None):
        super().__init__(oracle.solve)
        self.at, self.count = at, 0

    def decide(self, goal, history, screenshot, viewport):
        self.count += 1
        self.at(self.count)
        return super().decide(goal, history, screenshot, viewport)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def played(out, browser, policies, tasks=TASKS, seeds=(SEED,), resume=False):
    plan = Plan("mini", tuple(policies), "0.4", tasks, seeds)
    open_folder(out, plan, resume, META, [])
    Play(plan, policies, browser, out).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, browser):
    out = tmp_path_factory.mktemp("runs") / "r"
    lost = ScriptPolicy(lambda env: [Click(1.0, 1.0)])
    played(out, browser, {"oracle": Oracle(), "lost": lost})
    return out


@pytest.mark.parametrize(("asked", "cache"), [([], "persistent"), (["--cache", "fresh"], "fresh")])
def test_a_checkpoint_says_which_cache_it_was_trained_for(asked, cache):
    args = run.parser().parse_args(asked)
    adapter = replace(tiny_adapter(), cache="persistent")
    assert run.fitted(run.make_plan(args), args, adapter).cache == cache


def test_only_a_live_page_has_the_fonts_of_the_machine():
    args = run.parser().parse_args([])
    plan = Plan("mini", ("full",), "0.4", TASKS, (SEED,))
    assert not run.open_browser(args, plan).machine_fonts
    assert run.open_browser(args, replace(plan, url="http://127.0.0.1:9", goal="look")).machine_fonts


def test_every_method_plays_the_same_episodes(finished):
    episodes = read_run(finished).episodes
    pairs = {m: [(e["task"], e["seed"], e["goal"]) for e in episodes if e["method"] == m] for m in ("oracle", "lost")}
    assert pairs["oracle"] == pairs["lost"] and len(pairs["oracle"]) == 2
    assert [e["success"] for e in episodes] == [True] * 2 + [False] * 2
    assert all(s["viewport"] == [160, 210] and s["seconds_browser"] > 0 for e in episodes for s in e["steps"])


def test_the_summary_has_the_agreed_form(finished, tmp_path, capsys):
    run.finish(finished, tmp_path / "extra" / "out.json")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary == json.loads((tmp_path / "extra" / "out.json").read_text())
    assert {"command", "commit", "versions", "hardware", "seed"} <= summary["meta"].keys()
    assert [(r["method"], r["task"]) for r in summary["rows"]][2] == ("oracle", "all")
    whole = summary["rows"][2]
    assert (whole["n"], whole["success"], whole["high"], whole["budget"]) == (2, 1.0, 1.0, "0.4")
    assert 0.3 < whole["low"] < 1 and all(isinstance(v, int | float | str) for v in whole.values())
    assert {"kv_bytes", "kv_bytes_peak", "kv_bytes_full", "prefill_tokens", "decode_tokens"} <= whole.keys()
    assert {"seconds_prefill", "seconds_decode", "seconds_browser", "seconds", "steps"} <= whole.keys()
    told = capsys.readouterr().out
    assert "oracle" in told and "100% (34%-100%)" in told
    assert told.splitlines()[-3:] == [
        str(finished / "summary.json"),
        str(tmp_path / "extra" / "out.json"),
        str(finished / "report.html"),
    ]


def test_replay_gives_the_same_rewards(finished, capsys):
    assert run.main(["--replay", str(finished)]) == 0
    told = capsys.readouterr().out
    assert "4 of 4 episodes gave the same rewards" in told and "NO" not in told


def test_replay_notices_a_changed_action(finished, browser, tmp_path, capsys):
    out = tmp_path / "r"
    played(out, browser, {"oracle": Oracle()}, ("click-tab",), (SEED,))
    path = next(out.rglob("steps.jsonl"))
    step = json.loads(path.read_text().splitlines()[-1])
    step["action"] = {"type": "Click", "x": 1.0, "y": 1.0}
    path.write_text(json.dumps(step) + "\n")
    assert run.main(["--replay", str(path.parent)]) == 1
    assert "0 of 1 episodes gave the same rewards" in capsys.readouterr().out


def test_ctrl_c_costs_the_running_episode_and_resume_plays_it_again(browser, tmp_path):
    def stop(count):
        if count == 3:
            raise KeyboardInterrupt

    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        played(out, browser, {"oracle": Oracle(stop)})
    episodes = read_run(out).episodes
    lines = sum(len(path.read_text().splitlines()) for path in out.rglob("steps.jsonl"))
    assert lines == 2 and len(episodes) == 1, "what was recorded is there, the episode is not finished"
    again = Oracle()
    played(out, browser, {"oracle": again}, resume=True)
    whole = read_run(out).episodes
    assert len(whole) == 2 and again.count == sum(len(e["steps"]) for e in whole[len(episodes) :])
    assert whole[0]["steps"] == episodes[0]["steps"]


def test_a_crashed_browser_repeats_the_episode_once(browser, tmp_path, capsys):
    killer = Oracle(lambda count: os.kill(browser.pid, signal.SIGKILL) if count == 1 else None)
    played(tmp_path / "r", browser, {"oracle": killer}, ("memory-colour",), (SEED,))
    (episode,) = read_run(tmp_path / "r").episodes
    assert (episode["success"], episode["crashes"], episode["stop"]) == (True, 1, "done")
    assert "reset the environment" in capsys.readouterr().err


def test_a_browser_that_keeps_crashing_is_reported_and_the_run_goes_on(browser, tmp_path):
    def crash(count):
        if count <= 2:
            raise BrowserCrashed("the browser is gone")

    played(tmp_path / "r", browser, {"oracle": Oracle(crash)}, ("click-tab",), (SEED, SEED + 1))
    episodes = read_run(tmp_path / "r").episodes
    assert [(e["success"], e["crashes"], e["stop"]) for e in episodes] == [
        (False, 2, "browser crash"),
        (True, 0, "done"),
    ]


def test_defaults_and_footnotes():
    plan = run.make_plan(run.parser().parse_args(["--method", "full,gui-kv-official"]))
    assert plan.seeds[0] == 1_000_000 and plan.history == 5 and plan.device_scale == 1.0 and len(plan.tasks) >= 8
    assert run.notes(plan) == [f"gui-kv-official: {run.QUERY_HEADS_NOTE}"]
    assert run.space_needed(plan) > run.REPORT_BYTES


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command in an empty folder with a tiny random model in the place of the real one."""
    adapter = tiny_adapter()
    monkeypatch.setattr(run, "load", lambda plan: adapter)
    monkeypatch.chdir(tmp_path)


def test_the_whole_command_on_a_live_page(tiny, tmp_path, capsys):
    (tmp_path / "page.html").write_text("<h1>Hello</h1>")
    page = ["--url", (tmp_path / "page.html").as_uri(), "--goal", "look at it", "--max-steps", "2", "--episodes", "1"]
    request = [
        *page,
        "--method",
        "full,snapkv",
        "--budget",
        "0.5",
        "--max-new-tokens",
        "3",
        "--out",
        "o",
        "--json",
        "o.json",
    ]
    assert run.main(request) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-3:] == ["o/summary.json", "o.json", "o/report.html"]
    summary = json.loads((tmp_path / "o.json").read_text())
    assert "--budget 0.5" in summary["meta"]["command"] and summary["meta"]["chromium"]
    full, snapkv = (r for r in summary["rows"] if r["task"] == "all")
    assert (full["budget"], full["steps"], full["prefill_tokens"], full["decode_tokens"]) == (1.0, 2, 40, 3)
    assert (snapkv["budget"], snapkv["tokens_stored"], snapkv["stop_step_limit"]) == (0.5, 20, 1)
    assert snapkv["kv_share"] < 0.6 < 1 <= full["kv_share"]


def test_a_page_that_never_loads(tiny, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(play, "LOAD_TIMEOUT", 1.5)
        assert run.main(["--url", url, "--goal", "wait", "--out", "o"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"agentkv.run: {url} did not load within 1.5 s; check the address or raise load_timeout")
    )


def test_a_page_that_refuses(tiny, capsys):
    assert run.main(["--url", "http://127.0.0.1:9/", "--goal", "wait", "--out", "o"]) == 2
    assert "http://127.0.0.1:9/ could not be opened" in capsys.readouterr().err
