"""A training on disk, without pickle: tensors in one safetensors file with the counters in its JSON header."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from textkv.checkpoints import listed, readable_files
from textkv.disk import disk_errors
from textkv.records import checked, parse

Optimizers = Sequence[torch.optim.Optimizer]
Average = dict[str, torch.Tensor]


WHAT, MEND = "the state of a training", "move it away to begin anew, or use another --runs folder"
COUNTERS = {"model": str, "step": int, "seconds": float}


def save_state(
    path: Path, model: torch.nn.Module, average: Average, optimizers: Optimizers, counters: dict[str, Any]
) -> None:
    """Write the weights of `model`, `average`, the optimizers' moments and `counters` (JSON values) to `path`; a crash
    leaves the old file.
    """
    tensors: dict[str, torch.Tensor] = {}
    moments = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    # By name and not by place: optimizers group the parameters in another order than the model.
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"], tensors[f"average.{name}"] = parameter.detach(), average[name]
        for key, value in moments.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).float()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with disk_errors(path):
            save_file(tensors, partial, metadata={"counters": json.dumps(counters)})
            os.replace(partial, path)
    finally:
        # Half a state would keep the disk full.
        partial.unlink(missing_ok=True)


def read_counters(path: Path) -> dict[str, Any]:
    """The counters that `save_state` wrote to `path`. Raises ValueError for a file that it did not write."""
    with readable_files(path, WHAT, MEND), safe_open(path, framework="pt") as file:
        return checked(parse((file.metadata() or {})["counters"]), {}, COUNTERS)


def load_state(path: Path, model: torch.nn.Module, average: Average, optimizers: Optimizers) -> None:
    """Read weights and moments that `save_state` wrote into the given objects.

    Raises:
        ValueError: a file that it did not write, or with other weights than the model's.
    """
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    weights = {"model": dict(model.named_parameters()), "average": average}
    with readable_files(path, WHAT, MEND), safe_open(path, framework="pt") as file, torch.no_grad():
        if missing := [f"{kind}.{name}" for kind, own in weights.items() for name in own
                       if f"{kind}.{name}" not in file.keys()]:  # fmt: skip
            raise ValueError(f"it lacks {listed(missing)}")
        for entry in file.keys():
            kind, _, rest = entry.partition(".")
            if kind in weights:
                weights[kind][rest].copy_(file.get_tensor(entry))
                continue
            key, _, name = rest.partition(".")
            parameter = weights["model"][name]
            optimizer = owner[parameter]
            # A step count stays on the CPU, where an optimizer that is not fused keeps it.
            stays = key == "step" and not optimizer.defaults.get("fused")
            value = file.get_tensor(entry)
            optimizer.state[parameter][key] = value if stays else value.to(parameter.device)
