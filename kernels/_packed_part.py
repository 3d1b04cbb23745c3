"""What `packed_attention` reads at once on a CPU: which blocks, their codes as fp32, and what corrects these."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, product

import torch

from ._weights import number
from .pack import FP8, Packed, entries, width

_PLANES = {  # shifts and mask of 2 and 4 planes: what is a plain number becomes a tensor at every call
    n: (torch.arange(0, 8, 8 // n, dtype=torch.uint8).unbind(), torch.tensor((1 << 8 // n) - 1, dtype=torch.uint8))
    for n in (2, 4)
}


class Part:
    """Blocks of neighbouring runs, R of them with s blocks each: shorter runs show one of their blocks again, unseen.

    Attributes:
        runs: their indices.
        columns: which tokens of the runs these are, slack behind the last included.
        seen: bool [R, s * T], which tokens count; None = all.
    """

    def __init__(self, runs, start, lengths, columns, tokens, valid):
        """The tokens `columns` of the runs: they begin with the blocks `start` (a list, as `lengths`) of T `tokens`."""
        first = columns.start // tokens
        longest = min(columns.stop, max(lengths[runs])) - columns.start
        blocks = -(-longest // tokens)
        self.runs, self.columns = runs, slice(columns.start, columns.start + blocks * tokens)
        self.shape, self.seen, self.index = (runs.stop - runs.start, blocks), None, None
        own, of_run = start[runs], lengths[runs]
        self.start, self.distance = own[0] + first, own[1] - own[0] if len(own) > 1 else 0
        alike = all(n == of_run[0] for n in of_run)
        if not alike or self.distance < 0 or any(s != own[0] + r * self.distance for r, s in enumerate(own)):
            # Where a run has ended its first block stands in, or that before it if it has none.
            ends = torch.tensor([[s, max(0, s - (not n)), -(-n // tokens)] for s, n in zip(own, of_run, strict=True)])
            block = torch.arange(first, first + blocks)
            self.index = torch.where(block < ends[:, 2:], ends[:, :1] + block, ends[:, 1:2]).view(-1)
        if valid is None and alike and longest == blocks * tokens:
            return
        column = torch.arange(self.columns.start, self.columns.stop)
        self.seen = column < torch.tensor(of_run)[:, None]
        if valid is not None:
            shown = valid.flatten(0, 1)[runs, self.columns]  # it may end before the last block does
            self.seen[:, : shown.shape[1]] &= shown
            self.seen[:, shown.shape[1] :] = False

    def of(self, x):
        """The blocks of a table [N, ..]: [R, s, ..], a view where the runs lie at equal distances."""
        if self.index is not None:
            return x.index_select(0, self.index).view(*self.shape, *x.shape[1:])
        stride = x.stride()
        return x.as_strided(
            (*self.shape, *x.shape[1:]), (self.distance * stride[0], *stride),
            x.storage_offset() + self.start * stride[0],
        )  # fmt: skip

    def indices(self):
        """int64 [R * s]."""
        if self.index is not None:
            return self.index
        first = self.start + self.distance * torch.arange(self.shape[0])
        return (first[:, None] + torch.arange(self.shape[1])).view(-1)


@dataclass(frozen=True)
class Singles:
    """Corrections of single numbers of a part, in order.

    Attributes:
        at: int32 [E], their place among the part's R * s * T * D numbers.
        delta: fp32 [E].
        before: of each block, and behind the last, how many entries lie before it.
    """

    at: torch.Tensor
    delta: torch.Tensor
    before: list[int]

    def add(self, tile, first, last, base):
        """Adds those of the blocks first <= b < last to `tile`, which begins at number `base` of the part."""
        at, delta = self.at, self.delta
        if last - first < len(self.before) - 1:
            some = slice(self.before[first], self.before[last])
            at, delta = at[some], delta[some]
        tile.view(-1).index_add_(0, at - number(base) if base else at, delta)


def singles(packed: Packed, part: Part, scale: torch.Tensor | None) -> Singles | None:
    """The sparse corrections of a part, in units of the codes: over `scale`, fp32 as the part's table [R, s, 1 or T, D
    or groups] and nowhere 0; None = as they are."""
    if packed.sparse is None:
        return None
    count, D = part.of(packed.sparse.count), packed.head_dim
    counts = count.tolist()
    places, delta = _entries_of(packed, part, counts)
    before = list(accumulate(chain.from_iterable(counts), initial=0))
    owner = torch.repeat_interleave(count.reshape(-1), output_size=before[-1])
    at, delta = torch.add(places.view(torch.uint16).int(), owner, alpha=packed.block * D), delta.float()
    if scale is not None:
        per_channel = scale.shape[2] == 1
        which = torch.add(_rest(at, D), owner, alpha=D) if per_channel else _quotient(at, D // scale.shape[3])
        delta.div_(scale.reshape(-1).index_select(0, which))
    return Singles(at, delta, before)


def _entries_of(packed: Packed, part: Part, counts: list[list[int]]) -> list[torch.Tensor]:
    """Places int16 [E] and deltas fp16 [E] of a part's entries, in order; `counts` of them for each run and block."""
    held, starts = (packed.sparse.at, packed.sparse.delta), part.of(packed.sparse.start).tolist()
    # Lists are compared at once, and hundreds of blocks cost less than a few operators do.
    ends = [list(accumulate(own, initial=first[0])) for own, first in zip(counts, starts, strict=True)]
    if all(end[:-1] == start for end, start in zip(ends, starts, strict=True)):  # as what was packed together lies
        if all(a[-1] == b[0] for a, b in pairwise(ends)):  # and run behind run
            return [x[ends[0][0] : ends[-1][-1]] for x in held]
        return [torch.cat([x[own[0] : own[-1]] for own in ends]) for x in held]
    _, entry = entries(packed.sparse, part.indices())
    return [x.index_select(0, entry) for x in held]


def _quotient(x, by):
    """x // by of int32 from 0 on: a shift takes a tenth of a division."""
    return x >> number(by.bit_length() - 1) if not by & by - 1 else x.div(by, rounding_mode="floor")


def _rest(x, by):
    """x % by of int32 from 0 on."""
    return x & number(by - 1) if not by & by - 1 else x % by


def tiles(packed: Packed, part: Part, numbers: int, extra: Singles | None, scale=None, zero=None):
    """The codes of a part, some blocks at a time: (runs, first block, last, fp32 [R * s, T, D]), in memory that the
    next tile overwrites.

    Args:
        numbers: of a tile, at most, but for the last block.
        extra: what is added to the codes.
        scale: fp32 [R, s, 1 or T, D or groups], multiplies the codes first; None = they stay the whole numbers that
            they are.
        zero: as scale, added to what is scaled; None = nothing is.
    """
    codes, (runs, blocks) = part.of(packed.codes), part.shape
    tokens, D, planes = packed.block, packed.head_dim, 8 // width(packed.bits)
    most = max(1, numbers // (tokens * D))
    step, side = min(blocks, most), max(1, min(runs, most // blocks))  # blocks of a run; runs, where these are all
    floats = torch.empty(side * step, tokens, D, dtype=torch.float32)
    whole = torch.empty(side * step if planes > 1 else 0, planes, tokens // planes, D, dtype=torch.uint8)
    parts = whole.unbind(1)
    for first, low in product(range(0, runs, side), range(0, blocks, step)):
        some, high = slice(first, min(first + side, runs)), min(low + step, blocks)
        count = (some.stop - first) * (high - low)
        room = floats[:count]
        tile = codes[some, low:high].reshape(count, tokens // planes, D)
        if planes == 1:
            room.copy_(tile.view(FP8) if packed.bits == "fp8" else tile)
        else:
            _part_planes(tile, [x[:count] for x in parts] if count < len(whole) else parts)
            room.copy_(whole[:count].view(room.shape))
        if scale is not None:
            by = scale[some, low:high].reshape(count, *scale.shape[2:])
            wide, grouped = room, by.shape[2] not in (1, D)
            plus = None if zero is None else zero[some, low:high].reshape(by.shape)
            if grouped:
                wide, by = room.unflatten(2, (by.shape[2], -1)), by[..., None]
                plus = None if plus is None else plus[..., None]
            if plus is None:
                wide.mul_(by)
            elif by.shape[-1] == 1:
                # One number for a row of channels: two vectorised passes take a third of addcmul's one, which is not.
                wide.mul_(by).add_(plus)
            else:
                torch.addcmul(plus, wide, by, out=wide)
        if extra is not None:
            begin = first * blocks + low
            extra.add(room, begin, begin + count, begin * tokens * D)
        yield some, low, high, room


def _part_planes(tile, parts):
    """Codes of 2 or 4 bits, uint8 [N, rows, D], into whole bytes: a part [N, rows, D] for each plane."""
    shifts, mask = _PLANES[len(parts)]
    for p, (shift, into) in enumerate(zip(shifts, parts, strict=True)):
        shifted = torch.bitwise_right_shift(tile, shift, out=into) if p else tile
        if p < len(parts) - 1:
            torch.bitwise_and(shifted, mask, out=into)
