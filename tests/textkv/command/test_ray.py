"""Workers on Ray: the results of one process, a killed worker replaced, and nothing that other machines could reach.

Ray is started once for all tests here: that takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

# Not imported: it reads its settings when it is.
if importlib.util.find_spec("ray") is None or not os.environ.get("RAY_TESTS"):
    pytest.skip(
        "starts Ray, a minute's work for a small machine: install the extra ray, RAY_TESTS=1", allow_module_level=True
    )

from agentkv.eval.agentnetbench.__main__ import main as agentnetbench
from agentkv.eval.decoding import main as decoding
from agentkv.eval.webtasks import Study, Worker, play, rows_of
from agentkv.play import open_folder
from tests.eval.agentnetbench.sample import FORM, SHELL, write
from textkv.command import Crew, WorkerFailed, add_crew, ray_cluster, ray_workers
from textkv.command.ray_cluster import cluster, connected
from textkv.command.ray_workers import RayWorkers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")


@pytest.fixture(scope="module")
def ray():
    with connected("local", 5) as module:
        yield module


def opened(wanted: str) -> str:
    if wanted == "broken":
        raise RuntimeError("no such model here")
    return wanted


def job(opened: str, number: int) -> str:
    if number < 0:
        raise LookupError(f"{number} is no number\nhere")
    return f"{opened} {number}"


def die(opened: str, folder: Path, deaths: int) -> int:
    """Ends its process as an impatient kernel does, the first `deaths` times."""
    tries = len(list(folder.iterdir()))
    (folder / f"try-{tries}").touch()
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


@pytest.fixture(scope="module")
def workers(ray):
    with RayWorkers(2, "local", opened, "model") as two:
        yield two


def test_jobs_are_done_and_told(workers):
    assert sorted(workers.results(job, [(n,) for n in range(5)])) == [((n,), f"model {n}") for n in range(5)]
    assert list(workers.results(job, [])) == []


def test_a_job_that_fails_fails_as_anywhere_and_the_next_goes_on(workers):
    with pytest.raises(LookupError, match="^-1 is no number\nhere$"):
        list(workers.results(job, [(-1,)]))
    assert list(workers.results(job, [(7,)])) == [((7,), "model 7")]


def test_a_worker_that_cannot_be_opened_tells_why(ray):
    with pytest.raises(WorkerFailed, match="^no such model here$"), RayWorkers(1, "local", opened, "broken") as one:
        list(one.results(job, [(1,)]))


def test_the_job_of_a_killed_worker_is_done_again_and_counted_once(workers, tmp_path):
    found = list(workers.results(die, [(tmp_path, 1)]))
    assert [args for args, _ in found] == [(tmp_path, 1)] and len(list(tmp_path.iterdir())) == 2
    # Whoever came in its place goes on with other jobs.
    assert list(workers.results(job, [(7,)])) == [((7,), "model 7")]


def test_a_job_that_kills_every_worker_is_given_up(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers, "TRIES", 2)
    with pytest.raises(WorkerFailed, match="^2 workers died of the same job"):
        list(workers.results(die, [(tmp_path, 99)]))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_job_of_a_worker_for_whom_there_is_no_room_any_more_is_done_by_another(ray):
    free = int(ray.available_resources()["CPU"])
    place = ray.remote(num_cpus=free - 1)(Doubles).remote(Path())
    ray.get(place.__ray_ready__.remote())
    try:
        with RayWorkers(2, "local", opened, "model") as two:
            # The second cannot come, and has a job.
            assert sorted(two.results(job, [(n,) for n in range(4)])) == [((n,), f"model {n}") for n in range(4)]
    finally:
        ray.kill(place)


def test_more_workers_than_there_is_room_for_are_refused(ray):
    with pytest.raises(ValueError, match="has 5 processors and 6 are needed"), RayWorkers(6, "local", opened, "m"):
        pass


def test_no_other_machine_and_no_other_user_is_let_in(workers):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and os.environ["RAY_AUTH_MODE"] == "token"
    list(workers.results(job, [(1,)]))
    here = psutil.Process()
    ours = [here, *here.children(recursive=True)]
    ends = [(x.laddr, x.raddr) for one in ours for x in one.net_connections("inet")]
    assert len(ends) > 10
    for own, other in ends:
        for end in (own, other):
            assert not end or end.ip in ("127.0.0.1", "::ffff:127.0.0.1", "::1"), (own, other)


def test_the_secret_and_the_settings_go_with_the_context(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "mine")
    with ray_cluster._environment({"RAY_AUTH_MODE": "token", "RAY_X": "1"}):
        assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_X"]) == ("token", "1")
    assert os.environ["RAY_AUTH_MODE"] == "mine" and "RAY_X" not in os.environ


def test_a_missing_extra_is_one_line(monkeypatch):
    assert cluster("local") == "local" and cluster("10.0.0.1:6379") == "10.0.0.1:6379"
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^ray is not installed; pip install 'agentkv\[ray\]'$"):
        cluster("local")


def test_a_cluster_that_is_not_there_is_said_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^nothing answers at {address}"), ray_cluster._joined(address):
            pass


def test_a_gpu_by_number_is_refused(ray):
    with pytest.raises(ValueError, match="use --device cuda"):
        Crew(2, "local", "cuda:1")
    p = argparse.ArgumentParser()
    add_crew(p, 1, "each")
    assert Crew.of(p.parse_args([])).alone and not Crew.of(p.parse_args(["--ray", "local"])).alone


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in json.loads(path.read_text())["rows"]]


RAY = ["--workers", "2", "--ray", "local"]


def test_decoding_gives_the_rows_of_one_process(ray, tmp_path):
    asked = ["--n", "3", "--grid", "freecache", "--gen-length", "6", "--block-length", "3", "--device", "cpu", "--json"]
    assert decoding([*asked, str(tmp_path / "alone.json")]) == 0
    assert decoding([*asked, str(tmp_path / "ray.json"), *RAY]) == 0
    assert without_seconds(tmp_path / "ray.json") == without_seconds(tmp_path / "alone.json")


def test_recorded_tasks_give_the_rows_of_one_process(ray, tmp_path):
    folder = write(tmp_path, FORM, SHELL)
    asked = ["--data", str(folder), "--method", "gui-kv", "--max-new-tokens", "2", "--screenshots", "2"]
    asked += ["--history", "own", "--device", "cpu", "--json"]
    assert agentnetbench([*asked, str(tmp_path / "alone.json")]) == 0
    # One that was stopped in the middle of a task goes on, on Ray too.
    lines = (tmp_path / "alone.jsonl").read_text().splitlines()
    (tmp_path / "ray.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert agentnetbench([*asked, str(tmp_path / "ray.json"), *RAY]) == 0
    assert without_seconds(tmp_path / "ray.json") == without_seconds(tmp_path / "alone.json")
    assert len((tmp_path / "ray.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.parametrize("rows", [[], ["--rows", "2"]], ids=["in-turn", "together"])
def test_workers_that_share_a_model_give_the_rows_of_one_process(ray, tmp_path, rows):
    folder = write(tmp_path, FORM, SHELL)
    asked = ["--data", str(folder), "--method", "gui-kv", "--max-new-tokens", "2", "--screenshots", "2"]
    asked += ["--device", "cpu", "--json"]
    assert agentnetbench([*asked, str(tmp_path / "alone.json")]) == 0
    assert agentnetbench([*asked, str(tmp_path / "ray.json"), *RAY, "--models", "1", *rows]) == 0
    found = [without_seconds(tmp_path / name) for name in ("alone.json", "ray.json")]
    for mine, its in zip(*found, strict=True):
        # Rows of one cache are padded, and some stores are rectangles.
        loose = {name for name in mine if name.startswith("kv_bytes") and name != "kv_bytes_full"} if rows else set()
        assert {k: v for k, v in mine.items() if k not in loose} == {k: v for k, v in its.items() if k not in loose}
        assert all(its[name] == pytest.approx(mine[name], rel=0.15) for name in loose if mine[name])


class Doubles:
    """What is shared: doubles numbers; dies of 13 the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def joins(self, together, other):
        return True

    def one(self, asked):
        if asked == 13 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if asked < 0:
            raise LookupError(f"{asked} is no number")
        return 2 * asked

    def several(self, asked):
        return [self.one(one) for one in asked]


def opened_with(ask):
    return ask


def asks(ask, number: int) -> int:
    return ask(number)


def test_what_is_shared_and_dies_is_opened_again_and_loses_nothing(ray, tmp_path):
    with Crew(2, "local", models=1, rows=4).sharing(Doubles, tmp_path) as ask:
        with Crew(2, "local").open(opened_with, ask) as there:
            found = dict(there.results(asks, [(n,) for n in range(30)]))
            assert found == {(n,): 2 * n for n in range(30)} and (tmp_path / "died").exists()
            with pytest.raises(LookupError, match="^-1 is no number$"):
                list(there.results(asks, [(-1,)]))


def test_what_is_shared_and_cannot_be_opened_tells_why(ray):
    with Crew(1, "local", models=1).sharing(opened, "broken") as ask:
        with Crew(1, "local").open(opened_with, ask) as there:
            with pytest.raises(WorkerFailed, match="^no such model here$"):
                list(there.results(asks, [(1,)]))


class Mortal(Worker):
    """Is killed when it has played one job, the first time."""

    def play(self, folder, plan):
        super().play(folder, plan)
        killed = folder.parent / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.browser
def test_episodes_of_a_killed_worker_are_played_again_and_counted_once(ray, tmp_path):
    def study(name: str) -> Study:
        made = Study(("click-test", "memory-first"), ("full",), ("0.4",), (1,), 1, 1_000_000, tmp_path / name)
        for folder, plan in made.cells():
            open_folder(folder, plan, True, {}, [])
        return made

    alone, shared = study("alone"), study("ray")
    worker = Worker(alone.jobs()[0][1], None)
    try:
        for folder, plan in alone.jobs():
            worker.play(folder, plan)
    finally:
        worker.close()
    jobs = shared.jobs()
    with Crew(2, "local").open(Mortal, jobs[0][1], None) as there:
        assert len(list(there.results(Mortal.play, jobs))) == 2
    assert (tmp_path / "ray" / "killed").exists() and not shared.jobs()
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(one)] for one in (alone, shared)]
    assert rows[0] == rows[1] and rows[0][-1]["n"] == 2
    # And by workers that have browsers alone, and share a model.
    third = study("shared")
    play(third, Crew(2, "local", models=1), None, {})
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(third)] == rows[0]
