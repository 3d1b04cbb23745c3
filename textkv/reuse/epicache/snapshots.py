"""Named snapshots: the caches of a conversation's episodes in a folder, one of them in memory.

A folder holds `conversation.json` (turns, settings, clusters: all that the caches are made of) and a cache for each
episode (safetensors, with a checksum). Every file is written beside the one before it and renamed.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from textkv.cache import MethodCache
from textkv.records import checked, listed, parse

FORMAT = 1
FILE = "conversation.json"
_EPISODE = {"name": str, "windows": list, "centre": list, "probe": list, "tokens": int}
_FIELDS = {"model": dict, "settings": dict, "turns": list, "texts": list, "vectors": list, "episodes": list}


class Snapshots:
    """Caches by name. Without a folder all of them stay in memory, on the model's device.

    Args:
        folder: made if missing.

    Attributes:
        active: the name of the cache that was asked for last, or None.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        self.active: str | None = None
        self._held: dict[str, MethodCache] = {}
        self._changed: set[str] = set()

    def put(self, name: str, cache: MethodCache) -> None:
        """Takes a cache in; with a folder it is written, and leaves memory unless it is the active one."""
        self._held[name] = cache
        self._changed.add(name)
        self._tidy()

    def get(self, name: str) -> MethodCache:
        """The cache of that name, which becomes the active one; the one before goes back to the folder.

        Raises:
            ValueError: there is none, or its file is damaged.
        """
        if name not in self._held:
            if self.folder is None:
                raise ValueError(f"there is no snapshot {name!r}")
            # The one before leaves first: two at a time would double the memory.
            self.active = None
            self._tidy()
            self._held[name] = MethodCache.load(self.folder / name, self.model)
        self.active = name
        self._tidy()
        return self._held[name]

    def drop(self, name: str) -> None:
        """Empties the cache of that name if it is in memory; its file stays until another one takes its place."""
        self._changed.discard(name)
        if name in self._held:
            self._held.pop(name).reset()

    def changed(self, name: str) -> None:
        """The cache of that name holds more than its file."""
        self._changed.add(name)

    def kv_bytes(self) -> int:
        """Bytes of the caches in memory."""
        return sum(cache.kv_bytes() for cache in self._held.values())

    def write(self) -> None:
        """Brings all files up to date."""
        for name in sorted(self._changed):
            self._held[name].save(self.folder / name)
        self._changed.clear()

    def _tidy(self) -> None:
        """With a folder: whatever is not active is written if it has changed, and leaves memory."""
        if self.folder is None:
            return
        for name in [name for name in self._held if name != self.active]:
            if name in self._changed:
                self._held[name].save(self.folder / name)
                self._changed.discard(name)
            self._held.pop(name).reset()


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Writes `conversation.json`; until that is done, the one before stays."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{FILE}.{os.getpid()}"
    try:
        beside.write_text(json.dumps({"format": FORMAT} | header, indent=1), encoding="utf-8")
        os.replace(beside, folder / FILE)
    finally:
        beside.unlink(missing_ok=True)


def read_header(folder: Path) -> dict[str, Any]:
    """What `write_header` wrote.

    Raises:
        ValueError: nothing there, damaged, or of another format.
    """
    try:
        header = checked(parse((folder / FILE).read_bytes()), {"format": int})
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        checked(header, _FIELDS)
        _check_fit(header)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no whole conversation: {type(error).__name__}: {error}") from None
    return header


def _check_fit(header: dict[str, Any]) -> None:
    """Raises ValueError if the parts of a header do not belong together. A name leads to a folder: to one in here."""
    vectors = listed(header["vectors"], list, "vectors")
    width = len(vectors[0]) if vectors else 0
    if len(vectors) != len(listed(header["texts"], str, "texts")) or not all(_is_vector(x, width) for x in vectors):
        raise ValueError("there is not one vector for each text, all of one width")
    for told in listed(header["episodes"], dict, "episodes"):
        episode = checked(told, _EPISODE)
        if not re.fullmatch(r"episode-\d+", episode["name"]):
            raise ValueError(f"an episode is called {episode['name']!r}")
        if not _is_vector(episode["centre"], width):
            raise ValueError(f"the centre of {episode['name']} is no vector of {width} numbers")
        if any(not 0 <= number < len(vectors) for number in listed(episode["windows"], int, "windows")):
            raise ValueError(f"{episode['name']} has windows that the conversation has not")
        if min(listed(episode["probe"], int, "probe"), default=-1) < 0:
            raise ValueError(f"{episode['name']} has no probe")


def _is_vector(given: Any, width: int) -> bool:
    return (
        isinstance(given, list)
        and len(given) == width > 0
        and all(isinstance(x, float | int) and math.isfinite(x) for x in given)
    )


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What must be equal for a conversation to go on with a model."""
    config = model.config.get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    return {name: getattr(config, name) for name in names} | {"dtype": str(model.dtype)}
