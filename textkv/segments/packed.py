"""The packed segment: tokens as small integers, in blocks that are written once and never touched again.

Every (row, KV head) owns runs of whole blocks, each as many as it has; dense caches are the case of equal runs. Blocks
lie in slabs. What a prompt packs fills a slab of its own exactly; what decoding packs goes into slabs with room for an
eighth of what is there, so that neither old blocks are ever moved nor a long answer is read in many small pieces.

Tokens come in whole blocks only: the tokens that do not fill one wait in the dense or ragged segment behind this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kernels import merge, packed_attention
from kernels.pack import Packed, pack, unpack
from textkv.positions import turned
from textkv.segments.base import Segment, Step, Stored, compact_storage, register_segment, shown


@dataclass
class Slab:
    """Blocks of all runs: run r = row * heads + head owns blocks from start[r] on and fills them in order.

    Attributes:
        k, v: the blocks.
        start: int64 [runs].
        length: int32 [runs], tokens of each run.
        counts: the same, int64 [batch, heads] on the CPU.
        room: blocks that a run may fill; None = exactly those it has.
        positions: int32 [batch, heads or 1, n], a run's token j in column j, -1 = none.
        places: int32 [3, batch, heads or 1, n], the rotary positions of the same tokens, if their centre turned by
            these; None = by the logical ones, or not at all.
        chunks, entries: filled rows of the low-rank directions and sparse entries of k and v.
        holes: whether tokens inside a run are gone (their position is -1) while their block is still here.
    """

    k: Packed
    v: Packed
    start: torch.Tensor
    length: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor | None = None
    room: int | None = None
    chunks: tuple[int, int] = (0, 0)
    entries: tuple[int, int] = (0, 0)
    holes: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return int(self.counts.max())

    @property
    def turned_by(self) -> torch.Tensor:
        """The positions by which centres turned."""
        return self.positions if self.places is None else self.places


@register_segment("packed")
class PackedSegment(Segment):
    """Packed keys and values; see the module's docstring.

    Args:
        dtype: what `stored` gives back and the model computes in.
        centre: fp32 [batch, heads, head_dim] that was subtracted from all keys, or None. Their scores get it back.
        rates: fp32 [batch, heads, R / 2], or None: the centre was turned first, by rate times position of each key (see
            `turned`). Any rates are exact; those of the model's RoPE follow a bias that its keys got before it.
        axes: int32 [R / 2], with rates under M-RoPE: keys turn by their rotary positions, each pair of dims by that on
            its axis; None = by their logical ones.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        centre: torch.Tensor | None = None,
        rates: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
    ) -> None:
        self.dtype, self.centre, self.rates, self.axes = dtype, centre, rates, axes
        self.slabs: list[Slab] = []

    def centres(self, positions: torch.Tensor) -> torch.Tensor | float:
        """What is subtracted from keys at `positions` [batch, heads or 1, n], with axes rotary ones [3, batch, heads or
        1, n]: fp32 [batch, heads, n or 1, head_dim]."""
        if self.centre is None:
            return 0.0
        centre = self.centre[:, :, None]
        return centre if self.rates is None else turned(centre, positions, self.rates, self.axes)

    def take(
        self, k: Packed, v: Packed, counts: torch.Tensor, positions: torch.Tensor, places: torch.Tensor | None = None
    ) -> None:
        """Takes packed blocks in, later than all that are here.

        Args:
            k, v: the blocks of all runs, run by run, nothing between them.
            counts: int64 [batch, heads] on the CPU, tokens of each run, whole blocks.
            positions: int32 [batch, heads or 1, n], n = the largest count; -1 where a run has no such token.
            places: int32 [3, batch, heads or 1, n], their rotary positions: with axes.
        """
        each = (counts // k.block).view(-1)
        start = (each.cumsum(0) - each).to(k.codes.device)
        tight = Slab(
            k, v, start, counts.view(-1).to(start.device, torch.int32), counts.clone(),
            compact_storage(positions.contiguous()), None if places is None else compact_storage(places.contiguous()),
        )  # fmt: skip
        if not self.slabs:
            self.slabs.append(tight)
            return
        if not _fits(self.slabs[-1], tight):
            times = int(sum(slab.longest for slab in self.slabs)) // 8 // tight.longest
            if times < 2:
                self.slabs.append(tight)
                return
            self.slabs.append(_with_room(tight, times))
        _write(self.slabs[-1], tight)

    def append(self, step: Step) -> None:
        raise RuntimeError("a packed segment takes whole blocks; single tokens go to the segment behind it")

    def is_empty(self) -> bool:
        return not self.slabs

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [batch, heads, m, head_dim] over all packed tokens, which are read as codes: out like q, and
        lse fp32 [batch, heads, m]."""
        centre, rates = (None if x is None else x.flatten(0, 1) for x in (self.centre, self.rates))
        parts = [
            packed_attention(
                q, slab.k, slab.v, scale=scale, start=slab.start, length=slab.length, longest=slab.longest,
                centre=centre, rates=rates, positions=None if rates is None else slab.turned_by, axes=self.axes,
                softcap=softcap, valid=shown(slab.positions, hidden) if slab.holes or hidden is not None else None,
            )
            for slab in self.slabs
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else merge([out for out, _ in parts], [lse for _, lse in parts])

    def keep(self, index: torch.Tensor) -> None:
        """Frees the blocks of which no token stays; what goes from other blocks is a hole, never seen again. A slab
        that is holes for the most part is packed anew, closed up, which rounds its keys once more; one with low-rank
        or sparse corrections is not, because these would be lost.
        """
        heads = self.slabs[0].counts.shape[1]
        index = index.expand(-1, heads, -1)
        first, kept = 0, []
        for slab in self.slabs:
            inside = (index >= first) & (index < first + slab.longest)
            own = (index - first).masked_fill(~inside, slab.longest)
            stays = torch.zeros(*own.shape[:2], slab.longest + 1, dtype=torch.bool, device=own.device)
            at = slab.positions[..., : slab.longest].expand(-1, heads, -1)
            stays = stays.scatter(-1, own, True)[..., :-1] & (at >= 0)
            first += slab.longest
            if bool(stays.any()):
                kept.append(_thinned(slab, stays))
        self.slabs = kept

    def stored(self) -> Stored:
        """Everything unpacked, for scoring and for moving elsewhere: as large as if it had never been packed."""
        if not self.slabs:
            raise RuntimeError("an empty packed segment does not know the shape of its tokens")
        keys, values = ([self._padded(slab, unpack(getattr(slab, x))) for slab in self.slabs] for x in ("k", "v"))
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)
        keys = keys + self.centres(self._joined([slab.turned_by for slab in self.slabs]))
        return Stored(keys.to(self.dtype), values.to(self.dtype), self.held_positions())

    def held_positions(self) -> torch.Tensor:
        return self._joined([slab.positions for slab in self.slabs])

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What slabs have per token, [.., batch, heads or 1, n] each, for all heads and one slab behind the other."""
        heads = self.slabs[0].counts.shape[1]
        cut = [x[..., : slab.longest] for x, slab in zip(parts, self.slabs, strict=True)]
        return torch.cat([x.expand(*x.shape[:-2], heads, -1) for x in cut], -1)

    def lengths(self) -> torch.Tensor:
        parts = []
        for slab in self.slabs:
            real = (slab.positions >= 0).sum(-1).cpu().expand_as(slab.counts) if slab.holes else slab.counts
            parts.append(real)
        return torch.stack(parts).sum(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held: those of all slabs by "number.name", and what was subtracted from keys."""
        own = {"centre": self.centre, "rates": self.rates, "axes": self.axes}
        held = {name: x for name, x in own.items() if x is not None}
        for i, slab in enumerate(self.slabs):
            own = {f"k.{name}": x for name, x in slab.k.tensors().items()}
            own |= {f"v.{name}": x for name, x in slab.v.tensors().items()}
            own |= {"start": slab.start, "length": slab.length, "positions": slab.positions}
            own |= {} if slab.places is None else {"places": slab.places}
            held |= {f"{i}.{name}": x for name, x in own.items()}
        return held

    def take_rows(self, rows: torch.Tensor) -> None:
        self.centre, self.rates = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in (self.centre, self.rates)
        )
        self.slabs = [_rows_of(slab, rows.cpu()) for slab in self.slabs]

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        if tokens:
            raise ValueError("packed tokens cannot be taken back one by one")

    def state(self) -> dict:
        plain = [
            {"bits": (x.k.bits, x.v.bits), "room": x.room, "chunks": x.chunks, "entries": x.entries, "holes": x.holes}
            for x in self.slabs  # fmt: skip
        ]
        counts = {f"{i}.counts": slab.counts for i, slab in enumerate(self.slabs)}
        return self.tensors() | counts | {"dtype": str(self.dtype).removeprefix("torch."), "slabs": plain}

    @classmethod
    def from_state(cls, state: dict) -> PackedSegment:
        """What had this `state()`."""
        segment = cls(getattr(torch, state["dtype"]), state.get("centre"))  # a subclass may have other parameters
        segment.rates, segment.axes = state.get("rates"), state.get("axes")
        for i, plain in enumerate(state["slabs"]):
            own = {key.removeprefix(f"{i}."): x for key, x in state.items() if key.startswith(f"{i}.")}
            k, v = (
                Packed.from_tensors({key[2:]: x for key, x in own.items() if key.startswith(f"{which}.")}, bits)
                for which, bits in zip("kv", plain["bits"], strict=True)
            )
            segment.slabs.append(
                Slab(
                    k, v, own["start"], own["length"], own["counts"].cpu(), own["positions"],
                    own.get("places"), plain["room"], tuple(plain["chunks"]), tuple(plain["entries"]), plain["holes"],
                )
            )  # fmt: skip
        return segment

    @staticmethod
    def _padded(slab: Slab, x: torch.Tensor) -> torch.Tensor:
        """Unpacked blocks [N, T, D] as [batch, heads, n, D]; what a run has not is 0."""
        batch, heads = slab.counts.shape
        flat = x.flatten(0, 1)
        token = torch.arange(slab.longest, device=x.device)
        inside = token < slab.length[:, None]
        where = torch.where(inside, slab.start[:, None] * slab.k.block + token, 0)
        return flat[where].masked_fill(~inside[..., None], 0).view(batch, heads, slab.longest, -1)


def _thinned(slab: Slab, stays: torch.Tensor) -> Slab:
    """The slab without the blocks of which nothing `stays`, bool [batch, heads, n]; holes in the others."""
    block = slab.k.block
    padded = F.pad(stays, (0, -stays.shape[-1] % block)).unflatten(-1, (-1, block))
    live = padded.any(-1).flatten(0, 1)  # [runs, blocks of the longest run]
    each = live.sum(1).cpu()
    columns = torch.arange(live.shape[1], device=live.device)
    blocks = (slab.start[:, None] + columns)[live]
    counts = (each * block).view(slab.counts.shape)
    # Each run's live blocks close up; their tokens' columns with them.
    order = (~live).sort(dim=1, stable=True).indices[:, : int(each.max())]
    pick = (order[..., None] * block + torch.arange(block, device=live.device)).flatten(1)
    pick = pick.view(*stays.shape[:2], -1)
    gone = ~F.pad(stays, (0, -stays.shape[-1] % block)).gather(-1, pick)
    # Positions that the heads share stay shared where all heads keep the same tokens.
    alike = slab.positions.shape[1] == 1 and bool((stays == stays[:, :1]).all())
    heads = 1 if alike else stays.shape[1]
    gone = gone[:, :heads]
    positions, places = (
        None if x is None else _columns_of(x, pick[:, :heads], heads) for x in (slab.positions, slab.places)
    )
    thinned = Slab(
        slab.k.take(blocks), slab.v.take(blocks), (each.cumsum(0) - each).to(blocks.device),
        counts.view(-1).to(blocks.device, torch.int32), counts, positions.masked_fill(gone, -1), places,
        chunks=slab.chunks, entries=slab.entries, holes=True,
    )  # fmt: skip
    plain = all(x.lowrank is None and x.sparse is None for x in (slab.k, slab.v))
    fewer = int((-(-stays.sum(-1) // block)).sum()) * block
    return _repacked(thinned) if plain and 2 * fewer <= int(counts.sum()) else thinned


def _columns_of(x: torch.Tensor, pick: torch.Tensor, heads: int) -> torch.Tensor:
    """Per-token numbers [.., batch, heads or 1, n] at the columns `pick` [batch, heads, c], for each head its own."""
    x = x.expand(*x.shape[:-2], heads, -1)
    return x.gather(-1, pick.clamp(max=x.shape[-1] - 1).expand(*x.shape[:-1], -1)).contiguous()


def _repacked(slab: Slab) -> Slab:
    """A slab with holes closed up into as few blocks as its tokens fill; what the last block lacks is a hole."""
    block = slab.k.block
    real, shared = (slab.positions >= 0).expand(-1, slab.counts.shape[1], -1), slab.positions.shape[1]
    left = real.sum(-1).cpu()
    counts = -(-left // block) * block
    n = int(counts.max())
    order = (~real).sort(dim=-1, stable=True).indices
    order = F.pad(order, (0, max(0, n - order.shape[-1])))[..., :n]
    inside = torch.arange(n, device=real.device) < left.to(real.device)[..., None]
    halves = []
    for packed in (slab.k, slab.v):
        x = PackedSegment._padded(slab, unpack(packed))
        x = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
        # A hole takes its neighbour's value: it must not widen the range of a group.
        last = (left.to(x.device) - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, x.shape[-1])
        x = torch.where(inside[..., None], x, x.gather(2, last))
        layout = "channel" if packed.scale.shape[1] == 1 else "token"
        group = None if layout == "channel" else packed.head_dim // packed.scale.shape[2]
        halves.append(pack(blocks_of(x.flatten(0, 1), counts.view(-1), block), packed.bits, layout=layout, group=group))
    each = (counts // block).view(-1)
    positions, places = (
        None if x is None else _columns_of(x, order[:, :shared], shared) for x in (slab.positions, slab.places)
    )
    return Slab(
        *halves, (each.cumsum(0) - each).to(real.device), counts.view(-1).to(real.device, torch.int32), counts,
        positions.masked_fill(~inside[:, :shared], -1), places, holes=True,
    )  # fmt: skip


def blocks_of(x: torch.Tensor, counts: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens [runs, n, D] cut into blocks, run by run: [N, block, D]; of each run its first counts[r] tokens.

    Args:
        counts: int64 [runs] on the CPU, multiples of `block`; n is the largest.
    """
    cut = x.unflatten(1, (-1, block))
    if bool((counts == x.shape[1]).all()):
        return cut.flatten(0, 1)
    return cut[(torch.arange(cut.shape[1]) < (counts // block)[:, None]).to(x.device)]


def _in_order(first: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """first[r], first[r] + 1, .. each[r] of them, run by run: int64 [sum of each]."""
    return (first - (each.cumsum(0) - each)).repeat_interleave(each) + torch.arange(int(each.sum()))


def _sizes(packed: Packed) -> tuple[int, int]:
    """Rows of low-rank directions, sparse entries."""
    return (
        0 if packed.lowrank is None else len(packed.lowrank.p),
        0 if packed.sparse is None else len(packed.sparse.at),
    )


def _fits(slab: Slab, new: Slab) -> bool:
    """Whether the blocks of `new` fit in what is free in `slab`."""
    if slab.room is None or slab.holes or slab.positions.shape[1] != new.positions.shape[1]:
        return False
    if bool((slab.counts + new.counts > slab.room * slab.k.block).any()):
        return False
    for i, (old, more) in enumerate(((slab.k, new.k), (slab.v, new.v))):
        free = [room - used for room, used in zip(_sizes(old), (slab.chunks[i], slab.entries[i]), strict=True)]
        alike = [x.shape[1:] for x in old.tensors().values()] == [x.shape[1:] for x in more.tensors().values()]
        if not alike or any(need > have for need, have in zip(_sizes(more), free, strict=True)):
            return False
    return True


def _with_room(like: Slab, times: int) -> Slab:
    """An empty slab that takes what `like` holds `times` times over, in every run."""
    each = like.counts // like.k.block
    runs, room, due = each.numel(), times * int(each.max()), int((each > 0).sum())

    def empty(packed: Packed) -> Packed:
        rooms = {"p": -(-_sizes(packed)[0] // due), "at": -(-_sizes(packed)[1] // due)}
        rooms["delta"] = rooms["at"]
        held = {}
        for name, x in packed.tensors().items():
            last = name.split(".")[-1]
            held[name] = x.new_zeros((runs * (times * rooms[last] if last in rooms else room), *x.shape[1:]))
        return Packed.from_tensors(held, packed.bits)

    positions, places = (
        None if x is None else x.new_full((*x.shape[:-1], room * like.k.block), -1)
        for x in (like.positions, like.places)
    )
    return Slab(
        empty(like.k), empty(like.v), torch.arange(runs, device=like.start.device) * room, like.length * 0,
        like.counts * 0, positions, places, room,
    )  # fmt: skip


def _write(slab: Slab, new: Slab) -> None:
    """Puts the blocks of `new` behind those of each run, into memory that nothing has used."""
    block, before = slab.k.block, slab.counts
    each = (new.counts // block).view(-1)
    where = _in_order(slab.start.cpu() + before.view(-1) // block, each).to(slab.start.device)
    for i, (old, more) in enumerate(((slab.k, new.k), (slab.v, new.v))):
        _write_blocks(old, more, where, slab.chunks[i], slab.entries[i])
    grown = [_sizes(x) for x in (new.k, new.v)]
    slab.chunks = tuple(a + b[0] for a, b in zip(slab.chunks, grown, strict=True))
    slab.entries = tuple(a + b[1] for a, b in zip(slab.entries, grown, strict=True))
    column = (before[:, : new.positions.shape[1], None] + torch.arange(new.positions.shape[2])).to(where.device)
    # what is no token lands in a column that is dropped
    target = column.masked_fill(new.positions < 0, slab.positions.shape[-1])
    slab.positions = _put(slab.positions, target, new.positions)
    if slab.places is not None:
        slab.places = _put(slab.places, target.expand_as(new.places), new.places)
    slab.counts = before + new.counts
    slab.length = slab.counts.view(-1).to(slab.length.device, torch.int32)


def _put(room: torch.Tensor, target: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`room` with the numbers `new` in the columns `target` of its last dim, one behind the last meaning nowhere."""
    return F.pad(room, (0, 1)).scatter_(-1, target, new)[..., :-1].contiguous()


def _write_blocks(old: Packed, new: Packed, where: torch.Tensor, chunks: int, entries: int) -> None:
    """Copies blocks to the indices `where`, their directions and entries behind those in use."""
    old.codes[where], old.scale[where], old.zero[where] = new.codes, new.scale, new.zero
    if new.lowrank is not None:
        old.lowrank.a[where] = new.lowrank.a
        old.lowrank.chunk[where] = new.lowrank.chunk + chunks
        old.lowrank.p[chunks : chunks + len(new.lowrank.p)] = new.lowrank.p
    if new.sparse is not None:
        old.sparse.start[where] = new.sparse.start + entries
        old.sparse.count[where] = new.sparse.count
        end = entries + len(new.sparse.at)
        old.sparse.at[entries:end], old.sparse.delta[entries:end] = new.sparse.at, new.sparse.delta


def _rows_of(slab: Slab, rows: torch.Tensor) -> Slab:
    """A tight slab with the blocks of other rows: int64 on the CPU, a row may come twice."""
    batch, heads = slab.counts.shape
    runs = (rows[:, None] * heads + torch.arange(heads)).view(-1)
    counts = slab.counts[rows]
    each = (counts // slab.k.block).view(-1)
    blocks = _in_order(slab.start.cpu()[runs], each).to(slab.start.device)
    positions, places = (
        None if x is None else x.index_select(-3, rows.to(x.device))[..., : int(counts.max())].contiguous()
        for x in (slab.positions, slab.places)
    )
    return replace(
        slab, k=slab.k.take(blocks), v=slab.v.take(blocks), start=(each.cumsum(0) - each).to(blocks.device),
        counts=counts, length=counts.view(-1).to(blocks.device, torch.int32), positions=positions, places=places,
        room=None,
    )  # fmt: skip
