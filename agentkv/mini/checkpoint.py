"""Training state on disk without pickle: tensors in one safetensors file, scalars in its JSON header, replaced
atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Optimizers = Sequence[torch.optim.Optimizer]


def save_state(
    path: Path,
    model: torch.nn.Module,
    average: dict[str, torch.Tensor],
    optimizers: Optimizers,
    scalars: dict,
) -> None:
    """Write model, averaged weights, the optimizers' moments and `scalars` (JSON values) to `path`; a crash leaves the
    old file.
    """
    tensors: dict[str, torch.Tensor] = {}
    held = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = average[name]
        for key, value in held.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).float()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"scalars": json.dumps(scalars)})
    os.replace(partial, path)


def load_state(path: Path, model: torch.nn.Module, average: dict[str, torch.Tensor], optimizers: Optimizers) -> dict:
    """Read what `save_state` wrote into the given objects and return the scalars."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for entry in file.keys():
            kind, _, rest = entry.partition(".")
            if kind == "model":
                names[rest].copy_(file.get_tensor(entry))
            elif kind == "average":
                average[rest].copy_(file.get_tensor(entry))
            else:
                key, _, name = rest.partition(".")
                parameter = names[name]
                owner[parameter].state[parameter][key] = file.get_tensor(entry).to(parameter.device)
        return json.loads(file.metadata()["scalars"])
