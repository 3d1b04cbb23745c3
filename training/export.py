"""A trained model as the folder that the package loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.disk import whole_folder
from textkv.records import checked, parse

TRAINED = "training.json"


def trained_folder(text: str) -> Path:
    """The export of a training that a user names. Raises ValueError for another folder."""
    if not (Path(text) / TRAINED).is_file():
        raise ValueError(f"{text!r} has no {TRAINED}; give the `latest` folder of a training")
    return Path(text)


def read_trained(folder: Path) -> dict[str, Any]:
    """What training.json says of a training. Raises ValueError, with the file, unless `export` wrote it."""
    path = folder / TRAINED
    try:
        value = checked(parse(path.read_bytes()), {"step": int, "seconds": float}, {"model": str, "before": dict})
        checked(value.get("before", {"step": 0, "seconds": 0.0}), {"step": int, "seconds": float})
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}; export the training again") from None
    return value


def export(
    model: PreTrainedModel,
    average: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trained: Mapping[str, Any],
    **settings: Mapping[str, Any],
) -> None:
    """Write `average` (named as the model's parameters) in fp16, the configuration and the tokenizer to `folder`, each
    file replaced atomically; loading widens the weights again.

    Args:
        trained: what training.json says of the training.
        settings: further JSON files by name, such as `generation_config={...}`.
    """
    with whole_folder(folder) as draft:
        weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in average.items()}
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
        generation = getattr(model, "generation_config", None)
        made = {"config": config} | ({"generation_config": generation.to_diff_dict()} if generation else {})
        for name, values in (made | settings).items():
            _write(draft / f"{name}.json", json.dumps(values, indent=2, sort_keys=True))
        _write(draft / TRAINED, json.dumps(trained, indent=2))
        tokenizer.save_pretrained(draft)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
