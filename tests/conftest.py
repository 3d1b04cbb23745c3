"""One torch thread: the models here are tiny, and threads that wait for each other cost more than they bring.

And no font of the system, in this process and those that it starts: a browser sees the project's fonts, or a single
typewriter face where it was launched with the machine's.
"""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ["FONTCONFIG_FILE"] = str(Path(__file__).with_name("machine-fonts.conf"))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a packed cache as small beside a tiny model's prompt as they are beside a real one's."""
    monkeypatch.setattr("textkv.kernels._packed_cpu._TOKENS", 256)
    for path in ("_packed_cpu", "_coded_cpu"):
        monkeypatch.setattr(f"textkv.kernels.{path}._TILE", 512 * 16)


@pytest.fixture
def reliability(request):
    """`reliability(kind, fault, command, outcome)`: one case for docs/reliability.md, see `tests.reliability`."""

    def told(kind: int, fault: str, command: str, outcome: str, n: int = 1) -> None:
        request.node.user_properties.append(
            ("reliability", {"kind": kind, "fault": fault, "command": command, "outcome": outcome, "n": n})
        )

    return told
