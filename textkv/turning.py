"""Tokens that stand elsewhere from now on: keys that a cache holds are turned to other rotary positions.

RoPE turns a key by its position, so a key that was read at one place serves at another when it is turned by the
difference. What a token had seen when it was read it keeps.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from textkv import rotary
from textkv.cache import MethodCache
from textkv.layer import Layer
from textkv.method import Method


def check_turns(model: PreTrainedModel, method: Method) -> None:
    """Whether `turn` can serve caches of a model and method.

    Raises:
        ValueError: keys that are not held as they were read, or that the model turns in no known way.
    """
    can = method.capabilities
    if can.lossy or can.merges or can.retrieves or not can.original_positions:
        raise ValueError(
            f"{method.expression} holds keys in a form that cannot be turned to another place; use a method that drops "
            "tokens and keeps the others as they are"
        )
    layers = [layer for layer in MethodCache(model, method).layers if isinstance(layer, Layer)]
    if any(layer.kind.window is not None for layer in layers):
        raise ValueError(f"{type(model).__name__} has windows of attention, whose keys cannot be turned")
    rotary.proven(model, [layer.kind.number for layer in layers])


def turn(cache: MethodCache, model: PreTrainedModel, delta: torch.Tensor) -> None:
    """Lets tokens stand further on, or further back, by as much on every rotary axis.

    Args:
        cache: of this model, with a method that `check_turns` lets pass.
        delta: int32 [batch, n], for logical positions from 0 on.

    Raises:
        ValueError: a segment that cannot turn its keys.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, Layer) and layer.is_initialized]
    specs = rotary.proven(model, [layer.kind.number for layer in layers])
    for layer in layers:
        for segment in layer.segments:
            segment.turn(delta.to(layer.device), specs[layer.kind.number])
    table = cache.context.table
    if table is not None and table.table is not None:
        n = min(delta.shape[1], table.table.shape[2])
        table.table[:, :, :n] += delta[:, :n].to(table.table)
