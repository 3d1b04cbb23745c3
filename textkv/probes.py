"""The few places where a cache listens to a model: hidden-state norms and rotary positions, only if a method asks.

Each cache registers its own forward pre-hooks and takes them away when it dies; nothing is stored on the model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from kernels.rotate import frequency_axes
from textkv.method import Needs
from textkv.turning import Places, Turning

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


def key_turning(model: PreTrainedModel, places: Places | None = None) -> Turning:
    """How the positions of a token turn its keys; `places` is where a cache of an M-RoPE model notes them.

    Raises:
        ValueError: nothing common tells: frequencies change with the length, or each layer has its own.
    """
    rotary = text_model(model).rotary_emb
    if getattr(rotary, "rope_type", "default") in _MOVING:
        raise ValueError(f"rope type {rotary.rope_type!r} changes its frequencies with the length")
    if not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        raise ValueError(f"{type(rotary).__name__} has no one table of frequencies for all layers")
    rates, axes = rotary.inv_freq.float(), rotary_axes(model)
    if axes is None:
        return Turning(rates)
    if len(axes) != len(rates):
        raise ValueError(f"the sections of M-RoPE name an axis for {len(axes)} frequencies, the model has {len(rates)}")
    return Turning(rates, torch.tensor(axes, dtype=torch.int32, device=rates.device), places)


def rotary_axes(model: PreTrainedModel) -> list[int] | None:
    """The axis (0 t, 1 h, 2 w) that turns each frequency of an M-RoPE model; None = tokens have one position."""
    known = getattr(text_config(model), "rope_parameters", None) or {}
    sections = known.get("mrope_section") or getattr(text_model(model).rotary_emb, "mrope_section", None)
    return None if sections is None else frequency_axes(sections, known.get("mrope_interleaved", False))


class Probes:
    """The pre-hooks of one cache."""

    def __init__(self, model: PreTrainedModel, cache: MethodCache, needs: Needs) -> None:
        decoder = text_model(model)
        target = weakref.ref(cache)
        handles = []
        if needs.rope or cache.places is not None:
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
            if cache.places is not None:
                cache.places.see(positions)
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
