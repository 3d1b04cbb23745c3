"""Model adapters: `load_adapter("mini")`, a local folder or a hub id gives a model that can be prompted as a GUI
agent.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig

from agentkv.models.base import Frame, History, ModelAdapter, ParseError, Prompt
from agentkv.models.qwen_vl import MODEL_TYPE, QwenVLAdapter

__all__ = ["FAMILIES", "Frame", "History", "ModelAdapter", "ParseError", "Prompt", "load_adapter"]

FAMILIES = {MODEL_TYPE: QwenVLAdapter}
MINI = Path(__file__).parent.parent / "mini" / "weights"


def load_adapter(
    path_or_id: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> ModelAdapter:
    """The model at `path_or_id`: "mini" (shipped with this package), a folder, or a hub id. Safetensors only, no remote
    code.

    Raises FileNotFoundError for a folder without config or weights and for a name that is neither a folder nor on a
    reachable hub; ValueError for a model family without an adapter.
    """
    source = str(MINI) if str(path_or_id) == "mini" else str(path_or_id)
    family = _family(source)
    if family not in FAMILIES:
        raise ValueError(
            f"{source} is a {family!r} model; supported families: {', '.join(FAMILIES)} (Qwen2.5-VL, UI-TARS-1.5)"
        )
    return FAMILIES[family].load(source, device, dtype)


def _family(source: str) -> str:
    folder = Path(source)
    if folder.is_dir():
        return _local_family(folder)
    try:
        return AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here and cannot be had from the hub; "
            'give the folder of a downloaded model or "mini"'
        ) from error


def _local_family(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder that holds the model's files")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no weights (*.safetensors); download them or convert them to safetensors"
        )
    return str(json.loads(config.read_text(encoding="utf-8")).get("model_type", "unknown"))
