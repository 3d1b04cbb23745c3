"""Programs that are started end with the process that needed them, with all that they started."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from textkv.command import ran, started

from .test_ending import _wait

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")
# A program that has one below it and heeds no signal but the last.
STUBBORN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("begun.part", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename("begun.part", "begun")
    time.sleep(600)
"""
PARENT = """
    import sys
    from textkv.command import ran

    ran([sys.executable, "stubborn.py"])
"""


def gone(folder: Path) -> bool:
    """Whether both of them end in a few seconds."""
    numbers = [int(number) for number in (folder / "begun").read_text().split()]
    alive = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    return not psutil.wait_procs(alive, 20)[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(STUBBORN))
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    return tmp_path


def test_what_is_below_ends_with_the_context(folder):
    with started([sys.executable, "stubborn.py"], cwd=folder):
        _wait(folder / "begun")
    assert gone(folder)


def test_what_is_below_ends_with_a_parent_that_was_killed(folder):
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder, env=os.environ | {"PYTHONPATH": str(root)})
    _wait(folder / "begun")
    parent.kill()
    parent.wait()
    assert gone(folder)


def test_code_and_words_come_back():
    said = "import sys; print('a\\nb', file=sys.stderr); sys.exit(3)"
    assert ran([sys.executable, "-c", said], hear=True) == (3, "a\nb\n")
    assert ran([sys.executable, "-c", ""]) == (0, "")
    code, told = ran(["/no/such/program"], hear=True)
    assert code == 127 and told == "/no/such/program cannot be started (No such file or directory)\n"
    assert ran(["sh", "-c", "kill -9 $$"])[0] == 137
