"""`packed_attention` on a CPU: the reference's arithmetic in as few passes over the codes as torch's operators allow.

Codes become fp32 as they are, whole numbers, in tiles that stay in a core's cache. Scales go where there is least to
multiply: those of key channels to the queries, once per block; those of value tokens to the weights; zeros add one
product per block or token. The scores of all tokens of a run are held at once, so there is one softmax and no running
one. Runs of equal length at equal distances, as dense caches have them, go together while they are short.
"""

from __future__ import annotations

import torch

from kernels._packed_reference import key_corrections, value_corrections
from kernels._turning import turned_scores
from kernels.pack import FP8, width

_TILE = 1 << 18  # numbers unpacked at a time: 1 MB
_SCORES = 1 << 22  # scores, and scaled queries, held at a time


def packed_cpu(q, k, v, *, scale, start, length, longest, turn=None, softcap=None, shift=None, valid=None):
    """Arguments as the reference's."""
    B, H, m, D = q.shape
    runs = start.numel()
    rows = q.reshape(runs, B * H // runs * m, D).float() * scale
    x = rows.shape[1]
    shift = None if shift is None else shift.reshape(runs, x, 1) * scale
    out, lse = torch.zeros_like(rows), rows.new_full((runs, x), -torch.inf)
    starts, lengths = start.tolist(), length.tolist()
    for some, distance in _together(starts, lengths, D):
        n = lengths[some.start]
        if not n:
            continue
        blocks = -(-n // k.block)
        part = _Part(some, starts[some.start], distance, blocks, n, k.block, None if valid is None else valid, B)
        step = max(16, _SCORES // ((some.stop - some.start) * blocks * max(D, k.block)))
        for low in range(0, x, step):
            queries = slice(low, low + step)
            out[some, queries], lse[some, queries] = _attend(
                rows[some, queries], k, v, part, turn, softcap, None if shift is None else shift[some, queries]
            )
    return out.to(q.dtype).view(B, H, m, D), lse.view(B, H, m)


def _together(starts, lengths, D):
    """Which runs go together, and how many blocks lie between their starts."""
    runs, most = len(starts), max(1, _TILE // max(1, lengths[0] * D))
    distance = starts[1] - starts[0] if runs > 1 else 0
    even = most > 1 and distance > 0 and all(n == lengths[0] for n in lengths)
    if not even or any(s != starts[0] + r * distance for r, s in enumerate(starts)):
        return [(slice(r, r + 1), 0) for r in range(runs)]
    return [(slice(r, min(r + most, runs)), distance) for r in range(0, runs, most)]


class _Part:
    """Blocks of runs that go together, R of them with s blocks each.

    Attributes:
        runs: their indices.
        seen: bool [R, s * T], which tokens count; None = all.
    """

    def __init__(self, runs, start, distance, blocks, n, tokens, valid, batch):
        self.runs, self.start, self.distance, self.blocks = runs, start, distance, blocks
        self.shape, self.seen = (runs.stop - runs.start, blocks), None
        if valid is None and n == blocks * tokens:
            return
        self.seen = torch.zeros(self.shape[0], blocks * tokens, dtype=torch.bool)
        self.seen[:, :n] = True if valid is None else valid.flatten(0, 1)[runs, :n]

    def of(self, x):
        """The blocks of a table [N, ..] as a view [R, s, ..]."""
        stride = x.stride()
        return x.as_strided(
            (*self.shape, *x.shape[1:]), (self.distance * stride[0], *stride),
            x.storage_offset() + self.start * stride[0],
        )  # fmt: skip

    def indices(self):
        """int64 [R, s]."""
        first = self.start + self.distance * torch.arange(self.shape[0])
        return first[:, None] + torch.arange(self.blocks)


def _attend(q, k, v, part, turn, softcap, shift):
    """q fp32 [R, x, D], scaled -> out fp32 [R, x, D], lse [R, x]."""
    scores = (_by_channel if k.scale.shape[1] == 1 else _by_token)(q, k, part)
    blocks = None
    if k.lowrank is not None or k.sparse is not None or v.lowrank is not None or v.sparse is not None:
        blocks = part.indices()
        key_corrections(scores, q, k, blocks)
    if turn is not None:
        scores += turned_scores(q, *_turn_of(turn, part), slice(0, scores.shape[2]))
    if shift is not None:
        scores += shift
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if part.seen is not None:
        scores.masked_fill_(~part.seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    # a query that sees nothing has lse -inf: less 0, its weights are 0 rather than NaN
    weights = scores.sub_(lse if part.seen is None else lse.masked_fill(lse == -torch.inf, 0)).exp_()
    out = _values(weights, v, part)
    if blocks is not None:
        value_corrections(out, weights, v, blocks, part.seen)
    return out, lse[..., 0]


def _turn_of(turn, part):
    """What belongs to the runs of a part: `turn` as if there were no others."""
    centre, rates, positions, axes = turn
    runs = len(centre)
    shown = positions.expand(-1, -1, runs // positions.shape[1], -1).flatten(1, 2)[:, part.runs, None]
    return centre[part.runs], rates[part.runs], shown, axes


def _tiles(packed, part):
    """The codes of a part as fp32 [R * s, T, D], a tile of blocks at a time, in memory that the next tile takes over."""
    codes, (runs, blocks) = part.of(packed.codes), part.shape
    tokens, D = packed.block, packed.head_dim
    step = max(1, min(blocks, _TILE // (runs * tokens * D)))
    room = torch.empty((runs * step, tokens, D), dtype=torch.float32)
    planes = 8 // width(packed.bits)
    apart = torch.empty(room.shape, dtype=torch.uint8) if planes > 1 else None
    for low in range(0, blocks, step):
        high = min(low + step, blocks)
        tile, held = codes[:, low:high].flatten(0, 1), room[: runs * (high - low)]
        if planes > 1:
            tile = _apart(tile, apart[: len(held)].unflatten(1, (planes, -1)), packed.bits)
        yield low, high, held.copy_(tile.view(FP8) if packed.bits == "fp8" else tile)


def _apart(codes, planes, bits):
    """Bytes [N, T * bits / 8, D] -> their codes, a byte each [N, T, D], in `planes` [N, 8 / bits, T * bits / 8, D]."""
    last = planes.shape[1] - 1
    for p in range(last):
        torch.bitwise_and(codes >> (p * bits) if p else codes, 2**bits - 1, out=planes[:, p])
    torch.bitwise_right_shift(codes, last * bits, out=planes[:, last])
    return planes.flatten(1, 2)


def _by_channel(q, k, part):
    """q [R, x, D] . keys with a scale per channel -> fp32 [R, x, s * T]."""
    (runs, blocks), x = part.shape, q.shape[1]
    scaled = q[:, None] * part.of(k.scale).float()  # [R, s, x, D]
    scores = q.new_empty(runs, x, blocks, k.block)
    for low, high, codes in _tiles(k, part):
        products = torch.bmm(scaled[:, low:high].flatten(0, 1), codes.mT)
        scores[:, :, low:high] = products.unflatten(0, (runs, -1)).transpose(1, 2)
    scores += (q @ part.of(k.zero)[:, :, 0].float().mT).unsqueeze(-1)
    return scores.flatten(2)


def _by_token(q, k, part):
    """q [R, x, D] . keys with a scale per token and group of channels -> fp32 [R, x, s * T]."""
    (runs, blocks), x = part.shape, q.shape[1]
    scale, zero = (part.of(table).float().flatten(1, 2).unbind(2) for table in (k.scale, k.zero))  # [R, s * T] a group
    grouped = q.chunk(len(scale), 2)
    scores = q.new_zeros(runs, x, blocks * k.block)
    for low, high, codes in _tiles(k, part):
        tokens = slice(low * k.block, high * k.block)
        for queries, by, some in zip(
            grouped, scale, codes.view(runs, -1, k.head_dim).chunk(len(scale), 2), strict=True
        ):
            scores[..., tokens] += (queries @ some.mT).mul_(by[:, None, tokens])
    for queries, more in zip(grouped, zero, strict=True):
        scores += queries.sum(-1, keepdim=True) * more[:, None]
    return scores


def _values(weights, v, part):
    """weights fp32 [R, x, s * T] times the values -> fp32 [R, x, D]; unseen slots may hold anything."""
    runs, T = part.shape[0], v.block
    scale, zero = (part.of(table).float().flatten(1, 2) for table in (v.scale, v.zero))  # [R, s * T, groups]
    if part.seen is not None:
        hidden = ~part.seen[..., None]
        scale, zero = scale.masked_fill(hidden, 0), zero.masked_fill(hidden, 0)
    groups = scale.shape[2]
    out = (weights @ zero).repeat_interleave(v.head_dim // groups, 2)
    scaled = [weights * by[:, None] for by in scale.unbind(2)]
    for low, high, codes in _tiles(v, part):
        tokens, codes = slice(low * T, high * T), codes.view(runs, -1, v.head_dim)
        if v.bits == "fp8" and part.seen is not None:  # other codes are finite whatever they are
            codes.masked_fill_(hidden[:, tokens], 0)
        for some, by, into in zip(scaled, codes.chunk(groups, 2), out.chunk(groups, 2), strict=True):
            into += some[..., tokens] @ by
    return out
