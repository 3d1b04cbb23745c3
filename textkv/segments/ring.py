"""The ring segment: the first `sinks` tokens and the last `recent` ones of each row, in constant memory.

A new token overwrites the slot of the oldest; nothing else moves. With `inv_freq` the gap between sinks and ring is
closed as StreamingLLM asks (arXiv 2309.17453): rotary scores depend on distances only, so recent keys are right as
they are, and for the sinks the QUERY is turned back by the width of the gap (layout (c): no key is ever re-rotated).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import decode_attention, merge, rotate
from textkv.segments.base import NewTokens, Segment, Stored

QUERY_BLOCK = 128
"""Rows per step of the banded prompt attention: bounds its memory to QUERY_BLOCK x (recent + QUERY_BLOCK)."""


class RingSegment(Segment):
    """Sinks and a ring of recent tokens; positions are shared by the heads of a row.

    Args:
        sinks: tokens kept from each row's start, S >= 0.
        recent: int64 [batch], tokens kept from each row's end, R >= 1. A step still sees R + 1 of them: the oldest
            leaves after it, as in the authors' evaluation.
        inv_freq: rotary frequencies to close the gap with; None leaves original positions.
    """

    def __init__(self, sinks: int, recent: torch.Tensor, inv_freq: torch.Tensor | None = None) -> None:
        self.sinks, self.recent, self.inv_freq = sinks, recent, inv_freq
        self.k: torch.Tensor | None = None

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.k is None:
            self._allocate(new.k, new.v)
        if new.q.shape[2] > 1:
            self._write_sinks(new)
            out = self._banded(new)
            self.absorb(new)
            return out
        self.absorb(new, spare=1)
        out = self.attend(new.q, new.scale)
        self._trim()
        return out

    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        ring, first = self.positions >= 0, self.sink_positions >= 0
        recent = decode_attention(q, self.k, self.v, scale=scale, causal=False, valid=ring)
        if not self.sinks:
            return recent
        turned = self._turn(q, self._gap(self.rope.masked_fill(~ring, _FAR).amin(1, keepdim=True)))
        sinks = decode_attention(turned, self.sink_k, self.sink_v, scale=scale, causal=False, valid=first)
        return merge([sinks[0], recent[0]], [sinks[1], recent[1]])

    def absorb(self, new: NewTokens, spare: int = 0) -> None:
        """Stores new tokens without attending: sinks at the start, the last recent + spare others in the ring."""
        if self.k is None:
            self._allocate(new.k, new.v)
        self._write_sinks(new)
        end = torch.maximum(self.end, new.positions.amax(1).long() + 1)
        keep = (new.positions >= self.sinks) & (new.positions >= (end - self._recent() - spare)[:, None])
        self._room(int(end.max()) - self.sinks)
        row, column = keep.nonzero(as_tuple=True)
        slot = (new.positions[row, column].long() - self.sinks) % self.k.shape[2]
        self.k[row, :, slot] = new.k[row, :, column]
        self.v[row, :, slot] = new.v[row, :, column]
        self.positions[row, slot] = new.positions[row, column]
        self.rope[row, slot] = self._rope_of(new)[row, column].to(torch.int32)
        self.end = end
        if not spare:
            self._trim()

    def stored(self) -> Stored:
        heads = self.k.shape[1]
        positions = torch.cat([self.sink_positions, self.positions], 1)
        order = positions.masked_fill(positions < 0, _FAR).sort(dim=1, stable=True).indices
        pick = order[:, None, :, None].expand(-1, heads, -1, self.k.shape[-1])
        return Stored(
            torch.cat([self.sink_k, self.k], 2).gather(2, pick),
            torch.cat([self.sink_v, self.v], 2).gather(2, pick),
            positions.gather(1, order)[:, None].expand(-1, heads, -1),
        )

    def lengths(self) -> torch.Tensor:
        if self.k is None:
            return torch.zeros(len(self.recent), 1, dtype=torch.int64)
        count = (self.positions >= 0).sum(1) + (self.sink_positions >= 0).sum(1)
        return count[:, None].expand(-1, self.k.shape[1]).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.k is None:
            return {}
        table = {} if self.inv_freq is None else {"inv_freq": self.inv_freq}
        return table | {name: getattr(self, name) for name in _TENSORS}

    def take_rows(self, rows: torch.Tensor) -> None:
        self.recent = self.recent[rows.cpu()]
        if self.k is not None:
            for name in _TENSORS:
                setattr(self, name, getattr(self, name).index_select(0, rows.to(self.k.device)))

    def crop(self, tokens: int) -> None:
        if tokens:
            raise ValueError("a ring overwrites its oldest tokens and cannot give them back")

    def _recent(self) -> torch.Tensor:
        return self.recent.to(self.k.device)

    def _allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        batch, heads, _, dim = k.shape
        for name, x, slots in (("k", k, 1), ("v", v, 1), ("sink_k", k, self.sinks), ("sink_v", v, self.sinks)):
            setattr(self, name, x.new_zeros(batch, heads, slots, dim))
        self.positions, self.rope, self.sink_positions = (
            torch.full((batch, slots), -1, dtype=torch.int32, device=k.device) for slots in (1, 1, self.sinks)
        )
        self.end = torch.zeros(batch, dtype=torch.int64, device=k.device)
        self.gap_start = torch.full((batch,), -1, dtype=torch.int32, device=k.device)

    def _room(self, needed: int) -> None:
        """Grows the ring up to its final size; before it wraps, a token's slot does not depend on the size."""
        have, most = self.k.shape[2], int(self.recent.max()) + 1
        if needed <= have or have == most:
            return
        more = min(most, needed + max(8, needed // 8)) - have
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.positions, self.rope = (F.pad(x, (0, more), value=-1) for x in (self.positions, self.rope))

    def _write_sinks(self, new: NewTokens) -> None:
        row, column = ((new.positions >= 0) & (new.positions < self.sinks)).nonzero(as_tuple=True)
        slot = new.positions[row, column].long()
        self.sink_k[row, :, slot] = new.k[row, :, column]
        self.sink_v[row, :, slot] = new.v[row, :, column]
        self.sink_positions[row, slot] = new.positions[row, column]
        # The rotary position right after the sinks: where the ring would start if nothing had left.
        row, column = (new.positions == self.sinks).nonzero(as_tuple=True)
        self.gap_start[row] = self._rope_of(new)[row, column].to(torch.int32)

    def _trim(self) -> None:
        self.positions.masked_fill_(self.positions < (self.end - self._recent())[:, None], -1)

    @staticmethod
    def _rope_of(new: NewTokens) -> torch.Tensor:
        return new.positions if new.rope_positions is None else new.rope_positions

    def _gap(self, first_rope: torch.Tensor) -> torch.Tensor:
        """Rotary width between the sinks and the first recent token that a query sees: [batch, m]."""
        gap = (first_rope - self.gap_start[:, None]).clamp(min=0)
        return gap.masked_fill((first_rope == _FAR) | (self.gap_start < 0)[:, None], 0)

    def _turn(self, q: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        return q if self.inv_freq is None else rotate(q, -gap, self.inv_freq)

    def _banded(self, new: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's queries over sinks, ring and the block itself, each seeing at most `recent` tokens back."""
        k, v = torch.cat([self.k, new.k], 2), torch.cat([self.v, new.v], 2)
        positions = torch.cat([self.positions, new.positions], 1)
        rope = torch.cat([self.rope, self._rope_of(new).to(torch.int32)], 1)
        old, widest = self.k.shape[2], int(self.recent.max())
        outs, lses = [], []
        for start in range(0, new.q.shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, new.q.shape[2])
            first = 0 if start <= widest else old + start - widest
            cols = slice(first, old + stop)
            out, lse = self._rows(
                new, slice(start, stop), k[:, :, cols], v[:, :, cols], positions[:, cols], rope[:, cols]
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _rows(
        self, new: NewTokens, rows: slice, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, at = new.q[:, :, rows], new.positions[:, rows, None].long()
        key, limit = positions[:, None].long(), self._recent()[:, None, None]
        band = (key >= self.sinks) & (key <= at) & (at - key <= limit)
        first = rope[:, None].expand_as(band).masked_fill(~band, _FAR).amin(-1)
        sink_at = self.sink_positions[:, None].long()
        seen = (sink_at >= 0) & (sink_at <= at)
        scores = torch.cat(
            [
                _scores(self._turn(q, self._gap(first)), self.sink_k, seen, new.scale),
                _scores(q, k, band, new.scale),
            ],
            -1,
        )
        lse = scores.logsumexp(-1)
        p = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        values = torch.cat([self.sink_v, v], 2).float()
        out = torch.einsum("bgrmn,bgnd->bgrmd", p, values).flatten(1, 2)
        return out.to(q.dtype), lse.flatten(1, 2)


_TENSORS = ("k", "v", "positions", "rope", "sink_k", "sink_v", "sink_positions", "end", "gap_start")
_FAR = torch.iinfo(torch.int32).max


def _scores(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [batch, kv_heads, group, m, n], -inf where not visible [batch, m, n]."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.float()) * scale
    return scores.masked_fill(~visible[:, None, None], -torch.inf)
