"""The packed segment: tokens as small integers, in blocks that are written once and never touched again.

Blocks lie in block pools (`textkv.segments.block_pool`); in a pool every KV head of every row has a run of blocks, as
many as it needs. The tokens of a prompt fill a tight pool. What decoding packs goes into room for an eighth of what is
there already: behind the blocks that are there, which move to a pool with such room, layer by layer, or into a pool of
its own where heads differ in length or corrections in rank. So a block is moved nine times at most, however long the
answer, and is not read in many small pieces.

Tokens come in whole blocks only: the tokens that do not fill one wait in the dense or ragged segment behind this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from textkv.kernels import merge, packed_attention
from textkv.kernels.beside import Exact
from textkv.kernels.pack import Packed, unpack
from textkv.positions import turned
from textkv.segments.base import Segment, Step, Stored, compact_storage, register_segment, shown
from textkv.segments.block_pool import BlockPool, alike, fits, is_even, padded, rows_of, thinned, with_room, write


@register_segment("packed")
class PackedSegment(Segment):
    """Packed keys and values; see the module's docstring.

    Args:
        dtype: what `stored` gives back and the model computes in.
        centre: fp32 [batch, heads, head_dim] that was subtracted from all keys, or None. Their scores get it back.
        inv_freq: fp32 [batch, heads, R / 2], or None: the centre was turned first, by frequency times position of each
            key (see `turned`). Any are exact; those of the model's RoPE follow a bias that its keys got before it.
        axes: int32 [R / 2], with inv_freq under M-RoPE: keys turn by their rotary positions, each pair of dims by that
            on its axis; None = by their logical ones.
    """

    takes_beside = True

    def __init__(
        self,
        dtype: torch.dtype,
        centre: torch.Tensor | None = None,
        inv_freq: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
    ) -> None:
        self.dtype, self.centre, self.inv_freq, self.axes = dtype, centre, inv_freq, axes
        self.pools: list[BlockPool] = []

    def set_centre(
        self,
        heads: torch.Tensor,
        centre: torch.Tensor | None,
        inv_freq: torch.Tensor | None,
        axes: torch.Tensor | None,
        rope: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Sets the centre of heads that hold no token yet.

        Args:
            heads: bool [batch, heads] on the CPU, which.
            centre, inv_freq, axes: as of the class; for all heads.
            rope: gives rotary positions int32 [3, batch, heads or 1, n] at logical ones, with axes.
        """
        if centre is None:
            return
        which = heads.to(centre.device)[..., None]
        self.centre = torch.where(which, centre, 0 if self.centre is None else self.centre)
        if inv_freq is None and self.inv_freq is None:
            return
        # A frequency of 0 lets a centre stand still.
        old, new = (0 if x is None else x for x in (self.inv_freq, inv_freq))
        self.inv_freq = torch.where(which, new, old)
        if axes is not None and self.axes is None:
            self.axes = axes
            for pool in self.pools:  # of heads whose centres stand still: nobody asked for theirs
                pool.rope = compact_storage(rope(pool.positions).contiguous())

    def centres(self, positions: torch.Tensor) -> torch.Tensor | float:
        """What is subtracted from keys at `positions` [batch, heads or 1, n], with axes rotary ones [3, batch, heads or
        1, n]: fp32 [batch, heads, n or 1, head_dim]."""
        if self.centre is None:
            return 0.0
        centre = self.centre[:, :, None]
        return centre if self.inv_freq is None else turned(centre, positions, self.inv_freq, self.axes)

    def take(
        self,
        k: Packed,
        v: Packed,
        counts: torch.Tensor,
        positions: torch.Tensor,
        rope: torch.Tensor | None = None,
    ) -> None:
        """Takes packed blocks in, later than all that are here.

        Args:
            k, v: the blocks of all runs, run by run, nothing between them.
            counts: int64 [batch, heads] on the CPU, tokens of each run, whole blocks.
            positions: int32 [batch, heads or 1, n], n = the largest count; -1 where a run has no such token.
            rope: int32 [3, batch, heads or 1, n], their rotary positions: with axes.
        """
        # Runs lie side by side without gaps: where one starts is the sum of those before it.
        each = (counts // k.block).view(-1)
        start = (each.cumsum(0) - each).to(k.codes.device)
        tight = BlockPool(
            k, v, start, counts.view(-1).to(start.device, torch.int32), counts.clone(),
            compact_storage(positions.contiguous()), None if rope is None else compact_storage(rope.contiguous()),
        )  # fmt: skip
        if not self.pools:
            self.pools.append(tight)
            return
        last = self.pools[-1]
        if not fits(last, tight):
            # Room for an eighth of what is here, as every growing buffer: pools stay few, and slack small.
            times = int(sum(pool.longest for pool in self.pools)) // 8 // tight.longest
            if alike(last, tight) and is_even(last):
                self.pools[-1] = with_room(tight, max(1, times), last)
            elif times < 2:  # too little is here for slack to pay: the tokens get a tight pool of their own
                self.pools.append(tight)
                return
            else:
                self.pools.append(with_room(tight, times))
        write(self.pools[-1], tight)

    def append(self, step: Step) -> None:
        """Raises RuntimeError: blocks come by `take`."""
        raise RuntimeError("a packed segment takes whole blocks; single tokens go to the segment behind it")

    def is_empty(self) -> bool:
        """Whether there is no block; a centre may be there already."""
        return not self.pools

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [batch, heads, m, head_dim] over all packed tokens, which are read as codes: out like q, and
        lse fp32 [batch, heads, m]."""
        return self._attend(q, scale, softcap, hidden)

    def attend_beside(
        self, q: torch.Tensor, scale: float, softcap: float | None, exact: Exact
    ) -> tuple[torch.Tensor | None, ...]:
        """One softmax over the packed tokens and the exact ones; see `Segment.attend_beside`."""
        return self._attend(q, scale, softcap, None, replace(exact, lse=exact.lse or len(self.pools) > 1))

    def _attend(self, q, scale, softcap, hidden, exact: Exact | None = None) -> tuple[torch.Tensor, ...]:
        centre, inv_freq = (None if x is None else x.flatten(0, 1) for x in (self.centre, self.inv_freq))
        parts = [
            packed_attention(
                q, pool.k, pool.v, scale=scale, start=pool.start, length=pool.length, longest=pool.longest,
                centre=centre, inv_freq=inv_freq, axes=self.axes,
                positions=None if inv_freq is None else pool.turned_by,
                softcap=softcap, valid=shown(pool.positions, hidden) if pool.holes or hidden is not None else None,
                beside=exact if pool is self.pools[-1] else None,
            )
            for pool in self.pools
        ]  # fmt: skip
        out, lse, *seen = parts[-1]
        if len(parts) > 1:
            own = lse
            out, lse = merge([part[0] for part in parts], [part[1] for part in parts])
            seen = [x * (own - lse)[..., -1:].exp() for x in seen]
        return out, lse, *seen

    def keep(self, index: torch.Tensor) -> None:
        """Frees the blocks of which no token stays; what goes from other blocks is a hole, never seen again. A pool
        that is holes for the most part is packed anew, closed up, which rounds its keys once more; one with low-rank
        or sparse corrections is not, because these would be lost.
        """
        heads = self.pools[0].counts.shape[1]
        index = index.expand(-1, heads, -1)
        first, kept = 0, []
        for pool in self.pools:
            inside = (index >= first) & (index < first + pool.longest)
            # What other pools hold lands in one column too many, which is cut off again.
            own = (index - first).masked_fill(~inside, pool.longest)
            stays = torch.zeros(*own.shape[:2], pool.longest + 1, dtype=torch.bool, device=own.device)
            at = pool.positions[..., : pool.longest].expand(-1, heads, -1)
            stays = stays.scatter(-1, own, True)[..., :-1] & (at >= 0)
            first += pool.longest
            if bool(stays.any()):
                kept.append(thinned(pool, stays))
        self.pools = kept

    def stored(self) -> Stored:
        """Everything unpacked, for scoring and for moving elsewhere: as large as if it had never been packed."""
        if not self.pools:
            raise RuntimeError("an empty packed segment does not know the shape of its tokens")
        keys, values = ([padded(pool, unpack(getattr(pool, x))) for pool in self.pools] for x in ("k", "v"))
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)
        # The centre was subtracted before packing; only the attention kernel adds it back by itself.
        keys = keys + self.centres(self._joined([pool.turned_by for pool in self.pools]))
        return Stored(keys.to(self.dtype), values.to(self.dtype), self.held_positions())

    def held_positions(self) -> torch.Tensor:
        """int32 [batch, heads, n], one pool behind the other, each as long as its longest run. Fails without a pool."""
        return self._joined([pool.positions for pool in self.pools])

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What pools have per token, [.., batch, heads or 1, n] each, for all heads and one pool behind the other."""
        heads = self.pools[0].counts.shape[1]
        cut = [x[..., : pool.longest] for x, pool in zip(parts, self.pools, strict=True)]
        return torch.cat([x.expand(*x.shape[:-2], heads, -1) for x in cut], -1)

    def lengths(self) -> torch.Tensor:
        """Tokens of all pools, holes not counted; the device is asked only where a pool has holes. Fails without
        a pool."""
        parts = []
        for pool in self.pools:
            # Holes are known to the device only; without any, the host answers at once.
            real = (pool.positions >= 0).sum(-1).cpu().expand_as(pool.counts) if pool.holes else pool.counts
            parts.append(real)
        return torch.stack(parts).sum(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held: those of all pools by "number.name", and what was subtracted from keys."""
        own = {"centre": self.centre, "inv_freq": self.inv_freq, "axes": self.axes}
        held = {name: x for name, x in own.items() if x is not None}
        for i, pool in enumerate(self.pools):
            own = {f"k.{name}": x for name, x in pool.k.tensors().items()}
            own |= {f"v.{name}": x for name, x in pool.v.tensors().items()}
            own |= {"start": pool.start, "length": pool.length, "positions": pool.positions}
            own |= {} if pool.rope is None else {"rope": pool.rope}
            held |= {f"{i}.{name}": x for name, x in own.items()}
        return held

    def take_rows(self, rows: torch.Tensor) -> None:
        """Every pool becomes a tight one: what decoding packs next goes to a new pool."""
        self.centre, self.inv_freq = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in (self.centre, self.inv_freq)
        )
        self.pools = [rows_of(pool, rows.cpu()) for pool in self.pools]

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Raises ValueError unless `tokens` is 0."""
        if tokens:
            raise ValueError("packed tokens cannot be taken back one by one")

    def state(self) -> dict:
        """Tensors as in `tensors`, "number.counts" of each pool, the name of the dtype, and under "pools" what is
        plain: bits, room, filled rows of corrections, whether there are holes."""
        plain = [
            {"bits": (x.k.bits, x.v.bits), "room": x.room, "chunks": x.chunks, "entries": x.entries, "holes": x.holes}
            for x in self.pools  # fmt: skip
        ]
        counts = {f"{i}.counts": pool.counts for i, pool in enumerate(self.pools)}
        return self.tensors() | counts | {"dtype": str(self.dtype).removeprefix("torch."), "pools": plain}

    @classmethod
    def from_state(cls, state: dict) -> PackedSegment:
        """What had this `state()`."""
        segment = cls(getattr(torch, state["dtype"]), state.get("centre"))  # a subclass may have other parameters
        # Pools are rebuilt as they were, slack included: a saved cache goes on packing into the same room.
        segment.inv_freq, segment.axes = state.get("inv_freq"), state.get("axes")
        for i, plain in enumerate(state["pools"]):
            own = {key.removeprefix(f"{i}."): x for key, x in state.items() if key.startswith(f"{i}.")}
            k, v = (
                Packed.from_tensors({key[2:]: x for key, x in own.items() if key.startswith(f"{which}.")}, bits)
                for which, bits in zip("kv", plain["bits"], strict=True)
            )
            segment.pools.append(
                BlockPool(
                    k, v, own["start"], own["length"], own["counts"].cpu(), own["positions"],
                    own.get("rope"), plain["room"], tuple(plain["chunks"]), tuple(plain["entries"]), plain["holes"],
                )
            )  # fmt: skip
        return segment
