"""What is subtracted from keys before they are stored in few bits: none, their mean, or a mean that turns with RoPE.

Scores get it back exactly, whatever it is, so that a centre decides about rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from textkv.layer import Layer
from textkv.positions import RotarySpec, turned
from textkv.segments.base import Stored

Centring = Literal["auto", "turned", "fixed", "none"]
_ENOUGH = 0.75  # a centre that turns costs the reader sines: it must leave this little beside a fixed one


def check_centring(centre: str) -> None:
    """Raise ValueError for a word that is no `Centring`."""
    if centre not in get_args(Centring):
        raise ValueError(f"centre={centre!r} is not known; use 'auto', 'turned', 'fixed' or 'none'")


def followed(layer: Layer, centre: Centring, name: str) -> RotarySpec | None:
    """How a centre of this layer may turn; None = none that turns is asked for, or how is not known.

    Args:
        name: of the method, for the message.

    Raises:
        ValueError: centre="turned" where no table tells how keys turn.
    """
    if centre in ("fixed", "none"):
        return None
    spec = layer.rotary
    if spec is not None and spec.inv_freq.numel() and spec.is_halves:
        return spec
    if centre == "turned":
        why = layer.context.rotary_unknown or "they do not turn in halves"
        raise ValueError(f"{name}(centre='turned') cannot follow the keys of this model: {why}; use centre='fixed'")
    return None


def find_centre(
    centre: Centring,
    held: Stored,
    sample: Stored,
    rotary: RotarySpec | None,
    rows: torch.Tensor | None,
    left: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The centre of each head, from all that it holds.

    Args:
        held: keys [batch, heads, n, head_dim], as all of the following.
        sample: tokens on which "auto" compares the two centres.
        rotary: what `followed` says.
        rows: int64 [batch], which row of the cache a row of `held` is; None = they are the same.
        left: of centred fp32 keys, 0 where there is no token: how coarsely they would be stored, fp32 [batch, heads].

    Returns:
        centre fp32 [batch, heads, head_dim]; inv_freq fp32 [batch, heads, R / 2], 0 in heads whose centre stands still;
        axes int32 [R / 2] under M-RoPE. Each None where there is none.
    """
    if centre == "none":
        return None, None, None
    mean = mean_key(held.keys, held.positions)
    if rotary is None:
        return mean, None, None
    inv_freq = rotary.inv_freq.to(mean.device).repeat(*mean.shape[:2], 1)
    axes = None if rotary.axes is None else rotary.axes.to(mean.device)
    origin = mean_key(turned(held.keys.float(), -rotary.at(held.positions, rows), inv_freq, axes), held.positions)
    if centre == "turned":
        return origin, inv_freq, axes
    moved = sample.keys - turned(origin[:, :, None], rotary.at(sample.positions, rows), inv_freq, axes)
    real = (sample.positions >= 0)[..., None]
    # Head by head: biases differ, and a frequency of 0 makes a turned centre a fixed one.
    better = (left(moved * real) < _ENOUGH * left((sample.keys.float() - mean[:, :, None]) * real))[..., None]
    if not bool(better.any()):
        return mean, None, None
    return torch.where(better, origin, mean), inv_freq * better, axes


def mean_key(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean key of each head: fp32 [batch, heads, head_dim], 0 for a head without tokens."""
    real = (positions >= 0)[..., None]
    return keys.float().masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
