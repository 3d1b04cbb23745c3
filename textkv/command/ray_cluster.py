"""Ray for one command: started on this machine alone, or joined where it runs; and nothing of it left afterwards.

Ray is made for machines that trust each other. Started here it listens on the loopback address only, asks for a secret
that no other process knows, shows no dashboard and reports nothing to anybody. Its daemons end with this process,
whatever ends it; its files lie in a folder of their own, which a small process removes as soon as this one has gone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from textkv.command.below import guarded
from textkv.command.ending import TERMINATED

LOCAL = "local"
STORE = 128_000_000  # bytes of Ray's object store: jobs and their results are small
ROOM = 28  # characters of a temporary folder's path: Ray's sockets lie 78 below it, and the system takes 107
KNOCK = 5.0  # seconds that a cluster has to take a connection
REMOVED = 10.0  # seconds that removing Ray's files may take
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
"""The first makes Ray listen on 127.0.0.1, on every system; the second asks callers for `RAY_AUTH_TOKEN`; the third
gives workers their turn on a busy machine: Ray itself would let everything else go first.
"""

# Files are written until the last daemon has ended, so the folder must stay away for a moment.
KEEPER = """
import shutil, sys, time
from pathlib import Path
sys.stdin.buffer.read()
folder, gone = Path(sys.argv[1]), 0
for _ in range(100):
    gone = 0 if folder.exists() else gone + 1
    if gone > 3:
        break
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.1)
"""


def cluster(text: str) -> str:
    """Where Ray runs: `local`, or HOST:PORT of a cluster that is there."""
    host, _, port = text.rpartition(":")
    if text != LOCAL and not (re.fullmatch(r"[\w.\[\]:-]+", host) and re.fullmatch(r"[0-9]{1,5}", port)):
        raise ArgumentTypeError(f"{text!r} is no Ray cluster; write local, or the HOST:PORT that ray start printed")
    if text != LOCAL and not 1 <= int(port) <= 65_535:
        raise ArgumentTypeError(f"{port} is not a port; use 1 to 65,535")
    if importlib.util.find_spec("ray") is None:
        raise ArgumentTypeError("ray is not installed; pip install 'agentkv[ray]'")
    return text


@contextmanager
def connected(address: str, cpus: int) -> Iterator[ModuleType]:
    """A context in which this process is connected to Ray; gives the module. Within another it is the same connection.

    Args:
        address: `local` = start it here; else HOST:PORT.
        cpus: workers that must have room at a time.

    Raises:
        ValueError: nothing answers there, or there are fewer processors than `cpus`.
    """
    with _open(address, cpus) as ray:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < cpus:
            raise ValueError(f"Ray at {address} has {there} processors and {cpus} are needed; use fewer workers")
        yield ray


@contextmanager
def _open(address: str, cpus: int) -> Iterator[ModuleType]:
    """A connection that is closed behind, unless there was one before."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield ray
        return
    with _started(cpus) if address == LOCAL else _joined(address) as ray:
        yield ray


@contextmanager
def _started(cpus: int) -> Iterator[ModuleType]:
    with _folder() as folder, _environment(QUIET | HERE | {"RAY_AUTH_TOKEN": _secret(), "TMPDIR": f"{folder}/t"}):
        # Of the workers: what they leave, as browsers do that are killed, goes with Ray's own files.
        (folder / "t").mkdir()
        told = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False, "_temp_dir": str(folder)}
        # Its daemons wait for each other longer than a Ctrl-C may take, and much longer for a driver that was killed.
        with guarded(lambda: _init(address=LOCAL, **told), lambda ray: ray.shutdown(), "ray", patient=False) as ray:
            yield ray


@cache
def _secret() -> str:
    """Of this process: Ray reads it once."""
    return secrets.token_hex(16)


@contextmanager
def _joined(address: str) -> Iterator[ModuleType]:
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for a minute, and tell of every try.
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
    except OSError as error:
        raise ValueError(f"nothing answers at {address} ({error.strerror or error}); is Ray running there?") from None
    with _environment(QUIET):
        ray = _init(address=address)
        try:
            yield ray
        finally:
            ray.shutdown()


def _init(**options: object) -> ModuleType:
    """Ray, connected. Its import and its start put handlers of their own in place of this process's."""
    main = threading.current_thread() is threading.main_thread()
    hook, heard = sys.excepthook, signal.getsignal(signal.SIGTERM)
    try:
        import ray  # of the extra, and slow

        if options["address"] == LOCAL and (ip := ray.util.get_node_ip_address()) != "127.0.0.1":
            # It reads its settings when it is imported.
            raise ValueError(f"Ray was imported before and would listen on {ip}; leave its import to textkv.command")
        ray.init(log_to_driver=False, logging_level="error", configure_logging=True, **options)
        return ray
    except SystemExit:
        # Ray's own answer to SIGTERM, which has another code than ours.
        raise SystemExit(TERMINATED) from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # Its own word for daemons that do not come up in half a minute.
        raise ValueError(f"Ray did not start ({str(error).splitlines()[0]}); is the machine very busy?") from None
    finally:
        sys.excepthook = hook
        if main:
            signal.signal(signal.SIGTERM, heard)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Those variables for this process and what it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for Ray's files, which goes when this process goes, even if that is killed."""
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) <= ROOM - len("/ray-12345678") else "/tmp")
    # It waits for the end of its input. Nobody but this process holds the other end, and no Ctrl-C reaches it.
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-c", KEEPER, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        assert keeper.stdin is not None
        keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(REMOVED)
