"""Training state on disk without pickle: tensors in one safetensors file with the counters in its JSON header,
replaced atomically; and the export of the averaged weights as a model folder.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    model: torch.nn.Module,
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    counters: dict[str, float],
) -> None:
    """Write weights, averaged weights, AdamW moments and `counters` (JSON values); a crash leaves the old file."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"], tensors[f"average.{name}"] = parameter.detach(), average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.float()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"counters": json.dumps(counters)})
    os.replace(partial, path)


def load_state(
    path: Path, model: torch.nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Read what `save_state` wrote into the given objects and return the counters."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            average[name].copy_(file.get_tensor(f"average.{name}"))
            held = {k: file.get_tensor(f"optimizer.{k}.{name}") for k in MOMENTS if f"optimizer.{k}.{name}" in names}
            if held:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in held.items()}
        return json.loads(file.metadata()["counters"])


def export(
    model: PreTrainedModel, average: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the averaged weights in fp16, the configuration and the tokenizer as an ordinary model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in average.items()}
    partial = folder / "model.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "float16"
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
