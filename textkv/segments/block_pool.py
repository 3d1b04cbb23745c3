"""The block pool: packed blocks of every (row, KV head) side by side, and what can be done to them as a whole.

Blocks are written once. A pool is tight (each run has exactly its blocks), or has room in which runs grow, or has holes
where tokens have left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from textkv.kernels.pack import Packed, pack, unpack


@dataclass
class BlockPool:
    """Blocks of all runs: run r = row * heads + head owns blocks from start[r] on and fills them in order.

    Attributes:
        k, v: the blocks.
        start: int64 [runs].
        length: int32 [runs], tokens of each run.
        counts: the same, int64 [batch, heads] on the CPU.
        longest: tokens of the longest run; follows `counts`.
        room: blocks that a run may fill; None = exactly those it has.
        positions: int32 [batch, heads or 1, n], a run's token j in column j, -1 = none.
        rope: int32 [3, batch, heads or 1, n], the rotary positions of the same tokens, if their centre turned by
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
    rope: torch.Tensor | None = None
    room: int | None = None
    chunks: tuple[int, int] = (0, 0)
    entries: tuple[int, int] = (0, 0)
    holes: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        # Asked for at every decoded token, while counts change once per `residual` of them.
        if name == "counts":
            super().__setattr__("longest", int(value.max()))

    @property
    def turned_by(self) -> torch.Tensor:
        """The positions by which centres turned."""
        return self.positions if self.rope is None else self.rope


def thinned(pool: BlockPool, stays: torch.Tensor) -> BlockPool:
    """The pool without the blocks of which nothing `stays`, bool [batch, heads, n]; holes in the others."""
    block = pool.k.block
    # A block is freed only as a whole: its tokens share scales, and codes cannot be cut out of a word.
    padded = F.pad(stays, (0, -stays.shape[-1] % block)).unflatten(-1, (-1, block))
    live = padded.any(-1).flatten(0, 1)  # [runs, blocks of the longest run]
    each = live.sum(1).cpu()
    columns = torch.arange(live.shape[1], device=live.device)
    blocks = (pool.start[:, None] + columns)[live]
    counts = (each * block).view(pool.counts.shape)
    # Each run's live blocks close up; their tokens' columns with them.
    order = (~live).sort(dim=1, stable=True).indices[:, : int(each.max())]
    pick = (order[..., None] * block + torch.arange(block, device=live.device)).flatten(1)
    pick = pick.view(*stays.shape[:2], -1)
    gone = ~F.pad(stays, (0, -stays.shape[-1] % block)).gather(-1, pick)
    # Positions that the heads share stay shared where all heads keep the same tokens.
    alike = pool.positions.shape[1] == 1 and bool((stays == stays[:, :1]).all())
    heads = 1 if alike else stays.shape[1]
    gone = gone[:, :heads]
    positions, rope = (
        None if x is None else _columns_of(x, pick[:, :heads], heads) for x in (pool.positions, pool.rope)
    )
    thinned = BlockPool(
        pool.k.take(blocks), pool.v.take(blocks), (each.cumsum(0) - each).to(blocks.device),
        counts.view(-1).to(blocks.device, torch.int32), counts, positions.masked_fill(gone, -1), rope,
        chunks=pool.chunks, entries=pool.entries, holes=True,
    )  # fmt: skip
    plain = all(x.lowrank is None and x.sparse is None for x in (pool.k, pool.v))
    fewer = int((-(-stays.sum(-1) // block)).sum()) * block
    # Packing anew rounds once more: it must at least halve the blocks. Low-rank and sparse corrections are fitted to
    # their block and would be lost.
    return _repacked(thinned) if plain and 2 * fewer <= int(counts.sum()) else thinned


def _columns_of(x: torch.Tensor, pick: torch.Tensor, heads: int) -> torch.Tensor:
    """Per-token numbers [.., batch, heads or 1, n] at the columns `pick` [batch, heads, c], for each head its own."""
    x = x.expand(*x.shape[:-2], heads, -1)
    return x.gather(-1, pick.clamp(max=x.shape[-1] - 1).expand(*x.shape[:-1], -1)).contiguous()


def _repacked(pool: BlockPool) -> BlockPool:
    """A pool with holes closed up into as few blocks as its tokens fill; what the last block lacks is a hole."""
    block = pool.k.block
    real, shared = (pool.positions >= 0).expand(-1, pool.counts.shape[1], -1), pool.positions.shape[1]
    left = real.sum(-1).cpu()
    counts = -(-left // block) * block
    n = int(counts.max())
    order = (~real).sort(dim=-1, stable=True).indices
    order = F.pad(order, (0, max(0, n - order.shape[-1])))[..., :n]
    inside = torch.arange(n, device=real.device) < left.to(real.device)[..., None]
    halves = []
    for packed in (pool.k, pool.v):
        x = padded(pool, unpack(packed))
        x = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
        # A hole takes its neighbour's value: it must not widen the range of a group.
        last = (left.to(x.device) - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, x.shape[-1])
        x = torch.where(inside[..., None], x, x.gather(2, last))
        layout = "channel" if packed.scale.shape[1] == 1 else "token"
        group = None if layout == "channel" else packed.head_dim // packed.scale.shape[2]
        halves.append(pack(blocks_of(x.flatten(0, 1), counts.view(-1), block), packed.bits, layout=layout, group=group))
    each = (counts // block).view(-1)
    positions, rope = (
        None if x is None else _columns_of(x, order[:, :shared], shared) for x in (pool.positions, pool.rope)
    )
    return BlockPool(
        *halves, (each.cumsum(0) - each).to(real.device), counts.view(-1).to(real.device, torch.int32), counts,
        positions.masked_fill(~inside[:, :shared], -1), rope, holes=True,
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


def fits(pool: BlockPool, new: BlockPool) -> bool:
    """Whether the blocks of `new` fit in what is free in `pool`."""
    if pool.room is None or not alike(pool, new):
        return False
    # One run without room is enough: blocks of a run must lie side by side.
    if bool((pool.counts + new.counts > pool.room * pool.k.block).any()):
        return False
    for i, (old, more) in enumerate(((pool.k, new.k), (pool.v, new.v))):
        # Corrections have lists of their own, which may be full before the codes are.
        free = [room - used for room, used in zip(_sizes(old), (pool.chunks[i], pool.entries[i]), strict=True)]
        if any(need > have for need, have in zip(_sizes(more), free, strict=True)):
            return False
    return True


def alike(pool: BlockPool, new: BlockPool) -> bool:
    """Whether blocks of both can lie in one pool."""
    pairs = zip((pool.k, pool.v), (new.k, new.v), strict=True)
    return (
        not pool.holes and not new.holes and pool.positions.shape[1] == new.positions.shape[1]
        and all(_shapes(old) == _shapes(more) for old, more in pairs)
    )  # fmt: skip


def _shapes(packed: Packed) -> list[torch.Size]:
    return [x.shape[1:] for x in packed.tensors().values()]


def is_even(pool: BlockPool) -> bool:
    """Whether runs are of one length, nearly: room of one size for all of them wastes at most a 16th."""
    return 16 * pool.counts.numel() * pool.longest <= 17 * int(pool.counts.sum())


def with_room(like: BlockPool, times: int, before: BlockPool | None = None) -> BlockPool:
    """A pool that takes what `like` holds `times` times over, in every run, behind what `before` holds; else empty."""
    each = like.counts // like.k.block
    runs, room, due = each.numel(), times * int(each.max()), int((each > 0).sum())
    old = {} if before is None else {id(like.k): _sizes(before.k), id(like.v): _sizes(before.v)}
    room += 0 if before is None else before.longest // before.k.block

    def empty(packed: Packed) -> Packed:
        """Blocks like these, of zeros."""
        # How many corrections later blocks will bring is not known: as many as these, for every run that has any.
        rooms = {"p": -(-_sizes(packed)[0] // due), "at": -(-_sizes(packed)[1] // due)}
        chunks, entries = old.get(id(packed), (0, 0))
        rooms = {"p": chunks + runs * times * rooms["p"], "at": entries + runs * times * rooms["at"]}
        rooms["delta"] = rooms["at"]
        held = {}
        for name, x in packed.tensors().items():
            held[name] = x.new_zeros((rooms.get(name.split(".")[-1], runs * room), *x.shape[1:]))
        return Packed.from_tensors(held, packed.bits)

    positions, rope = (
        None if x is None else x.new_full((*x.shape[:-1], room * like.k.block), -1) for x in (like.positions, like.rope)
    )
    pool = BlockPool(
        empty(like.k), empty(like.v), torch.arange(runs, device=like.start.device) * room, like.length * 0,
        like.counts * 0, positions, rope, room,
    )  # fmt: skip
    if before is not None:
        write(pool, rows_of(before, torch.arange(len(before.counts))))
    return pool


def write(pool: BlockPool, new: BlockPool) -> None:
    """Puts the blocks of `new` behind those of each run, into memory that nothing has used."""
    block, before = pool.k.block, pool.counts
    each = (new.counts // block).view(-1)
    where = _in_order(pool.start.cpu() + before.view(-1) // block, each).to(pool.start.device)
    for i, (old, more) in enumerate(((pool.k, new.k), (pool.v, new.v))):
        _write_blocks(old, more, where, pool.chunks[i], pool.entries[i])
    grown = [_sizes(x) for x in (new.k, new.v)]
    pool.chunks = tuple(a + b[0] for a, b in zip(pool.chunks, grown, strict=True))
    pool.entries = tuple(a + b[1] for a, b in zip(pool.entries, grown, strict=True))
    column = (before[:, : new.positions.shape[1], None] + torch.arange(new.positions.shape[2])).to(where.device)
    # what is no token lands in a column that is dropped
    target = column.masked_fill(new.positions < 0, pool.positions.shape[-1])
    pool.positions = _put(pool.positions, target, new.positions)
    if pool.rope is not None:
        pool.rope = _put(pool.rope, target.expand_as(new.rope), new.rope)
    pool.counts = before + new.counts
    pool.length = pool.counts.view(-1).to(pool.length.device, torch.int32)


def _put(room: torch.Tensor, target: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`room` with the numbers `new` in the columns `target` of its last dim, one behind the last meaning nowhere."""
    return F.pad(room, (0, 1)).scatter_(-1, target, new)[..., :-1].contiguous()


def _write_blocks(old: Packed, new: Packed, where: torch.Tensor, chunks: int, entries: int) -> None:
    """Copies blocks to the indices `where`, their directions and entries behind those in use."""
    old.codes[where], old.scale[where], old.zero[where] = new.codes, new.scale, new.zero
    if new.lowrank is not None:
        old.lowrank.a[where] = new.lowrank.a
        # Blocks point into the lists of corrections: these have moved back by what was there before.
        old.lowrank.chunk[where] = new.lowrank.chunk + chunks
        old.lowrank.p[chunks : chunks + len(new.lowrank.p)] = new.lowrank.p
    if new.sparse is not None:
        old.sparse.start[where] = new.sparse.start + entries
        old.sparse.count[where] = new.sparse.count
        end = entries + len(new.sparse.at)
        old.sparse.at[entries:end], old.sparse.delta[entries:end] = new.sparse.at, new.sparse.delta


def rows_of(pool: BlockPool, rows: torch.Tensor) -> BlockPool:
    """A tight pool with the blocks of other rows: int64 on the CPU, a row may come twice."""
    batch, heads = pool.counts.shape
    runs = (rows[:, None] * heads + torch.arange(heads)).view(-1)
    counts = pool.counts[rows]
    each = (counts // pool.k.block).view(-1)
    # A row that comes twice gets its blocks twice, so that the copies can part ways.
    blocks = _in_order(pool.start.cpu()[runs], each).to(pool.start.device)
    positions, rope = (
        None if x is None else x.index_select(-3, rows.to(x.device))[..., : int(counts.max())].contiguous()
        for x in (pool.positions, pool.rope)
    )
    return replace(
        pool, k=pool.k.take(blocks), v=pool.v.take(blocks), start=(each.cumsum(0) - each).to(blocks.device),
        counts=counts, length=counts.view(-1).to(blocks.device, torch.int32), positions=positions, rope=rope,
        room=None,
    )  # fmt: skip


def padded(pool: BlockPool, x: torch.Tensor) -> torch.Tensor:
    """Unpacked blocks [N, T, D] as [batch, heads, n, D]; what a run has not is 0."""
    batch, heads = pool.counts.shape
    flat = x.flatten(0, 1)
    token = torch.arange(pool.longest, device=x.device)
    inside = token < pool.length[:, None]
    where = torch.where(inside, pool.start[:, None] * pool.k.block + token, 0)
    return flat[where].masked_fill(~inside[..., None], 0).view(batch, heads, pool.longest, -1)
