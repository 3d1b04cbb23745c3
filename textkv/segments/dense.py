"""The dense segment: one rectangle [batch, kv_heads, n, head_dim], every head the same number of slots.

Rows of a batch may hold fewer tokens: their missing slots have position -1 and are never seen. The buffer is tight
after an eviction and grows by an eighth when a token no longer fits, so decoding copies rarely.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import compact, decode_attention
from textkv.segments.base import NewTokens, Segment, Stored, compact_storage


class DenseSegment(Segment):
    """K and V in one rectangle each.

    Args:
        head_repeat: how many stored heads one incoming KV head becomes (only the official GUI-KV stores query heads).
    """

    def __init__(self, head_repeat: int = 1) -> None:
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.used = 0
        self.holes = False
        self.head_repeat = head_repeat

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = self.used == 0
        self._append(new)
        if first and not need_lse and new.q.shape[2] > 1:
            return self._prompt_attention(new), None
        return decode_attention(
            new.q, self._k(), self._v(), scale=new.scale, causal=True, valid=self._valid(),
        )  # fmt: skip

    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_attention(q, self._k(), self._v(), scale=scale, causal=False, valid=self._valid())

    def stored(self) -> Stored:
        heads = self.k.shape[1]
        return Stored(self._k(), self._v(), self.positions[..., : self.used].expand(-1, heads, -1))

    def lengths(self) -> torch.Tensor:
        batch, heads = self.k.shape[:2] if self.k is not None else (0, 0)
        if not self.holes:
            return torch.full((batch, heads), self.used)
        return (self.positions[..., : self.used] >= 0).sum(-1).expand(batch, heads).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.k is None else {"k": self.k, "v": self.v, "positions": self.positions}

    def keep(self, index: torch.Tensor) -> None:
        """Keeps the slots `index` [batch, kv_heads or 1, c] int64, ascending, -1 = leave a hole; frees the rest."""
        batch, heads = self.k.shape[:2]
        hole = index < 0
        index = index.masked_fill(hole, self.used - 1)
        rows = compact(self._k(), self._v(), index.expand(batch, heads, -1).contiguous())
        self.k, self.v = rows.k, rows.v
        shared = self.positions[..., : self.used].expand(-1, index.shape[1], -1)
        self.positions = shared.gather(-1, index).masked_fill(hole, -1)
        self.used = index.shape[-1]
        self.holes = bool((self.positions < 0).any())

    def repeat_heads(self, times: int) -> None:
        """Turns each stored KV head into `times` equal heads; later tokens are repeated as they come in."""
        self.k = self._k().repeat_interleave(times, dim=1)
        self.v = self._v().repeat_interleave(times, dim=1)
        if self.positions.shape[1] > 1:
            self.positions = self.positions[..., : self.used].repeat_interleave(times, dim=1)
        self.head_repeat *= times

    def take_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.k.device)
        self.k, self.v, self.positions = (x.index_select(0, rows) for x in (self.k, self.v, self.positions))

    def crop(self, tokens: int) -> None:
        self.used -= tokens

    def _k(self) -> torch.Tensor:
        return self.k[:, :, : self.used]

    def _v(self) -> torch.Tensor:
        return self.v[:, :, : self.used]

    def _valid(self) -> torch.Tensor | None:
        if not self.holes:
            return None
        valid = self.positions[..., : self.used] >= 0
        return valid[:, 0] if valid.shape[1] == 1 else valid

    def _append(self, new: NewTokens) -> None:
        k, v, positions = new.k, new.v, new.positions[:, None]
        if self.head_repeat > 1:
            k, v = (x.repeat_interleave(self.head_repeat, dim=1) for x in (k, v))
        self.holes = self.holes or new.padded
        if self.k is None or self.used == 0:
            self.k, self.v, self.positions = compact_storage(k), compact_storage(v), positions.clone()
            self.used = k.shape[2]
            return
        end = self.used + k.shape[2]
        if end > self.k.shape[2]:
            self._grow(end + max(8, end // 8))
        self.k[:, :, self.used : end] = k
        self.v[:, :, self.used : end] = v
        self.positions[..., self.used : end] = positions
        self.used = end

    def _grow(self, capacity: int) -> None:
        """Moves to larger buffers; the new tail is zeroed because unseen memory may hold NaN."""
        slack = capacity - self.used
        self.k = F.pad(self._k(), (0, 0, 0, slack))
        self.v = F.pad(self._v(), (0, 0, 0, slack))
        self.positions = F.pad(self.positions[..., : self.used], (0, slack), value=-1)

    def _prompt_attention(self, new: NewTokens) -> torch.Tensor:
        """Exact causal attention of a whole prompt: torch's own fused kernel, no matrix of our own."""
        k, v = self._k(), self._v()
        mask = None
        if new.padded:
            m = new.q.shape[2]
            causal = torch.ones(m, m, dtype=torch.bool, device=k.device).tril()
            # A padding query sees itself, so that its row is not empty: an empty row would be NaN.
            own = torch.eye(m, dtype=torch.bool, device=k.device)
            mask = (causal & (new.positions >= 0)[:, None, None, :]) | own
        return F.scaled_dot_product_attention(
            new.q, k, v, attn_mask=mask, is_causal=mask is None, scale=new.scale,
            enable_gqa=k.shape[1] != new.q.shape[1],
        )  # fmt: skip
