"""Training state on disk without pickle: tensors in one safetensors file, scalars in its JSON header, replaced
atomically.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_state(
    path: Path,
    model: torch.nn.Module,
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scalars: dict,
) -> None:
    """Write model, averaged weights, AdamW moments and `scalars` (JSON values) to `path`; a crash leaves the old
    file.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).float()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"scalars": json.dumps(scalars)})
    os.replace(partial, path)


def load_state(
    path: Path, model: torch.nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict:
    """Read what `save_state` wrote into the given objects and return the scalars."""
    with safe_open(path, framework="pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        names = set(file.keys())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}"))
                average[name].copy_(file.get_tensor(f"average.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in names]
                if keys:
                    optimizer.state[parameter] = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in keys}
    return scalars
