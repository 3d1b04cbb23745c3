"""Whatever ends a command ends all that it started: workers, drivers, browsers, temporary folders.

Each start of a command takes seconds, so each meets one or two of the signals; with ALL_ENDINGS=1 all three.
"""

import os
import shutil
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.processes import Command, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def ended_by(*numbers: int):
    """Those signals, or all."""
    chosen = SIGNALS if os.environ.get("ALL_ENDINGS") else numbers
    return pytest.mark.parametrize("number", chosen, ids=lambda number: number.name)


PLAYED = ["--tasks", "click-test", "--episodes", "5000"]


def episodes(folder: Path) -> int:
    return len(list(folder.rglob("steps.jsonl")))


def browsers(command: Command) -> list[psutil.Process]:
    return [one for one in command.below if "chrom" in one.name()]


def children(command: Command) -> list[psutil.Process]:
    found = psutil.Process(command.process.pid).children(recursive=True)
    return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def daemons(command: Command) -> list[psutil.Process]:
    """Those of Ray."""
    return [one for one in command.below if one.name() in ("raylet", "gcs_server")]


def check(command: Command, number: int, name: str, reliability) -> None:
    """The exit code, one line after a Ctrl-C, and nothing left."""
    assert command.send(number) == SIGNALS[number], command.told
    assert command.left() == [] and command.temporary == []
    shutil.rmtree(command.temp)
    assert "Traceback" not in command.told
    if number == signal.SIGINT:
        assert command.told.splitlines()[-1].startswith(f"{name}: stopped")
    reliability(3, signal.Signals(number).name, name, f"exit {SIGNALS[number]}, no process, no temporary folder")


@pytest.mark.browser
@ended_by(signal.SIGINT, signal.SIGTERM)
def test_an_agent_and_its_browser(tmp_path, number, reliability):
    command = start(tmp_path / "c", "agentkv.run", *PLAYED, "--out", "run")
    command.until(lambda: episodes(tmp_path) > 0)
    assert browsers(command)
    check(command, number, "agentkv.run", reliability)


@pytest.mark.browser
@ended_by(signal.SIGTERM)
def test_a_study_with_workers_and_their_browsers(tmp_path, number, reliability):
    grid = ["--methods", "full", "--history", "1", "--workers", "1", "--out", "study"]
    command = start(tmp_path / "c", "eval.webtasks", *PLAYED[:3], "40", *grid)
    command.until(lambda: episodes(tmp_path) > 0)
    assert browsers(command) and len(command.below) > len(browsers(command)) + 1
    check(command, number, "eval.webtasks", reliability)


@pytest.mark.browser
@ended_by(signal.SIGINT)
def test_a_study_on_ray_and_its_browsers(tmp_path, number, reliability):
    grid = ["--methods", "full", "--history", "1", "--workers", "1", "--ray", "local", "--out", "study"]
    command = start(tmp_path / "c", "eval.webtasks", *PLAYED[:3], "40", *grid)
    command.until(lambda: episodes(tmp_path) > 0)
    assert browsers(command) and daemons(command)
    check(command, number, "eval.webtasks", reliability)


@ended_by(signal.SIGTERM, signal.SIGKILL)
def test_a_board_on_ray(tmp_path, number, reliability):
    cell = ["--methods", "full", "--length", "128", "--n", "5000", "--json", "b.json"]
    command = start(tmp_path / "c", "eval.leaderboard", *cell, "--workers", "1", "--ray", "local")
    command.until(lambda: any("_Actor" in " ".join(one.cmdline()) for one in children(command)))
    assert daemons(command)
    check(command, number, "eval.leaderboard", reliability)


@ended_by(signal.SIGTERM)
def test_a_door_and_its_replicas(tmp_path, number, reliability):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = ["--model", "mini-text", "--ray", "local", "--replicas", "1", "--port", port]
    command = start(tmp_path / "c", "agentkv.serve", *asked)
    command.until(lambda: "serves" in (tmp_path / "c" / "stdout").read_text())
    assert daemons(command)
    check(command, number, "agentkv.serve", reliability)


@ended_by(signal.SIGKILL)
def test_a_board_with_workers(tmp_path, number, reliability):
    cell = ["--methods", "snapkv", "--budgets", "0.5", "--length", "128", "--n", "5000", "--json", "b.json"]
    command = start(tmp_path / "c", "eval.leaderboard", *cell)
    # Two workers and multiprocessing's own tracker; a worker that still imports must end too.
    command.until(lambda: len(psutil.Process(command.process.pid).children()) > 2)
    check(command, number, "eval.leaderboard", reliability)
