"""Commands as processes of their own, with all that they start, and what is left of it after a signal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BEGIN, END = 240.0, 90.0  # seconds that a loaded machine may take


@dataclass
class Command:
    """A running `python -m module ...` in a session of its own; its files lie in `folder`."""

    folder: Path
    temp: Path
    process: subprocess.Popen
    below: list[psutil.Process] = field(default_factory=list)
    sent: float = 0.0
    took: float = 0.0  # seconds from the signal to the exit
    took_all: float = 0.0  # and to that of all below

    @property
    def temporary(self) -> list[str]:
        """What is in its temporary folder; torch's cache of compiled code stays there for the next process."""
        return [path.name for path in self.temp.iterdir() if not path.name.startswith("torchinductor")]

    @property
    def told(self) -> str:
        """What it wrote to stderr."""
        return (self.folder / "stderr").read_text()

    @property
    def said(self) -> str:
        """What it wrote to stdout."""
        return (self.folder / "stdout").read_text()

    def has(self, word: str) -> bool:
        """Whether a process below it has the word in its command."""
        return any(word in part for one in self._children() for part in _words(one))

    def until(self, ready: Callable[[], object]) -> Command:
        """Wait until `ready`; then `below` holds every process that it has started."""
        end = time.monotonic() + BEGIN
        while not ready():
            assert self.process.poll() is None and time.monotonic() < end, self.told
            time.sleep(0.05)
        self.below = self._children()
        return self

    @property
    def children(self) -> list[psutil.Process]:
        """Those that it has started itself."""
        return psutil.Process(self.process.pid).children()

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def send(self, number: int) -> int:
        """Send a signal, a Ctrl-C to the whole group as a terminal does; the exit code."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.sent = time.monotonic()
        code = self.process.wait(END)
        self.took = time.monotonic() - self.sent
        return code

    def kill(self) -> None:
        """All of it, for a test that failed."""
        for one in [self.process, *self.below]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        shutil.rmtree(self.temp, ignore_errors=True)

    def left(self) -> list[psutil.Process]:
        """Those of `below` that do not end."""
        _, alive = psutil.wait_procs(self.below, END)
        self.took_all = time.monotonic() - self.sent
        return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def start(folder: Path, module: str, *args: str, **environment: str) -> Command:
    """Start it in `folder`, where its outputs go too."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not in `folder`: the path of Chromium's socket must have fewer than 108 characters.
    temp = Path(tempfile.mkdtemp(prefix="c-"))
    env = os.environ | {"TMPDIR": str(temp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= environment
    # What ignores Ctrl-C here would ignore it there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *args], cwd=folder, env=env, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    return Command(folder, temp, process)
