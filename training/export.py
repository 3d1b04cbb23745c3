"""A trained model as the folder that the package loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINED = "training.json"


def trained_folder(text: str) -> Path:
    """The export of a training that a user names. Raises ValueError for another folder."""
    if not (Path(text) / TRAINED).is_file():
        raise ValueError(f"{text!r} has no {TRAINED}; give the `latest` folder of a training")
    return Path(text)


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
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in average.items()}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    generation = getattr(model, "generation_config", None)
    made = {"config": config} | ({"generation_config": generation.to_diff_dict()} if generation else {})
    for name, values in (made | settings).items():
        _write(draft / f"{name}.json", json.dumps(values, indent=2, sort_keys=True))
    _write(draft / TRAINED, json.dumps(trained, indent=2))
    tokenizer.save_pretrained(draft)
    replace(draft, folder)
    draft.rmdir()


def replace(draft: Path, folder: Path) -> None:
    """Move every file of `draft` into `folder`, over what is there: the package never lacks one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        # Whatever the writing library and the umask made of it: a package's data must be readable to all.
        path.chmod(0o644)
        os.replace(path, folder / path.name)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
