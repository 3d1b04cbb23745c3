"""Vectors of two layers as one direction each: the storage of a pair of layers (MiniCache, arXiv 2405.14366).

Keys or values of one block of c tokens. Restored are direction * size of the layer, and the exact vectors of the tokens
that keep them. Directions may be packed to few bits: keys per channel over groups of tokens, values per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from textkv.kernels.pack import Bits, Layout, Packed, pack, unpack

Unit = torch.Tensor | Packed


@dataclass
class Directions:
    """One block of keys or of values.

    Attributes:
        unit: [batch, kv_heads, c, head_dim], 0 at holes; or packed: batch * kv_heads * c / group blocks.
        sizes: per layer [batch, kv_heads, c], what to multiply `unit` with: the vector's length over the length of the
            direction as it is stored. fp32 in a model of fp32, else fp16: bfloat16 would scale all scores of a token by
            up to 0.4 % too much or too little.
        slots: int32 [kept], which of the batch * kv_heads * c vectors are kept exactly.
        exact: per layer [kept, head_dim].
    """

    unit: Unit
    sizes: tuple[torch.Tensor, torch.Tensor]
    slots: torch.Tensor
    exact: tuple[torch.Tensor, torch.Tensor]

    def restored(self, side: int) -> torch.Tensor:
        """One layer's vectors [batch, kv_heads, c, head_dim]."""
        x = plain(self.unit, self.sizes[side].shape) * self.sizes[side].float()[..., None]
        # Multiplied in fp32: a size rounded twice would bend all scores of its token.
        x = x.to(self.exact[side].dtype)
        # Vectors that the two layers do not share are written over what the shared direction would give.
        x.view(-1, x.shape[-1])[self.slots.long()] = self.exact[side]
        return x

    def joined(self, other: Directions) -> Directions:
        """This block's vectors and, behind them, another's."""
        regions, (own, more) = self.sizes[0].shape[:2], (x.sizes[0].shape[2] for x in (self, other))
        moved = [
            # A slot counts through all regions, and these have grown longer.
            slots // c * (own + more) + slots % c + first
            for slots, c, first in ((self.slots, own, 0), (other.slots, more, own))
        ]
        return Directions(
            _joined(self.unit, other.unit, regions),
            tuple(torch.cat(x, 2) for x in zip(self.sizes, other.sizes, strict=True)),
            torch.cat(moved),
            tuple(torch.cat(x) for x in zip(self.exact, other.exact, strict=True)),
        )

    def keep(self, index: torch.Tensor) -> None:
        """Keeps the tokens `index` int64 [batch, kv_heads, c] of an unpacked block, -1 = hole."""
        hole, pick = index < 0, index.clamp(min=0)
        owner = self.slots.new_full(self.sizes[0].shape, -1)
        # For each vector the row of `exact` that holds it, -1 = none: this moves like any number per vector.
        owner.view(-1)[self.slots.long()] = torch.arange(len(self.slots), dtype=torch.int32, device=owner.device)
        owner = owner.gather(2, pick).masked_fill(hole, -1).flatten()
        slots = (owner >= 0).nonzero()[:, 0]
        kept = owner[slots].long()
        self.unit = self.unit.gather(2, pick[..., None].expand(*pick.shape, self.unit.shape[-1]))
        self.unit = self.unit.masked_fill(hole[..., None], 0)
        self.sizes = tuple(x.gather(2, pick).masked_fill(hole, 0) for x in self.sizes)
        self.slots, self.exact = slots.int(), (self.exact[0][kept], self.exact[1][kept])

    @property
    def packed(self) -> bool:
        """Whether directions are stored as codes, so that tokens cannot leave one by one."""
        return isinstance(self.unit, Packed)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the batch."""
        shape = self.sizes[0].shape
        owner = self.slots.new_full(shape, -1)
        owner.view(-1)[self.slots.long()] = torch.arange(len(self.slots), dtype=torch.int32, device=owner.device)
        owner = owner[rows].flatten()
        slots = (owner >= 0).nonzero()[:, 0]
        kept = owner[slots].long()
        self.unit = _rows(self.unit, rows, shape[0])
        self.sizes = self.sizes[0][rows], self.sizes[1][rows]
        self.slots, self.exact = slots.int(), (self.exact[0][kept], self.exact[1][kept])

    def tensors(self, side: int) -> dict[str, torch.Tensor]:
        """What one layer answers for: its own sizes and exact vectors, and the first one what both share."""
        own = {f"size{side}": self.sizes[side], f"exact{side}": self.exact[side]}
        if side == 1:
            return own
        packed = isinstance(self.unit, Packed)
        unit = {f"unit.{name}": x for name, x in self.unit.tensors().items()} if packed else {"unit": self.unit}
        return own | unit | {"slots": self.slots}

    @classmethod
    def from_tensors(cls, held: dict[str, torch.Tensor], bits: Bits | Literal[16]) -> Directions:
        """The block whose two sides had these `tensors`."""
        # Packed directions were saved as several tensors, plain ones as one: that tells which they are.
        codes = {name.removeprefix("unit."): x for name, x in held.items() if name.startswith("unit.")}
        unit = Packed.from_tensors(codes, bits) if codes else held["unit"]
        sizes, exact = ((held[f"{name}0"], held[f"{name}1"]) for name in ("size", "exact"))
        return cls(unit, sizes, held["slots"], exact)


def store(direction: torch.Tensor, dtype: torch.dtype, bits: Bits | Literal[16], group: int, layout: Layout) -> Unit:
    """Directions fp32 [batch, kv_heads, c, head_dim] as they are kept: in `dtype` if `bits` is 16, else packed in
    blocks of `group` tokens, which must divide c."""
    # Not packed: any number of tokens, one by one.
    if bits == 16:
        return direction.to(dtype)
    return pack(direction.reshape(-1, group, direction.shape[-1]), bits, layout=layout)


def plain(unit: Unit, shape: torch.Size) -> torch.Tensor:
    """Stored directions in fp32, [*shape, head_dim]."""
    return unpack(unit).view(*shape, -1) if isinstance(unit, Packed) else unit.float()


def _rows(unit: Unit, rows: torch.Tensor, batch: int) -> Unit:
    if not isinstance(unit, Packed):
        return unit[rows]
    return unit.take(torch.arange(unit.blocks, device=rows.device).view(batch, -1)[rows].flatten())


def _joined(first: Unit, second: Unit, regions: torch.Size) -> Unit:
    """Behind the tokens of `first` those of `second`, in each of the [batch, kv_heads] regions."""
    if not isinstance(first, Packed):
        return torch.cat([first, second], 2)
    parts = ([x.unflatten(0, (*regions, -1)) for x in (p.codes, p.scale, p.zero)] for p in (first, second))
    return Packed(*(torch.cat(x, 2).flatten(0, 2) for x in zip(*parts, strict=True)), first.bits)
