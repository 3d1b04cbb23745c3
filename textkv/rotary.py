"""How a model turns its keys, found out by asking it: the same tokens are read at two sets of positions, and of each
layer's keys that spec is taken which leads from the ones to the others.

A spec is a choice among the tables of frequencies that lie on the model, the layouts of its families (halves,
neighbouring pairs), a part of the channels at either end, and both directions. Where none fits, the layer is refused by
name: moving keys by a guess would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from textkv.attention import CAPTURE, use
from textkv.kernels.rotate import frequency_axes
from textkv.kinds import text_config, text_model
from textkv.positions import PositionTable, RotarySpec

_MOVING = ("dynamic", "longrope")
"""Rope types whose frequencies change with the length."""
_MEND = (
    "use a setting that turns no keys (positions='original', merge_keys='post', ranking='last_queries'), or a method "
    "that turns none"
)
_FROM, _TO = 3, 8
_TOKENS = 4
_PROVEN: WeakKeyDictionary[torch.nn.Module, dict[torch.dtype, dict[int, RotarySpec]]] = WeakKeyDictionary()


def proven(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, RotarySpec]:
    """The specs of these layers, by their numbers; a layer that does not rotate has one without frequencies.

    Reads four tokens twice, once in the life of a model.

    Raises:
        ValueError: frequencies that change with the length, or a layer whose keys no known layout explains.
    """
    decoder = text_model(model)
    _refuse_moving(decoder)
    # `.half()` rounds a model's tables too: then they are looked at again.
    dtype = next(decoder.parameters()).dtype
    known = _PROVEN.setdefault(decoder, {}).setdefault(dtype, {})
    if any(number not in known for number in layers):
        with _on_ours(model):
            before, after = (_keys(decoder, start) for start in (_FROM, _TO))
        for number in layers:
            if number not in before:
                raise ValueError(
                    f"{type(model).__name__}: the keys of layer {number} cannot be looked at, because the model passes "
                    f"no named arguments down to its attention; {_MEND}"
                )
            (key, query), (moved_key, moved_query) = before[number], after[number]
            known[number] = _fitting(decoder, number, key.float(), moved_key.float())
            _check_queries(decoder, number, query.float(), moved_query.float())
    return {number: known[number] for number in layers}


@contextmanager
def _on_ours(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model on our attention, which tells the keys, while it lasts."""
    decoder = text_model(model)
    own = decoder.config._attn_implementation
    use(model)
    try:
        yield
    finally:
        if decoder.config._attn_implementation != own:
            decoder.set_attn_implementation(own)


def told(model: PreTrainedModel, layers: Sequence[int], table: PositionTable | None) -> dict[int, RotarySpec]:
    """What the model's tables say, without a proof: for those who may be wrong about it at the price of precision only.

    Raises:
        ValueError: nothing common tells.
    """
    decoder = text_model(model)
    tables = _tables(decoder)
    _refuse_moving(decoder, mend="")
    axes = axes_of(model)
    kinds = getattr(text_config(model), "layer_types", None)
    specs = {}
    for number in layers:
        name = next((n for n in tables if kinds and n == f"{kinds[number]}_inv_freq"), "inv_freq")
        if name not in tables:
            continue
        spec = RotarySpec.halves(tables[name])
        if axes is not None and len(axes) == len(spec.inv_freq):
            spec = replace(spec, axes=torch.tensor(axes, dtype=torch.int32, device=spec.inv_freq.device), table=table)
        elif axes is not None:
            raise ValueError(
                f"the sections of M-RoPE name an axis for {len(axes)} frequencies, the model has {len(spec.inv_freq)}"
            )
        specs[number] = spec
    if not specs:
        raise ValueError(f"{type(decoder).__name__} has no one table of frequencies for all layers")
    return specs


def joined(known: RotarySpec | None, spec: RotarySpec) -> RotarySpec:
    """A proven spec with the axes and the table of one that the model's tables told; the latter where there is none."""
    if known is None:
        return spec
    same = known.is_halves and len(known.inv_freq) == len(spec.inv_freq)
    return replace(known, axes=spec.axes, table=spec.table) if same else known


def axes_of(model: PreTrainedModel) -> list[int] | None:
    """The axis (0 t, 1 h, 2 w) that turns each frequency of an M-RoPE model; None = tokens have one position."""
    known = getattr(text_config(model), "rope_parameters", None) or {}
    rotary = getattr(text_model(model), "rotary_emb", None)
    sections = known.get("mrope_section") or getattr(rotary, "mrope_section", None)
    return None if sections is None else frequency_axes(sections, known.get("mrope_interleaved", False))


def _refuse_moving(
    decoder: torch.nn.Module, mend: str = f": keys cannot be turned to other positions; {_MEND}"
) -> None:
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in _MOVING:
                raise ValueError(f"rope type {kind!r} changes its frequencies with the length{mend}")


def _tables(decoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tables of inverse frequencies that lie on the decoder, by their names; each once."""
    found: dict[str, torch.Tensor] = {}
    for name, buffer in decoder.named_buffers():
        last = name.rsplit(".", 1)[-1]
        if last.endswith("inv_freq") and "original" not in last and buffer.dim() == 1:
            found.setdefault(last, buffer)
    return found


def _keys(decoder: torch.nn.Module, start: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and queries [1, heads, tokens, head_dim] of each layer for a few tokens at positions from `start` on."""
    config = text_config(decoder)
    device = next(decoder.parameters()).device
    ids = (torch.arange(_TOKENS, device=device)[None] * 7 + 11) % config.vocab_size
    at = torch.arange(start, start + _TOKENS, device=device)[None]
    if axes_of(decoder) is not None:
        # Equal on all axes, as text is: the layout of pairs shows, and the axes are read from the configuration.
        at = at.expand(3, 1, -1)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    # Dropout would change keys between the two readings.
    training = decoder.training
    decoder.eval()
    try:
        # Under autocast the tables are as they were, but keys would be too coarse to tell layouts apart.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            decoder(input_ids=ids, position_ids=at, use_cache=False, **{CAPTURE: seen.__setitem__})
    finally:
        decoder.train(training)
    return seen


def _check_queries(decoder: torch.nn.Module, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raises ValueError where queries grow with their position: then a moved key is not all that a move changes."""
    # In half precision two roundings lie between the readings.
    bound = 1e-5 if before.dtype == torch.float32 and next(decoder.parameters()).dtype == torch.float32 else 2e-2
    if float((before.norm(dim=-1) / after.norm(dim=-1) - 1).abs().max()) > bound:
        raise ValueError(
            f"{type(decoder).__name__}: layer {number} scales its queries by their position, so that closing gaps "
            f"between keys would change its answers; {_MEND}"
        )


def _fitting(decoder: torch.nn.Module, number: int, before: torch.Tensor, after: torch.Tensor) -> RotarySpec:
    """The spec that turns the keys `before` into those `after`."""
    size, dim = after.norm(), after.shape[-1]
    exact = next(decoder.parameters()).dtype == torch.float32
    delta = torch.full((1, _TOKENS), _TO - _FROM, device=after.device)
    # A wrong layout misses by tens of percent: the bound need not be tight, only far from both.
    best, gap = None, (2e-3 if exact else 5e-2)
    for spec in _candidates(decoder, dim, after.device):
        found = float((spec.turn(before, delta) - after).norm() / size)
        if found < gap:
            best, gap = spec, found
    if best is None:
        raise ValueError(
            f"{type(decoder).__name__}: no known rotary layout explains how layer {number} turns its keys; {_MEND}"
        )
    return best


def _candidates(decoder: torch.nn.Module, dim: int, device: torch.device) -> Iterator[RotarySpec]:
    # First of all: a layer that does not rotate at all (every fourth of smollm3).
    none = torch.zeros(0, device=device)
    yield RotarySpec(none, none.long(), none.long(), dim)
    for table in _tables(decoder).values():
        half = len(table)
        # A table of another kind of layer, with wider heads.
        if 2 * half > dim:
            continue
        f, inv_freq = torch.arange(half, device=device), table.detach().float().to(device)
        # Models that turn a part of the channels turn either the first or the last ones.
        for offset in sorted({0, dim - 2 * half}):
            for first, second in ((f, f + half), (2 * f, 2 * f + 1)):
                first, second = first + offset, second + offset
                yield RotarySpec(inv_freq, first, second, dim)
                yield RotarySpec(inv_freq, second, first, dim)
