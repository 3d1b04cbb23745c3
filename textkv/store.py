"""Saving and loading a cache: one safetensors file of what the segments hold, with all the rest in its header.

No pickle: a cache file from elsewhere can hold wrong numbers but cannot run code. One file, written beside the old one
and renamed, with a checksum over tensors and header: a save is whole, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from textkv.context import Context
from textkv.disk import disk_errors
from textkv.records import checked, listed, parse
from textkv.segments.base import SEGMENTS

FORMAT = 2
FILE = "cache.safetensors"
_FIELDS = {"method": str, "budget": str, "model": dict, "spans": list, "block_end": int, "layers": list}
_LAYER = {"segments": list, "real_seen": list, "dtype": str}
_LAYER |= dict.fromkeys(("seen", "since_eviction", "kv_heads", "head_dim"), int)
_OWN = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


def save(
    context: Context, folder: Path, model: PreTrainedModel | None = None, beside: dict[str, Any] | None = None
) -> None:
    """Writes the file into `folder`, which is made if missing. The model, if it is still there, tells its dtype.

    Args:
        beside: what else belongs to it, under names that `read_header` gives back: tensors, and what JSON can say.

    Raises:
        ValueError: evidence of a prompt block is being gathered, which is not written.
    """
    _check_whole(context)
    folder.mkdir(parents=True, exist_ok=True)
    more = beside or {}
    tensors = {f"beside.{name}": x for name, x in more.items() if isinstance(x, torch.Tensor)}
    header = {
        "format": FORMAT, "method": context.method.expression, "budget": str(context.method.budget),
        "model": _shape_of(context, model), "spans": context.spans, "block_end": context.block_end,
        "grids": [[[*span, *grid] for span, grid in row.items()] for row in context.screens],
        "layers": [_pack_layer(layer, number, tensors) for number, layer in enumerate(context.everything)],
        "beside": {name: x for name, x in more.items() if not isinstance(x, torch.Tensor)},
    }  # fmt: skip
    if context.table is not None and context.table.table is not None:
        tensors["table"] = context.table.table
    for name in ("real", "forgotten"):
        if (told := getattr(context, name)) is not None:
            tensors[name] = told
    # safetensors writes no views: two names may share a storage here, or begin in the middle of one.
    tensors = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    # Renamed when whole: a save that is interrupted leaves the one before it untouched.
    part = folder / f".{FILE}.{os.getpid()}"
    try:
        with disk_errors(folder, "save again"):
            save_file(tensors, part, metadata={"header": text, "checksum": _checksum(text, tensors)})
            os.replace(part, folder / FILE)
    finally:
        part.unlink(missing_ok=True)


def _check_whole(context: Context) -> None:
    """Raises ValueError in the middle of a block: the method would judge its end by what came after loading alone."""
    if all(layer.collector.is_empty for layer in context.layers):
        return
    seen, end = context.seen(), context.block_end
    where = f"{seen} of the {end} tokens of a prompt are read" if seen < end else "drafts wait to be taken or cropped"
    raise ValueError(
        f"{where}, and what they showed {context.method.expression} cannot be saved: save when the prompt is through"
    )


def read_header(folder: Path) -> dict[str, Any]:
    """What a save says of itself; `fill` needs it.

    Raises:
        ValueError: nothing there, damaged, or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved cache: there is no {FILE}")
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            # All of it, to be sure of the checksum before a single layer is filled.
            # Copies: safetensors maps the file, and what another process writes over it would change the cache.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        header = parse(said["header"])
        if checked(header, {"format": int})["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        listed(checked(header, _FIELDS, {"beside": dict})["layers"], dict, "layers")
        if _checksum(said["header"], tensors) != said["checksum"]:
            raise ValueError("its checksum does not fit: it was changed after it was written")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no saved cache: {_line(error)}") from None
    told = {name.removeprefix("beside."): x for name, x in tensors.items() if name.startswith("beside.")}
    return header | {"tensors": tensors, "beside": header.get("beside", {}) | told}


def fill(context: Context, folder: Path, header: dict[str, Any], model: PreTrainedModel) -> None:
    """Puts into an empty cache of the same method what `read_header` found.

    Raises:
        ValueError: saved from a model of another shape or dtype, or by a segment that is not known here.
    """
    mine = _shape_of(context, model)
    # Shapes of tensors would often fit another model of the same size, and give nonsense.
    if header["model"] != mine:
        wrong = next(name for name in mine if header["model"].get(name) != mine[name])
        raise ValueError(
            f"{folder} was saved from another model: {wrong} was {header['model'].get(wrong)}, here it is {mine[wrong]}"
        )
    try:
        _fill(context, header, model)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} is no whole cache of {header['method']}: {_line(error)}") from None


def _fill(context: Context, header: dict[str, Any], model: PreTrainedModel) -> None:
    tensors = {name: x.to(model.device) for name, x in header["tensors"].items()}
    # JSON knows no tuples.
    context.spans = [
        [tuple(listed(span, int, "a span")) for span in listed(row, list, "a row of spans")]
        for row in listed(header["spans"], list, "spans")
    ]
    context.screens = [
        {(start, end): (high, wide) for start, end, high, wide in (listed(x, int, "a grid") for x in row)}
        for row in (listed(row, list, "a row of grids") for row in listed(header.get("grids", []), list, "grids"))
    ]
    context.block_end, context.real = header["block_end"], tensors.get("real")
    context.forgotten = header["tensors"].get("forgotten")
    if context.table is not None:
        context.table.table = tensors.get("table")
    for number, (layer, saved) in enumerate(zip(context.everything, header["layers"], strict=True)):
        _unpack_layer(layer, saved, number, tensors, context)
    own = [layer for layer in context.everything if hasattr(layer, "segments")]
    for before, layer in pairwise(context.layers):  # neighbours in the method's eyes; others share nothing
        for segment in layer.segments:
            segment.rejoin(before.segments)
    for layer in own:
        layer.device = next((x.device for x in layer.tensors().values()), model.device)
        if layer.is_initialized and len(layer.held_positions()) != len(layer.real_seen):
            raise ValueError(f"layer {layer.kind.number} has tokens of {len(layer.held_positions())} rows")
        if layer.is_initialized:
            layer.lengths()  # asks each segment, which may lack what its header should have said


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _pack_layer(layer: Any, number: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What is no tensor, for the header; tensors go into `tensors` under the layer's number."""
    saved: dict[str, Any] = {}
    for name in _OWN:
        for i, x in (getattr(layer, name, None) or {}).items():
            if x is not None:
                tensors[f"{number}.{name}.{i}"] = x
    if hasattr(layer, "conv_states"):
        saved["flags"] = {name: {str(i): x for i, x in getattr(layer, name).items()} for name in _FLAGS}
    if not hasattr(layer, "segments"):
        return saved
    kinds = []
    layer.tidy()  # what is read back is looked at, and would be tidied then
    for i, segment in enumerate(layer.segments):
        # A subclass inherits its parent's name: under it, the parent would be read back.
        if type(segment) is not SEGMENTS.get(segment.name):
            raise ValueError(
                f"layer {number}: {type(segment).__name__} has no name to be saved under; put "
                "@register_segment('name') above its class"
            )
        state = segment.state()
        for name, x in state.items():
            if isinstance(x, torch.Tensor):
                tensors[f"{number}.{i}.{name}"] = x
        kinds.append(
            {"name": segment.name, "plain": {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}}
        )
    for kind, known in (("statistic", layer.statistics), ("trajectory", layer.trajectory)):
        tensors |= {f"{number}.{kind}.{name}": x for name, x in known.items()}
    ready = layer.is_initialized
    return saved | {
        "segments": kinds, "seen": layer.seen, "since_eviction": layer.since_eviction,
        "real_seen": layer.real_seen.tolist() if ready else None, "dtype": str(layer.dtype) if ready else None,
        "kv_heads": layer.kv_heads if ready else None, "head_dim": layer.head_dim if ready else None,
    }  # fmt: skip


def _unpack_layer(layer: Any, saved: dict, number: int, tensors: dict[str, torch.Tensor], context: Context) -> None:
    for name in _OWN:
        for i in getattr(layer, name, None) or {}:
            if f"{number}.{name}.{i}" in tensors:
                x = tensors[f"{number}.{name}.{i}"]
                getattr(layer, name)[i], layer.dtype, layer.device = x, x.dtype, x.device
    for name, values in saved.get("flags", {}).items():
        # JSON makes text of all keys.
        setattr(layer, name, {int(i): x for i, x in values.items()})
    # Saved before its first token: there is nothing to fill in.
    if not hasattr(layer, "segments") or saved["real_seen"] is None:
        return
    counts = [checked(saved, _LAYER)[name] for name in ("seen", "since_eviction")]
    if min(*counts, *listed(saved["real_seen"], int, "real_seen")) < 0 or min(saved["kv_heads"], saved["head_dim"]) < 1:
        raise ValueError(f"layer {number} has counts below 0")
    layer.dtype = getattr(torch, saved["dtype"].removeprefix("torch."))
    if not isinstance(layer.dtype, torch.dtype):
        raise ValueError(f"layer {number} is of {saved['dtype']!r}, which is no dtype")
    layer.seen, layer.since_eviction = counts
    layer.real_seen = torch.tensor(saved["real_seen"], dtype=torch.int64)
    layer.kv_heads, layer.head_dim = saved["kv_heads"], saved["head_dim"]
    layer.segments = [
        SEGMENTS.find(part["name"]).from_state(part["plain"] | _own(tensors, f"{number}.{i}."))
        for i, part in enumerate(saved["segments"])
    ]
    layer.statistics = _own(tensors, f"{number}.statistic.")
    layer.trajectory = _own(tensors, f"{number}.trajectory.")
    layer.is_initialized = True


def _own(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def _shape_of(context: Context, model: PreTrainedModel | None) -> dict[str, Any]:
    """What must be equal for a cache to fit a model."""
    config = context.config
    # The configuration keeps the dtype that the model was made in, whatever `.half()` did to it.
    dtype = getattr(config, "dtype", None) if model is None else model.dtype
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "model_type": config.model_type,
        "kinds": [[kind.name, kind.window] for kind in context.kinds],
        "dtype": str(dtype),
    } | {name: _told(config, name) for name in names}


def _told(config: Any, name: str) -> Any:
    """What a configuration says; where its layers differ (Gemma 4), what each says."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' for an attribute that only layers have
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _checksum(header: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        # Copied into fresh memory: a view of one element keeps a stride that bytes cannot have.
        flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
