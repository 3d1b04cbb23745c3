"""The balanced segment: packed per token, with every key channel brought to the size of its query channel first
(MiKV, arXiv 2402.18096).

A channel whose keys are large takes the whole range of a group that spans channels. Keys are stored as (k - centre) * b
and queries are divided by b, so that scores are exact but for the rounding of the codes. b is a power of two: then both
products are exact as well. b and centre are set before the first token comes and stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from textkv.kernels.beside import Exact
from textkv.segments.base import Stored, register_segment
from textkv.segments.packed import PackedSegment


@register_segment("balanced")
class BalancedSegment(PackedSegment):
    """See the module's docstring. It may be empty, unlike a `PackedSegment`.

    Args:
        dtype: what `stored` gives back and the model computes in.
        centre: fp32 [batch, kv_heads, head_dim], subtracted from all keys AFTER they were multiplied by `balance`.
        balance: fp32 [batch, kv_heads, head_dim], the b of each channel.
    """

    stays = True

    def __init__(
        self, dtype: torch.dtype, centre: torch.Tensor | None = None, balance: torch.Tensor | None = None
    ) -> None:
        super().__init__(dtype, centre)
        self.balance = balance

    @classmethod
    def for_prompt(cls, held: Stored, peaks: torch.Tensor | None) -> BalancedSegment:
        """An empty segment whose centre is the mean of the keys of `held` and whose b is
        sqrt(largest |query| / largest |key - mean|) of each channel, to the nearest power of two.

        Args:
            peaks: fp32 [batch, heads, head_dim], the largest |query| of each channel; None leaves b at 1.
        """
        real = (held.positions >= 0)[..., None]
        keys = held.keys.float().masked_fill(~real, 0)
        mean = keys.sum(2) / real.sum(2).clamp(min=1)
        balance = torch.ones_like(mean)
        # Both clamps keep a channel that is always 0 from an infinite or zero factor.
        if peaks is not None:
            largest = ((keys - mean[:, :, None]) * real).abs().amax(2).clamp(min=1e-6)
            queries = peaks.unflatten(1, (mean.shape[1], -1)).amax(2).clamp(min=1e-6)
            # A power of two only moves the exponent: multiplying keys and dividing queries by it is exact.
            balance = ((queries / largest).log2() / 2).round().exp2()
        return cls(held.keys.dtype, mean * balance, balance)

    def balanced(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [batch, kv_heads, n, head_dim] as they are to be packed, fp32."""
        return keys.float() * self.balance[:, :, None] - self.centre[:, :, None]

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Divides the queries by b first. Without blocks out is 0 and lse -inf, which weighs nothing in a merge."""
        if not self.pools:
            # Nothing is stored: lse = -inf gives this part no weight in the merge.
            return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        return super().attend(self._divided(q), scale, softcap=softcap, hidden=hidden)

    def attend_beside(
        self, q: torch.Tensor, scale: float, softcap: float | None, exact: Exact
    ) -> tuple[torch.Tensor | None, ...]:
        """Only the packed keys are balanced."""
        return super().attend_beside(self._divided(q), scale, softcap, replace(exact, q=q))

    def _divided(self, q: torch.Tensor) -> torch.Tensor:
        grouped = q.unflatten(1, (self.balance.shape[1], -1)) / self.balance[:, :, None, None].to(q.dtype)
        return grouped.flatten(1, 2)

    def stored(self) -> Stored:
        """Keys with the centre added and b divided out; n = 0 without blocks, where a packed segment would fail."""
        if not self.pools:
            none = self.balance.new_zeros((*self.balance.shape[:2], 0, self.balance.shape[2]), dtype=self.dtype)
            return Stored(none, none, self.held_positions())
        held = super().stored()
        return Stored((held.keys.float() / self.balance[:, :, None]).to(self.dtype), held.values, held.positions)

    def held_positions(self) -> torch.Tensor:
        """int32 [batch, kv_heads, n]; n = 0 without blocks."""
        if not self.pools:
            return self.balance.new_zeros((*self.balance.shape[:2], 0), dtype=torch.int32)
        return super().held_positions()

    def keep(self, index: torch.Tensor) -> None:
        """Frees and masks as a packed segment does; does nothing without blocks."""
        if self.pools:
            super().keep(index)

    def lengths(self) -> torch.Tensor:
        """Those of the packed blocks, all 0 without any."""
        return super().lengths() if self.pools else torch.zeros(self.balance.shape[:2], dtype=torch.int64)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of a packed segment and "balance", held before the first token: ask `is_empty` whether there is any."""
        return super().tensors() | {"balance": self.balance}

    def take_rows(self, rows: torch.Tensor) -> None:
        """Takes the rows of `balance` too."""
        super().take_rows(rows)
        self.balance = self.balance.index_select(0, rows.to(self.balance.device))

    @classmethod
    def from_state(cls, state: dict) -> BalancedSegment:
        """The segment with its pools, centre and `balance`."""
        segment = super().from_state(state)
        segment.balance = state["balance"]
        return segment
