"""The peer's environment: a virtual one beside the installed models, made by `python -m eval.peers install`."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from textkv.models import root

KVPRESS = "kvpress==0.5.5"
TRANSFORMERS = "transformers<5.3"  # newer ones do not pass what its hooks read
COMMAND = "python -m eval.peers install"
_READY = "ready"


def folder() -> Path:
    """Where the environment lies."""
    return root().parent / "peers" / "kvpress"


def python() -> Path:
    """Its interpreter.

    Raises:
        FileNotFoundError: it was not made yet.
    """
    if not (folder() / _READY).is_file():
        raise FileNotFoundError(f"kvpress has no environment at {folder()}; make it by `{COMMAND}` (about 1.5 GB)")
    return folder() / "bin" / "python"


def install() -> Path:
    """Make the environment, with the torch that runs here, so that both sides compute with the same kernels."""
    place = folder()
    if (place / _READY).is_file():
        return place
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = version("torch").partition("+")[0]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, f"torch=={torch}", KVPRESS, TRANSFORMERS], check=True)
    (place / _READY).touch()
    return place
