"""A signal that comes while a command is still imported ends it as one that comes later."""

import signal
import subprocess
import sys
import time

import pytest

COMMANDS = ("agentkv.run", "dlm.generate", "envs.oracle", "eval.leaderboard", "textkv.models", "training.masa.train")
SLOW = """
import importlib.abc, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # the first that is slow, as it is on a machine with a slow disk
            try:
                os.write(1, b"importing\\n")
                time.sleep(20)
            except BaseException:  # what transformers does with whatever its own imports raise
                raise ImportError("torch is not there") from None

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "{}: stopped\n"), (signal.SIGTERM, "")])
def test_a_signal_during_the_imports(module, number, told, tmp_path, monkeypatch, reliability):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.")
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (128 + number, told.format(module))
    reliability(3, f"{number.name} while it is imported", module, f"exit {128 + number}, at once")
