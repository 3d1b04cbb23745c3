"""Saving and loading a cache: one safetensors file of what the segments hold, one JSON file of the rest.

No pickle: a cache file from elsewhere can hold wrong numbers but cannot run code.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from textkv.segments.balanced import BalancedSegment
from textkv.segments.base import Segment
from textkv.segments.dense import DenseSegment
from textkv.segments.packed import PackedSegment
from textkv.segments.paired import PairedSegment
from textkv.segments.ragged import RaggedSegment
from textkv.segments.renumbered import RenumberedSegment
from textkv.segments.ring import RingSegment
from textkv.segments.split import SplitSegment

if TYPE_CHECKING:
    from textkv.cache import MethodCache

FORMAT = 1
SEGMENTS: dict[str, type[Segment]] = {
    "dense": DenseSegment, "ragged": RaggedSegment, "renumbered": RenumberedSegment, "ring": RingSegment,
    "split": SplitSegment, "packed": PackedSegment, "balanced": BalancedSegment,
    "paired": PairedSegment,
}  # fmt: skip


def save(cache: MethodCache, folder: Path) -> None:
    """Writes cache.safetensors and cache.json into `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, layers = {}, []
    for layer in cache.layers:
        kinds = []
        for i, segment in enumerate(layer.segments):
            kind = next(name for name, cls in SEGMENTS.items() if type(segment) is cls)
            state = segment.state()
            plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
            for name, x in state.items():
                if isinstance(x, torch.Tensor):
                    tensors[f"{layer.index}.{i}.{name}"] = x.contiguous().clone()
            kinds.append({"kind": kind, "plain": plain})
        tensors |= {f"{layer.index}.mark.{name}": x.contiguous().clone() for name, x in layer.marks.items()}
        layers.append(
            {
                "segments": kinds, "seen": layer.seen, "since_eviction": layer.since_eviction,
                "real_seen": None if layer.real_seen is None else layer.real_seen.tolist(),
                "kv_heads": getattr(layer, "kv_heads", None), "head_dim": getattr(layer, "head_dim", None),
            }
        )  # fmt: skip
    if cache.places is not None and cache.places.table is not None:
        tensors["places"] = cache.places.table.contiguous().clone()
    meta = {
        "format": FORMAT, "method": cache.method.expression, "budget": str(cache.method.budget),
        "spans": cache.spans, "block_end": cache.block_end, "layers": layers,
    }  # fmt: skip
    save_file(tensors, folder / "cache.safetensors")
    (folder / "cache.json").write_text(json.dumps(meta))


def load(cls: type[MethodCache], folder: Path, model) -> MethodCache:
    """Reads what `save` wrote.

    Raises:
        ValueError: another format, or a model with another number of layers or heads.
    """
    meta = json.loads((folder / "cache.json").read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"{folder}: cache format {meta['format']}, this version reads {FORMAT}")
    cache = cls(model, meta["method"], meta["budget"])
    if len(cache.layers) != len(meta["layers"]):
        raise ValueError(f"{folder}: saved from {len(meta['layers'])} layers, the model has {len(cache.layers)}")
    tensors = load_file(folder / "cache.safetensors", device=str(model.device))
    cache.spans = [[tuple(span) for span in row] for row in meta["spans"]]
    cache.block_end = meta["block_end"]
    if cache.places is not None:
        cache.places.table = tensors.get("places")
    for layer, saved in zip(cache.layers, meta["layers"], strict=True):
        if saved["real_seen"] is None:
            continue
        layer.seen, layer.since_eviction = saved["seen"], saved["since_eviction"]
        layer.real_seen = torch.tensor(saved["real_seen"])
        layer.kv_heads, layer.head_dim = saved["kv_heads"], saved["head_dim"]
        layer.segments = [
            SEGMENTS[part["kind"]].from_state(
                part["plain"] | _own(tensors, f"{layer.index}.{i}."),
            )
            for i, part in enumerate(saved["segments"])
        ]  # fmt: skip
        layer.marks = _own(tensors, f"{layer.index}.mark.")
        layer.dtype, layer.device, layer.is_initialized = model.dtype, model.device, True
    for before, layer in pairwise(cache.layers):
        for segment in layer.segments:
            segment.rejoin(before.segments)
    return cache


def _own(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
