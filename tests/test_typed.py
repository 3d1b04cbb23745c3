"""A user's type checker finds our hints: packages say that they carry them (`py.typed`)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER_FILE = """
import dlm
import torch
from textkv import MethodCache, list_methods
from textkv.kernels import rotate

def held(cache: MethodCache) -> str:
    reveal_type(cache.report().kv_bytes)
    reveal_type(list_methods())
    reveal_type(dlm.DecodingConfig().gen_length)
    rotate()
    return cache.report().kv_bytes
"""
# What the big libraries say of themselves is not looked at: that takes a minute and tells nothing of ours.
SETTINGS = """
[mypy]
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*,tokenizers.*,safetensors.*]
follow_imports = skip
"""


def test_mypy_knows_the_types_of_what_a_user_calls(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(ROOT)})
    shown = [line.partition(": ")[2] for line in run.stdout.splitlines()[:-1]]
    assert shown == [
        'note: Revealed type is "int"',
        'note: Revealed type is "list[str]"',
        'note: Revealed type is "int"',
        'error: Missing positional arguments "x", "delta", "inv_freq" in call to "rotate"  [call-arg]',
        'error: Incompatible return value type (got "int", expected "str")  [return-value]',
    ], run.stdout + run.stderr
