"""A model with atoms, to disk and back: thin over `textkv.models.atoms`, which every `--model` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.masa.mixture import attach, groups_of
from textkv.models.atoms import load_atoms, read_atoms, save_atoms


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a model with atoms to a folder, each atom and coefficient once; returns the file of weights.

    Args:
        dtype: of the numbers on disk; None = as they are.
        about: JSON values for the reader.

    Raises:
        ValueError: the model has no atoms.
        FileExistsError: the folder holds something else.
    """
    groups = groups_of(model)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no atoms; share or convert it first, or use save_pretrained")
    return save_atoms(folder, model, _others(model), groups, tokenizer, dtype, about)


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", combined: bool = True
) -> PreTrainedModel:
    """The model of a folder that `save` or `python -m textkv.masa convert` wrote, in eval mode.

    Args:
        combined: True = ordinary weights, as fast as any model; False = atoms and coefficients stay what they are, to
            be trained on.

    Raises:
        ValueError: no such folder, a damaged file, or weights that are not the configured model's.
    """
    model = load_atoms(folder, dtype, device)
    if not combined:
        for group in read_atoms(folder)[1]:
            attach(model, group.to(dtype, device))
    return model


def _others(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that is no part of a combination, by name; tied ones once."""
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    others = dict(model.named_parameters()) | buffers
    return {name: tensor for name, tensor in others.items() if ".parametrizations." not in name}
