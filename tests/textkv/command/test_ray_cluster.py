"""A cluster that is there already: two raylets of this machine, as two machines would be; one of them dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

if importlib.util.find_spec("ray") is None or not os.environ.get("RAY_TESTS"):
    pytest.skip(
        "starts Ray, a minute's work for a small machine: install the extra ray, RAY_TESTS=1", allow_module_level=True
    )

from tests.processes import ROOT, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")
# As an administrator starts it; the secret of `ray start` would be written to the home folder.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # Else Ray's workers wait for all else that the machine does, and the tests for them.
    "RAY_worker_niceness": "0",
}
GRID = "--n 6 --grid freecache --gen-length 6 --block-length 3 --device cpu --json".split()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def raylet(*options: str):
    """`ray start`, while it is needed; gives its process."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | SETTINGS, start_new_session=True, **quiet)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """With all below it, as a machine that loses its power."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for one in (*below, psutil.Process(process.pid)):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(30)


@pytest.fixture(scope="module")
def cluster():
    """HOST:PORT, and the second machine."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        address = f"127.0.0.1:{free_port()}"
        head = ("--head", f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}")
        with raylet(*head, "--include-dashboard=false"):
            until(lambda: knocks(address))
            with raylet(f"--address={address}", "--node-ip-address=127.0.0.1") as second:
                until(lambda: processors(address) == 2)
                yield address, second


def until(ready, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "the cluster does not come up"
        time.sleep(0.5)


def knocks(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as knock:
        return knock.connect_ex((host, int(port))) == 0


def processors(address: str) -> int:
    asks = f"import ray; ray.init('{address}', logging_level='error'); print(int(ray.cluster_resources()['CPU']))"
    told = subprocess.run([sys.executable, "-c", asks], env=os.environ | SETTINGS, capture_output=True, text=True)
    return int(told.stdout.split()[-1]) if told.returncode == 0 and told.stdout.split() else 0


def decoding(folder: Path, name: str, *options: str):
    return start(folder / name, "eval.decoding", *GRID, str(folder / f"{name}.json"), *options, **SETTINGS)


def rows(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in json.loads(path.read_text())["rows"]]


def test_two_machines_give_the_rows_of_one_process_also_when_one_is_lost(cluster, tmp_path):
    address, second = cluster
    alone = decoding(tmp_path, "alone")
    assert alone.process.wait(300) == 0, alone.told
    shared = decoding(tmp_path, "shared", "--workers", "2", "--ray", address)
    assert shared.process.wait(300) == 0, shared.told
    assert rows(tmp_path / "shared.json") == rows(tmp_path / "alone.json")
    # More workers than there are processors are refused; those of the cluster are still there.
    many = decoding(tmp_path, "many", "--workers", "3", "--ray", address)
    assert many.process.wait(300) == 2 and "has 2 processors and 3 are needed" in many.told
    # A machine is lost in the middle: its job is done again elsewhere, and counted once.
    lost = decoding(tmp_path, "lost", "--workers", "2", "--ray", address, "--n", "12")
    lost.until(lambda: (tmp_path / "lost.json").exists())
    kill(second)
    assert lost.process.wait(300) == 0, lost.told
    whole = decoding(tmp_path, "whole", "--n", "12")
    assert whole.process.wait(300) == 0, whole.told
    assert rows(tmp_path / "lost.json") == rows(tmp_path / "whole.json")


def test_a_command_that_is_stopped_leaves_nothing_on_the_cluster(cluster, tmp_path):
    address, _ = cluster
    command = decoding(tmp_path, "stopped", "--workers", "1", "--ray", address, "--n", "5000")
    command.until(lambda: (tmp_path / "stopped.json").exists())
    workers = [one for one in psutil.process_iter(["cmdline"]) if "_Actor" in " ".join(one.info["cmdline"] or ())]
    assert workers
    assert command.send(signal.SIGINT) == 130 and command.took < 3
    assert not psutil.wait_procs(workers, 60)[1]
    assert processors(address) == 1
