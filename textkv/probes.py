"""The few places where a cache listens to a model: hidden-state norms and rotary positions, only if a method asks.

Each cache registers its own forward pre-hooks and takes them away when it dies; nothing is stored on the model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from textkv.method import Needs

if TYPE_CHECKING:
    from textkv.cache import MethodCache


_MOVING = ("dynamic", "longrope")
"""Rope types whose frequencies change with the length."""


def text_model(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder with `.layers`: of a text model, or the text half of a vision-language model.

    Raises:
        ValueError: no such decoder was found.
    """
    for path in ("model.language_model", "language_model.model", "language_model", "model", ""):
        node: torch.nn.Module | None = model
        for name in filter(None, path.split(".")):
            node = getattr(node, name, None)
        if node is not None and hasattr(node, "layers") and hasattr(node, "rotary_emb"):
            return node
    raise ValueError(f"{type(model).__name__} is not a decoder of rotary attention layers: unsupported by this cache")


def text_config(model: PreTrainedModel):
    """The configuration of the text decoder.

    Raises:
        ValueError: the model has layers that are not plain attention.
    """
    config = text_model(model).config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layers of kind {sorted(kinds - {'full_attention'})} have no KV cache that a method could keep"
        )
    return config


def text_rotary(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder's rotary module.

    Raises:
        ValueError: its frequencies change with the length, so stored keys cannot be moved.
    """
    rotary = text_model(model).rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind in _MOVING:
        raise ValueError(
            f"rope type {kind!r} changes its frequencies with the length: keys cannot be moved to other positions; "
            "use positions='original'"
        )
    return rotary


def key_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """The frequencies fp32 [R / 2] with which a token's position alone turns its keys.

    Raises:
        ValueError: there are none: they change with the length, each layer has its own, or a position has several axes.
    """
    rotary = text_model(model).rotary_emb
    if getattr(rotary, "rope_type", "default") in _MOVING:
        raise ValueError(f"rope type {rotary.rope_type!r} changes its frequencies with the length")
    if "mrope_section" in (getattr(text_config(model), "rope_parameters", None) or {}):
        raise ValueError("keys of M-RoPE turn with three axes of an image, of which a token's index knows none")
    if not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        raise ValueError(f"{type(rotary).__name__} has no one table of frequencies for all layers")
    return rotary.inv_freq.float()


class Probes:
    """The pre-hooks of one cache."""

    def __init__(self, model: PreTrainedModel, cache: MethodCache, needs: Needs) -> None:
        decoder = text_model(model)
        target = weakref.ref(cache)
        handles = []
        if needs.rope:
            handles.append(decoder.rotary_emb.register_forward_pre_hook(_see_positions(target), with_kwargs=True))
        if needs.hidden:
            for index, block in enumerate(decoder.layers):
                module = block.self_attn if needs.hidden == "attn_input" else block
                handles.append(module.register_forward_pre_hook(_see_hidden(target, index), with_kwargs=True))
        self._finalizer = weakref.finalize(cache, _remove, handles)


def _see_positions(target: weakref.ref):
    def hook(module, args, kwargs) -> None:
        cache = target()
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if cache is not None and positions is not None:
            # M-RoPE gives [3, batch, m]; the temporal axis comes first and is the smallest of the three.
            cache.rope_positions = positions[0] if positions.dim() == 3 else positions

    return hook


def _see_hidden(target: weakref.ref, index: int):
    def hook(module, args, kwargs) -> None:
        cache = target()
        if cache is None or kwargs.get("past_key_values") is not cache:
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        cache.layers[index].gatherer.pending_norms = hidden.detach().float().norm(dim=-1)

    return hook


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()
