"""The interpreter accepts what the compiler rejects, so every shipped configuration is also compiled, without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_configuration_compiles_for_sm_80_and_sm_90():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    files = (ROOT / "kernels").glob("*.py")
    written = sum(len(re.findall(r"^def \w+_kernel\(", file.read_text(), re.MULTILINE)) for file in files)
    for architecture in ("sm_80", "sm_90"):
        compiled = {line.split()[1] for line in run.stdout.splitlines() if line.startswith(architecture)}
        assert len(compiled) == written
