"""A segment: one store of one layer's tokens that can take tokens in, attend over them, and say what it weighs.

A layer is a short list of segments; the last one grows. Each gives back (output, log-sum-exp), so a layer merges any
number of them exactly. Shapes: queries [batch, heads, m, head_dim]; keys and values [batch, kv_heads, n, head_dim];
positions [batch, kv_heads or 1, n] int32, the token's logical index in its row, -1 where a slot holds no token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one forward in one layer.

    Attributes:
        q: [batch, heads, m, head_dim], post-RoPE.
        k, v: [batch, kv_heads, m, head_dim], keys post-RoPE.
        positions: [batch, m] int32 logical index per row, -1 for padding.
        rope_positions: [batch, m] int64 rotary position (the temporal axis under M-RoPE), or None if not asked for.
        scale: softmax scale.
        padded: whether any position is -1 (known on the host, so that the common case needs no check).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    scale: float
    padded: bool = False
    rope_positions: torch.Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """A padded look at what a segment holds, for scoring: no copy where the segment is dense.

    keys, values [batch, kv_heads, n, head_dim]; positions [batch, kv_heads, n] (-1 = hole).
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


class Segment(ABC):
    """See the module's docstring. `tensors()` is the whole truth about what a segment holds in memory."""

    @abstractmethod
    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes the new tokens in and lets their queries attend causally to everything visible here.

        Returns (out [batch, heads, m, head_dim], lse [batch, heads, m] fp32 or None if not needed).
        """

    @abstractmethod
    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries attend to every token here (all lie before them). Returns (out, lse)."""

    @abstractmethod
    def stored(self) -> Stored:
        """What is held, padded to one length."""

    def held_positions(self) -> torch.Tensor:
        """Logical positions of `stored()` alone: int32 [batch, kv_heads, n], -1 = hole."""
        return self.stored().positions

    @abstractmethod
    def lengths(self) -> torch.Tensor:
        """Tokens stored, int64 [batch, kv_heads], on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name (bytes, saving, moving)."""

    @abstractmethod
    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the batch: new row i is old row rows[i] (beams, expansion, selection)."""

    def state(self) -> dict:
        """Everything that makes the segment: tensors and plain values, for saving."""
        return dict(self.__dict__)

    @classmethod
    def from_state(cls, state: dict) -> Segment:
        """The segment that had this `state()`."""
        segment = cls.__new__(cls)
        segment.__dict__.update(state)
        return segment

    def rejoin(self, before: list[Segment]) -> None:  # noqa: B027 (most segments share nothing)
        """After loading: takes up again what it shares with a segment of the layer before, whose list this is."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens taken in; the layer has checked that they are all still here."""


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes that the tensors' storages hold, each storage once: views and slack count as what they keep alive."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compact_storage(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if it is a view that keeps a larger storage alive (fused projections, padded buffers)."""
    if x.untyped_storage().nbytes() > x.numel() * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x
