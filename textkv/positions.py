"""Where tokens lie for RoPE, and how it turns them: the position table of a conversation, the rotary spec of a layer.

With 1-D RoPE a token's logical position says it all. Under M-RoPE a token has three rotary positions (time, height,
width), which the logical one does not tell: behind an image, text lies off its index; the patches of an image share a
time. The model computes them from the whole prompt, so they are written down as it runs, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from textkv.kernels import rotate


class PositionTable:
    """The rotary positions of every token seen: 12 bytes a token and row, for the whole cache.

    Attributes:
        table: int32 [3, batch, capacity], in column p of a row those of its token with logical position p; columns that
            no token has yet hold anything. None before the first token.
    """

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None

    def write(self, logical: torch.Tensor, columns: int, rotary: torch.Tensor | None) -> None:
        """Notes where the tokens that came lie.

        Args:
            logical: int32 [batch, m] logical positions, -1 = padding.
            columns: not less than any of them, plus one: known on the host, so that nothing here waits for the device.
            rotary: [3 or 1, batch or 1, m] the model's position ids; None = each token's logical position.
        """
        found = (logical[None] if rotary is None else rotary.to(logical)).expand(3, *logical.shape)
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


@dataclass(frozen=True, eq=False)
class RotarySpec:
    """How RoPE turns the keys of one layer: dims (first[f], second[f]) by inv_freq[f] radians a position.

    Any layout is a choice of these pairs: halves (f, f + R / 2) as in Llama, neighbours (2f, 2f + 1) as in Cohere, some
    of the channels only, or the other direction, which is a pair with its two dims exchanged.

    Attributes:
        inv_freq: fp32 [R / 2], radians per position; empty = the layer does not rotate.
        first, second: int64 [R / 2], the dims of each pair.
        head_dim: channels of a key.
        axes: int32 [R / 2], under M-RoPE the axis (0 t, 1 h, 2 w) whose position turns each pair; None = only one.
        table: where tokens lie on the axes; with axes.
    """

    inv_freq: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    head_dim: int
    axes: torch.Tensor | None = None
    table: PositionTable | None = None

    def __post_init__(self) -> None:
        # Asked at every decoded token: looked up here, once.
        f = torch.arange(self.inv_freq.numel(), device=self.first.device)
        halves = torch.equal(self.first, f) and torch.equal(self.second, f + len(f))
        object.__setattr__(self, "_order", None if halves else self._halves_order())
        object.__setattr__(self, "_radians", self.inv_freq.double())

    @classmethod
    def halves(
        cls,
        inv_freq: torch.Tensor,
        head_dim: int | None = None,
        axes: torch.Tensor | None = None,
        table: PositionTable | None = None,
    ) -> RotarySpec:
        """The layout of Llama and Qwen: dims (f, f + R / 2); dims from R on stay."""
        f = torch.arange(inv_freq.numel(), device=inv_freq.device)
        return cls(inv_freq.float(), f, f + len(f), head_dim or 2 * len(f), axes, table)

    @property
    def is_halves(self) -> bool:
        """Whether the kernels can turn keys as they lie."""
        return self._order is None

    def turn(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Post-RoPE keys or queries [batch, heads, n, head_dim] moved by `delta` [batch, n] positions (any sign)."""
        if not self.inv_freq.numel():
            return x
        inv_freq = self.inv_freq.to(x.device)
        if self.is_halves:
            return rotate(x, delta, inv_freq)
        # Any other layout is brought into halves for the kernel, and back.
        order = self._order.to(x.device)
        return rotate(x[..., order], delta, inv_freq)[..., order.argsort()]

    def turn_query(self, q: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """`turn` for a decoded token's query [batch, heads, 1, head_dim] and delta [batch, 1]: the same angles in
        double, in as few operations as can be, because every layer does it at every token."""
        if q.is_cuda or self._order is not None or not self.inv_freq.numel():
            return self.turn(q, delta)
        # In double: at positions beyond a few thousand, fp32 angles of fast pairs are off by more than keys are
        # rounded.
        angle = delta[:, None, :, None] * self._radians
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        pairs, still = len(self.inv_freq), q.shape[-1] - 2 * len(self.inv_freq)
        first, second, *rest = q.split((pairs, pairs, still) if still else (pairs, pairs), -1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat([*turned, *rest], -1)

    def lengths(self, x: torch.Tensor) -> torch.Tensor:
        """Length of each pair of channels that turns together, which turning leaves as it is: [.., head_dim] -> fp32
        [.., R / 2]."""
        first, second = self.first.to(x.device), self.second.to(x.device)
        if self.is_halves:  # views: no copy of the two halves
            half = len(first)
            return torch.hypot(x[..., :half].float(), x[..., half : 2 * half].float())
        return torch.hypot(x[..., first].float(), x[..., second].float())

    def _halves_order(self) -> torch.Tensor:
        """The dims in the order in which the pairs lie as halves, those that stand still last."""
        moved = torch.cat([self.first, self.second])
        still = torch.ones(self.head_dim, dtype=torch.bool, device=moved.device).index_fill(0, moved, False)
        return torch.cat([moved, still.nonzero()[:, 0]])

    def at(self, logical: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The positions that turn the keys at `logical` int32 [batch, heads, n]: these, or [3, batch, heads, n]."""
        return logical if self.axes is None else self.table.of(logical, rows)

    def on(self, table: PositionTable | None) -> RotarySpec:
        """The same spec over another table."""
        return replace(self, table=table)

    def state(self) -> dict[str, torch.Tensor | int]:
        """What a segment saves of it; a table is the cache's to save."""
        return {"inv_freq": self.inv_freq, "first": self.first, "second": self.second, "head_dim": self.head_dim}

    @classmethod
    def from_state(cls, state: dict) -> RotarySpec:
        """The spec that had this `state()`."""
        return cls(state["inv_freq"], state["first"], state["second"], state["head_dim"])


def turned(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, axes: torch.Tensor | None = None
) -> torch.Tensor:
    """x rotated as RoPE rotates a key at `positions`, in the halves layout; dims from R on stay.

    Angles are fp32 products, as the models and `packed_attention` form them: only the same angles cancel.

    Args:
        x: fp32 [batch, heads, n or 1, head_dim].
        positions: int32 [batch, heads or 1, n], negative = backwards; with axes [3, batch, heads or 1, n].
        inv_freq: fp32 [R / 2] or [batch, heads, R / 2], radians per position.
        axes: int32 [R / 2], see `RotarySpec`.
    """
    half = inv_freq.shape[-1]
    shown = positions[..., None] if axes is None else positions[axes.long()].movedim(0, -1)
    angle = shown.float() * inv_freq[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*parts, rest.expand(*parts[0].shape[:-1], -1)], -1)
