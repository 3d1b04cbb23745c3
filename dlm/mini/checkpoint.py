"""Training state on disk without pickle: tensors in one safetensors file, counters in its JSON header, replaced
atomically; and the export of the averaged weights as the model folder that `load_mini` reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINED = "training.json"
Optimizers = Sequence[torch.optim.Optimizer]


def save_state(
    path: Path, model: torch.nn.Module, average: torch.nn.Module, optimizers: Optimizers, counters: dict[str, Any]
) -> None:
    """Write the weights of `model` and `average`, the optimizers' moments and `counters` (JSON values) to `path`; a
    crash leaves the old file.
    """
    tensors: dict[str, torch.Tensor] = {}
    moments = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    averages = dict(average.named_parameters())
    # By name and not by place: optimizers group the parameters in another order than the model.
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"], tensors[f"average.{name}"] = parameter.detach(), averages[name].detach()
        for key, value in moments.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).float()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"counters": json.dumps(counters)})
    os.replace(partial, path)


def read_counters(path: Path) -> dict[str, Any]:
    """The counters that `save_state` wrote to `path`."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["counters"])


def load_state(path: Path, model: torch.nn.Module, average: torch.nn.Module, optimizers: Optimizers) -> None:
    """Read weights and moments that `save_state` wrote into the given objects."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    weights = {"model": dict(model.named_parameters()), "average": dict(average.named_parameters())}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for entry in file.keys():
            kind, _, rest = entry.partition(".")
            if kind in weights:
                weights[kind][rest].copy_(file.get_tensor(entry))
            else:
                key, _, name = rest.partition(".")
                parameter = weights["model"][name]
                # A step count stays on the CPU, where the optimizer keeps it.
                device = "cpu" if key == "step" else parameter.device
                owner[parameter].state[parameter][key] = file.get_tensor(entry).to(device)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, trained: dict[str, Any]) -> None:
    """Write `model` in fp16 (loading widens it again), its configuration, the tokenizer and `trained` to `folder`,
    each file replaced atomically.
    """
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.named_parameters()}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    (draft / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (draft / TRAINED).write_text(json.dumps(trained, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(draft)
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        # Whatever the writing library and the umask made of it: a package's data must be readable to all.
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    draft.rmdir()
