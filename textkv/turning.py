"""How RoPE turns keys, for what must follow them: rates, axes, and where on these axes a token lies.

With 1-D RoPE a token's logical position says it all. Under M-RoPE a token has three rotary positions (time, height,
width), which the logical one does not tell: behind an image, text lies off its index; the patches of an image share a
time. The model computes them from the whole prompt, so they are written down as it runs, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


class Places:
    """The rotary positions of every token seen: 12 bytes a token and row, for the whole cache.

    Attributes:
        table: int32 [3, batch, capacity], in column p of a row those of its token with logical position p; columns that
            no token has yet hold anything. None before the first token.
    """

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self._coming: torch.Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_coming": None}

    def see(self, positions: torch.Tensor) -> None:
        """The model is about to read tokens with these position ids, [batch or 1, m] or [3 or 1, batch or 1, m]."""
        self._coming = positions if positions.dim() == 3 else positions[None]

    def write(self, logical: torch.Tensor, columns: int) -> None:
        """Notes where the tokens that came lie; if the model told nothing, at their logical position on each axis.

        Args:
            logical: int32 [batch, m] logical positions, -1 = padding.
            columns: not less than any of them, plus one: known on the host, so that nothing here waits for the device.
        """
        coming, self._coming = self._coming, None
        found = (logical[None] if coming is None else coming.to(logical)).expand(3, *logical.shape)
        self._reserve(len(logical), columns, logical.device)
        # what is no token lands in the last column, which is always free
        target = logical.long().masked_fill(logical < 0, self.table.shape[2] - 1)
        self.table.scatter_(2, target.expand_as(found), found)

    def of(self, logical: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The rotary positions int32 [3, batch, heads, n] of tokens at `logical` [batch, heads, n]; anything at -1.

        Args:
            rows: int64 [batch], which row of the cache each is of; None = its own number.
        """
        device = self.table.device  # the first layer's; another may lie elsewhere
        table = self.table if rows is None else self.table.index_select(1, rows.to(device))
        index = logical.to(device).clamp(min=0).long().flatten(1).expand(3, -1, -1)
        return table.gather(2, index).unflatten(2, logical.shape[1:]).to(logical.device)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.table is not None:
            self.table = self.table.index_select(1, rows.to(self.table.device))

    def kv_bytes(self) -> int:
        """Bytes held."""
        return 0 if self.table is None else self.table.nbytes

    def _reserve(self, batch: int, columns: int, device: torch.device) -> None:
        """Makes room for `columns` and one more; growing by an eighth, decoding moves each entry a few times only."""
        have = 0 if self.table is None else self.table.shape[2]
        if columns < have:
            return
        room = -(-max(columns + 1, have + have // 8) // 64) * 64
        if self.table is None:
            self.table = torch.zeros(3, batch, room, dtype=torch.int32, device=device)
        else:
            self.table = F.pad(self.table, (0, room - have))


@dataclass(frozen=True)
class Turning:
    """How a model's keys turn with their positions, in the halves layout: dims (f, f + R / 2) by rates[f] a position.

    Attributes:
        rates: fp32 [R / 2], radians per position.
        axes: int32 [R / 2], under M-RoPE the axis (0 t, 1 h, 2 w) whose position turns each pair; None = only one.
        places: where tokens lie on the axes; with axes.
    """

    rates: torch.Tensor
    axes: torch.Tensor | None = None
    places: Places | None = None

    def at(self, logical: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The positions that turn the keys at `logical` int32 [batch, heads, n]: these, or [3, batch, heads, n]."""
        return logical if self.axes is None else self.places.of(logical, rows)


def turned(
    x: torch.Tensor, positions: torch.Tensor, rates: torch.Tensor, axes: torch.Tensor | None = None
) -> torch.Tensor:
    """x rotated as RoPE rotates a key at `positions`, in the halves layout; dims from R on stay.

    Angles are fp32 products, as the models and `packed_attention` form them: only the same angles cancel.

    Args:
        x: fp32 [batch, heads, n or 1, head_dim].
        positions: int32 [batch, heads or 1, n], negative = backwards; with axes [3, batch, heads or 1, n].
        rates: fp32 [R / 2] or [batch, heads, R / 2], radians per position.
        axes: int32 [R / 2], see `Turning`.
    """
    half = rates.shape[-1]
    shown = positions[..., None] if axes is None else positions[axes.long()].movedim(0, -1)
    angle = shown.float() * rates[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*parts, rest.expand(*parts[0].shape[:-1], -1)], -1)
