"""Where installed models lie, and the record beside their weights of where these came from: `agentkv.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from textkv.records import read

RECORD = "agentkv.json"


def root() -> Path:
    """The folder of all installed models: below XDG_CACHE_HOME, or ~/.cache where that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "agentkv" / "models"


def folder_of(name: str, under: Path | None = None) -> Path:
    """Where the model of that name lies, or would lie."""
    return (under or root()) / name


def record_of(folder: Path) -> dict[str, Any] | None:
    """What the installation wrote down, or None where nothing was installed (the record is written last)."""
    try:
        record = read(folder / RECORD)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
