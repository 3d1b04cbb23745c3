"""What a checkpoint says about itself before anything heavy is loaded: config.json, agent.json, whether there are
weights that we may read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from agentkv.models.base import AgentText
from textkv.checkpoints import read_object

_WORDS = ("system", "prompt", "history_frames", "answer_tokens", "later", "cache")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder or hub id. `config` is its config.json; `agent` its agent.json, None if it has none.

    agent.json may name the agent ("agent") and change its words ("system", "prompt", "later"), lengths
    ("history_frames", "answer_tokens") and which cache it was trained for ("cache"); other keys are notes.
    """

    source: str
    config: dict[str, Any]
    agent: dict[str, Any] | None

    @classmethod
    def at(cls, source: str) -> Checkpoint:
        """Read it. Raises FileNotFoundError for a folder without config or safetensors, and for a name that is
        neither a folder nor on a reachable hub.
        """
        if Path(source).is_dir():
            _check_folder(Path(source))
        config = _json(source, "config.json")
        if config is None:
            raise FileNotFoundError(
                f"{source!r} is no folder here and cannot be had from the hub; "
                'give the folder of a downloaded model or "mini"'
            )
        return cls(source, config, _json(source, "agent.json"))

    @property
    def model_type(self) -> str:
        """The architecture that config.json names."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def names(self) -> tuple[str, ...]:
        """What the checkpoint is called, lower case without separators: by its folder or id, and by its config."""
        # a hub cache keeps models--owner--name/snapshots/<hash>
        path = Path(self.source)
        last = path.parent.parent.name if path.parent.name == "snapshots" else path.name
        given = (last, str(self.config.get("_name_or_path", "")))
        return tuple("".join(c for c in name.lower() if c.isalnum()) for name in given)

    def words(self, default: AgentText) -> AgentText:
        """`default` with what agent.json changes of it. Raises ValueError for words that cannot make a prompt."""
        found = self.agent or {}
        return replace(default, **{key: found[key] for key in _WORDS if key in found})


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder that holds the model's files")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has its weights as *.bin only; these are pickles, which can run code when they are read: "
            "download or convert them to *.safetensors"
        )
    raise FileNotFoundError(f"{folder} has no weights (*.safetensors); download them or convert them to safetensors")


def _json(source: str, name: str) -> dict[str, Any] | None:
    try:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except (OSError, ValueError):
        return None
    return None if path is None else read_object(path)
