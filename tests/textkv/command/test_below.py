"""Programs that are started end with the process that needed them, with all that they started."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from textkv.command import guarded, ran, started
from textkv.command._guard import LOOK, children, table
from textkv.command.below import GUARD

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

# As a driver of browsers: it ends with its input, but first waits for what is below it and does not answer.
WAITS = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "stubborn.py"], start_new_session=True)
    sys.stdin.read()
    child.wait()
    open("tidied", "w").close()
"""
OPENS = """
    import subprocess, sys, time
    from textkv.command import guarded

    def open():
        return subprocess.Popen([sys.executable, "waits.py"], stdin=subprocess.PIPE)

    with guarded(open, lambda waits: waits.wait(), "waits.py"):
        time.sleep(600)
"""


HASTY = OPENS.replace('"waits.py")', '"waits.py", patient=False)')
FAILS = """
    import os, subprocess, sys, time
    from textkv.command import guarded

    def half():
        subprocess.Popen([sys.executable, "stubborn.py"])
        while not os.path.exists("begun"):
            time.sleep(0.05)
        raise LookupError("half-way")

    with guarded(half, lambda opened: None, "stubborn.py"):
        pass
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
    (tmp_path / "waits.py").write_text(textwrap.dedent(WAITS))
    (tmp_path / "opens.py").write_text(textwrap.dedent(OPENS))
    (tmp_path / "hasty.py").write_text(textwrap.dedent(HASTY))
    (tmp_path / "fails.py").write_text(textwrap.dedent(FAILS))
    return tmp_path


def test_what_is_below_ends_with_the_context(folder):
    with started([sys.executable, "stubborn.py"], cwd=folder):
        _wait(folder / "begun")
    assert gone(folder)


@pytest.mark.parametrize("program", ["parent.py", "opens.py", "hasty.py"])
def test_what_is_below_ends_with_a_parent_that_was_killed(folder, program):
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, program], cwd=folder, env=os.environ | {"PYTHONPATH": str(root)})
    _wait(folder / "begun")
    parent.kill()
    parent.wait()
    assert gone(folder)


def test_what_a_library_started_before_it_failed_is_ended(folder):
    root = Path(__file__).parents[3]
    command = [sys.executable, "fails.py"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert b"half-way" in done.stderr and (folder / "begun").exists()
    assert gone(folder)


def test_what_a_library_started_is_not_held_up_by_what_does_not_answer(folder):
    waits = [sys.executable, "waits.py"]

    def close(process):
        process.stdin.close()
        process.wait()

    with guarded(lambda: subprocess.Popen(waits, cwd=folder, stdin=subprocess.PIPE), close, "waits.py") as process:
        _wait(folder / "begun")
    assert process.returncode == 0 and (folder / "tidied").exists()  # it was left the time to remove its files
    assert gone(folder)


def test_processes_that_ended_and_those_of_others_are_not_taken_for_ours():
    ended = subprocess.Popen([sys.executable, "-c", "pass", "a-word"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    with subprocess.Popen([sys.executable, "-c", "input()", "a-word"], stdin=subprocess.PIPE) as lives:
        assert children(os.getpid(), "a-word") == {lives.pid}
        assert children(os.getppid(), "a-word") == set()
    ended.wait()


def test_code_and_words_come_back():
    said = "import sys; print('a\\nb', file=sys.stderr); sys.exit(3)"
    assert ran([sys.executable, "-c", said], hear=True) == (3, "a\nb\n")
    assert ran([sys.executable, "-c", ""]) == (0, "")
    code, told = ran(["/no/such/program"], hear=True)
    assert code == 127 and told == "/no/such/program cannot be started (No such file or directory)\n"
    assert ran(["sh", "-c", "kill -9 $$"])[0] == 137


def test_what_lost_its_parent_before_the_guard_looked_is_ended_too():
    parent = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300"])
    while len(found := children(parent.pid, "sleep 300")) < 2:
        time.sleep(0.05)
    guard = subprocess.Popen([sys.executable, "-I", "-S", str(GUARD), "now", str(parent.pid)], stdin=subprocess.PIPE)
    time.sleep(LOOK + 1.0)
    parent.kill()
    parent.wait()
    guard.stdin.close()
    assert guard.wait(20) == 0
    assert not found & table().keys()
