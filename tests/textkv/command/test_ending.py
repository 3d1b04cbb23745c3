"""Commands end: with one line for an error, and with nothing of theirs left behind."""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from textkv.command import Workers, count, readable, results_file, run
from textkv.command.workers import WorkerFailed


def ended(work, **more):
    return run("eval.x", argparse.ArgumentParser(), lambda args, argv: work(), [], **more)


def test_done_is_zero_and_a_number_is_kept():
    assert ended(lambda: None) == 0 and ended(lambda: 1) == 1


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error", [ValueError("n=0:\n use 1"), FileNotFoundError("n=0: use 1"), LookupError("n=0: use 1")]
)
def test_an_error_of_the_request_is_one_line_and_2(error, capsys):
    assert ended(raising(error), explained=(LookupError,)) == 2
    assert capsys.readouterr().err == "eval.x: n=0: use 1\n"


def test_an_error_of_ours_is_not_hidden():
    with pytest.raises(AttributeError):
        ended(raising(AttributeError("ours")))


def test_a_wrong_argument_is_one_line_and_2(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=count)
    assert run("eval.x", parser, lambda args, argv: 0, ["--n", "0"]) == 2
    assert capsys.readouterr().err == "eval.x: argument --n: 0 is not a count; use 1 to 2,147,483,647\n"
    assert run("eval.x", parser, lambda args, argv: 0, ["--m", "0"]) == 2
    assert capsys.readouterr().err == "eval.x: unrecognized arguments: --m 0\n"


@pytest.mark.parametrize("other", ["--plot", "--text"])
def test_what_is_written_takes_no_other_argument_s_place(tmp_path, capsys, other):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=results_file("eval.x"))
    parser.add_argument("--plot", type=results_file("eval.x"))
    parser.add_argument("--text", type=readable)
    path, link = tmp_path / "own.json", tmp_path / "link.json"
    path.write_text('{"meta": {"command": "python -m eval.x"}, "rows": []}')
    link.symlink_to(path)
    work = []
    assert run("eval.x", parser, lambda args, argv: work.append(args), ["--json", str(path), other, str(link)]) == 2
    assert capsys.readouterr().err.startswith(f"eval.x: arguments --json and {other} both name ") and not work


def test_a_worker_without_memory_is_one_line(capsys):
    told = "Caught MemoryError in worker 0.\nTraceback:\n  File x\nnumpy.MemoryError: Unable to allocate 7 GiB\n"
    assert ended(raising(RuntimeError(told))) == 2
    assert capsys.readouterr().err.startswith("eval.x: there is not enough memory (numpy.MemoryError: Unable to all")


def test_ctrl_c_is_one_line_and_130(capsys):
    assert ended(raising(KeyboardInterrupt()), kept="the same command goes on") == 130
    assert capsys.readouterr().err == "eval.x: stopped; the same command goes on\n"


def test_sigterm_closes_what_is_open():
    closed = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(True)

    with pytest.raises(SystemExit) as caught:
        ended(work)
    assert caught.value.code == 143 and closed


def opened(wanted):
    if wanted == "broken":
        raise RuntimeError("no such model here")
    return wanted


def job(opened, number):
    return f"{opened} {number}"


def test_jobs_are_done_and_told():
    with Workers(1, opened, "model") as workers:
        assert sorted(workers.results(job, [(1,), (2,)])) == [((1,), "model 1"), ((2,), "model 2")]


def test_a_worker_that_cannot_be_opened_tells_why():
    with pytest.raises(WorkerFailed, match="^no such model here$"), Workers(1, opened, "broken") as workers:
        list(workers.results(job, [(1,)]))


PARENT = """
    import sys, time
    from pathlib import Path
    from textkv.command import Workers

    class Opened:
        def __init__(self, folder):
            self.folder = Path(folder)

        def close(self):
            (self.folder / "closed").touch()

    def stuck(opened):
        (opened.folder / "begun").touch()
        time.sleep(600)

    if __name__ == "__main__":
        with Workers(1, Opened, sys.argv[1]) as workers:
            list(workers.results(stuck, [()]))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, script, tmp_path], env={**os.environ, "PYTHONPATH": str(root)})
    _wait(tmp_path / "begun")
    parent.kill()
    parent.wait()
    _wait(tmp_path / "closed")
    assert {path.name for path in tmp_path.iterdir()} >= {"begun", "closed"}


STUCK = """
    import sys, tempfile, time
    from pathlib import Path
    from textkv.command import terminable

    with terminable("t: stopped"), tempfile.TemporaryDirectory(dir=sys.argv[1]):
        try:
            (Path(sys.argv[1]) / "begun").touch()
            time.sleep(600)
        finally:
            time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_what_cannot_be_closed_leaves_no_temporary_folder(tmp_path):
    root = Path(__file__).parents[3]
    words = [sys.executable, "-c", textwrap.dedent(STUCK), tmp_path]
    # What ignores Ctrl-C here, as whatever a shell starts in the background, would ignore it there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stuck = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    _wait(tmp_path / "begun")
    stuck.send_signal(signal.SIGINT)
    assert stuck.communicate(timeout=60)[1] == "t: stopped\n" and stuck.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def _wait(path, seconds=240):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.05)


def test_a_ctrl_c_that_nothing_can_be_raised_from_ends_in_one_line_too():
    """It falls into the callback of a weak reference, whose errors Python only prints."""
    code = (
        "import signal, time, weakref\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from textkv.command.ending import terminable\n"
        "class Held: pass\n"
        "with terminable('x: stopped'):\n"
        "    held = Held(); seen = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))\n"
        "    del held\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "x: stopped\n")
