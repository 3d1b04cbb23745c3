"""The peer's environment: a virtual one beside the installed models, made by `python -m eval.peers install`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from textkv.command import ran
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
    _run([sys.executable, "-m", "venv", str(place)])
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = version("torch").partition("+")[0]
    _run([*pip, f"torch=={torch}"])
    _run([*pip, f"torch=={torch}", KVPRESS, TRANSFORMERS])
    (place / _READY).touch()
    return place


def _run(command: list[str]) -> None:
    """Raises ChildProcessError if the command fails; what it says is seen."""
    code, _ = ran(command)
    if code:
        raise ChildProcessError(f"{' '.join(command[1:4])} ended with {code}; see above, then run `{COMMAND}` again")
