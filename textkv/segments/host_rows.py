"""Rows of keys and values in host memory, and the way of some of them to the device.

Where the model runs on a CUDA device the rows are page-locked, and copies run on a stream of their own: what the
device computes meanwhile goes on, and only what reads the rows waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

BLOCK = 4096
"""Tokens of each head that a full scan has on the device at a time; the next ones are on their way."""


class OutOfHostMemory(ValueError):
    """The host has no room for the rows, or may not give it."""


class HostRows:
    """Growing rectangles [batch, kv_heads, capacity, head_dim] of keys and values, with their logical positions.

    Args:
        k, v: [batch, kv_heads, n, head_dim], copied to the host.
        positions: int32 [batch, kv_heads, n], -1 = hole.
        limit: bytes that may be held; None = what there is.

    Raises:
        OutOfHostMemory: they do not fit.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, limit: int | None = None) -> None:
        self.device, self.limit = k.device, limit
        self.used = k.shape[2]
        given = (k, v, positions)
        self._check(given, self.used)
        self.k, self.v, self.positions = (self._room(x, self.used).copy_(x) for x in given)

    def append(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """Puts rows behind those there are. A full rectangle grows by an eighth.

        Raises:
            OutOfHostMemory: they do not fit; nothing has changed.
        """
        end = self.used + k.shape[2]
        if end > self.k.shape[2]:
            room = end + max(8, end // 8)
            old = (self.k, self.v, self.positions)
            self._check(old, room)
            new = [self._room(x, room) for x in old]
            for x, fresh in zip(old, new, strict=True):
                fresh[:, :, : self.used] = x[:, :, : self.used]
            self.k, self.v, self.positions = new
        for mine, x in zip((self.k, self.v, self.positions), (k, v, positions), strict=True):
            mine[:, :, self.used : end] = x
        self.used = end

    def held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of keys, values and positions, all on the host."""
        return tuple(x[:, :, : self.used] for x in (self.k, self.v, self.positions))

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots int64 [batch, kv_heads, c] on the CPU, -1 = hole, in tight new rectangles."""
        pick = index.clamp(min=0)
        k, v, positions = self.held()
        rows = pick[..., None].expand(*pick.shape, k.shape[3])
        self.k, self.v = (self._pinned(x.gather(2, rows)) for x in (k, v))
        self.positions = positions.gather(2, pick).masked_fill(index < 0, -1)
        self.used = index.shape[2]

    def take_rows(self, rows: torch.Tensor) -> None:
        """New row i is old row rows[i]."""
        self.k, self.v, self.positions = (self._pinned(x.index_select(0, rows.cpu())) for x in self.held())

    def fetch(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, x, c, head_dim] on the device, for slots int64 [batch, x, c] on the CPU (-1 = any
        row); x is kv_heads or a multiple: neighbours then share a KV head."""
        batch, heads, room, dim = self.k.shape
        head = torch.arange(slots.shape[1]) // (slots.shape[1] // heads)
        # One row number for the flat rectangles: a plain gather would first repeat them for every query head.
        flat = ((torch.arange(batch)[:, None] * heads + head)[..., None] * room + slots.clamp(min=0)).flatten()
        # Values are gathered on the host while keys are on their way.
        sent = [self._send(self._gathered(x.view(-1, dim), flat)) for x in (self.k, self.v)]
        return tuple(x.view(*slots.shape, dim) for x in self._arrived(sent))

    def blocks(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """All rows on the device, a block of tokens at a time: keys, values, positions. The copy of a block begins
        before the one in front of it is used."""
        coming = None
        for first in range(0, self.used, BLOCK):
            ahead = [self._send(self._staged(x[:, :, first : first + BLOCK])) for x in self.held()]
            if coming is not None:
                yield self._arrived(coming)
            coming = ahead
        if coming is not None:
            yield self._arrived(coming)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Whole rectangles, idle slots included."""
        return {"k": self.k, "v": self.v, "positions": self.positions}

    def __setstate__(self, state: dict) -> None:
        # After a copy or unpickling: neither keeps memory page-locked.
        self.__dict__.update(state)
        self.k, self.v, self.positions = (self._pinned(x) for x in (self.k, self.v, self.positions))

    def _check(self, given: tuple[torch.Tensor, ...], slots: int) -> None:
        """Raises OutOfHostMemory if so many slots of each rectangle may not be held."""
        need = sum(slots * x.shape[0] * x.shape[1] * x[0, 0, :1].numel() * x.element_size() for x in given)
        if self.limit is not None and need > self.limit:
            raise OutOfHostMemory(
                f"host memory: {need:,} bytes for {slots} tokens of a layer, the limit is {self.limit:,}; raise the "
                "limit, or evict before tokens go to the host"
            )

    def _room(self, like: torch.Tensor, slots: int) -> torch.Tensor:
        shape = (*like.shape[:2], slots, *like.shape[3:])
        try:
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=self._locks)
        except RuntimeError as error:  # torch's word for no memory, locked or not
            raise OutOfHostMemory(
                f"host memory: no room for {slots} tokens of a layer ({str(error).splitlines()[0]})"
            ) from None

    @property
    def _locks(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_available()

    def _pinned(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().pin_memory() if self._locks else x.contiguous()

    def _staged(self, x: torch.Tensor) -> torch.Tensor:
        """A page-locked copy where copies are to run beside the device's work: no other memory lets them."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x) if self._locks else x

    def _gathered(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # Page-locked memory is torch's own to reuse, which it does only when the copy out of it is done.
        out = torch.empty((len(rows), x.shape[1]), dtype=x.dtype, pin_memory=self._locks)
        return torch.index_select(x, 0, rows, out=out)

    def _send(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """`x` on its way to the device, and what tells that it is there."""
        if not self._locks:
            return x.to(self.device), None
        stream = _copies(self.device)
        with torch.cuda.stream(stream):
            return x.to(self.device, non_blocking=True), stream.record_event()

    def _arrived(self, sent: list[tuple[torch.Tensor, torch.cuda.Event | None]]) -> tuple[torch.Tensor, ...]:
        """The tensors; what is computed from now on waits until they are whole, the host does not."""
        for x, there in sent:
            if there is not None:
                now = torch.cuda.current_stream(self.device)
                now.wait_event(there)
                # Made on the other stream: its memory must not be given away while this one reads it.
                x.record_stream(now)
        return tuple(x for x, _ in sent)


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which rows come to a device: one for all caches, made when first asked for."""
    return torch.cuda.Stream(device)
