"""`packed_attention` on a CPU: the reference's arithmetic in as few passes over the codes as torch's operators allow.

Codes become fp32 as they are, whole numbers, in tiles that stay in a core's cache. Scales go where there is least to
multiply: those of key channels to the queries, once per block; those of value tokens to the weights; zeros add one
product per block or token. The scores of thousands of tokens are held at once, so there is a softmax for all of these
and none that runs along; what is made does not grow with longer runs. Runs of equal length at equal distances, as dense
caches have them, go together in all but their tiles.

Many queries, as a window of a diffusion model has them, are another matter: what is multiplied per block costs more
than the codes themselves. For these a chunk of a run is written out in two passes, scales and corrections included,
and attended as a dense one; it is overwritten by the next chunk, so that no run is ever there as a whole.
"""

from __future__ import annotations

from itertools import product

import torch

from ._packed_reference import key_corrections, value_corrections
from ._rotary_centre import turned_scores
from .merge import reference as merge
from .pack import FP8, add_corrections, width

_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_TILE = 1 << 18  # numbers unpacked at a time: 1 MB
_SCORES = 1 << 22  # scores, and scaled queries, held at a time
_MANY = 24  # query rows from which on tokens are written out
_ROWS = 16  # query rows at a time, at least
_TOKENS = 8192  # tokens of a run at a time: what is made for each beside the tiles must not grow with the run


def packed_cpu(q, k, v, *, scale, start, length, longest, turn=None, softcap=None, shift=None, valid=None):
    """Arguments as the reference's."""
    B, H, m, D = q.shape
    runs = start.numel()
    rows = q.reshape(runs, B * H // runs * m, D).float() * scale
    x = rows.shape[1]
    shift = None if shift is None else shift.reshape(runs, x, 1) * scale
    starts, lengths = start.tolist(), length.tolist()
    parts = []
    for some, distance in _together(starts, lengths, k.block, D):
        n, own, by = lengths[some.start], rows[some], None if shift is None else shift[some]
        chunks = [
            _queries(own, k, v, _Part(some, starts[some.start], distance, first, n, k.block, valid), turn, softcap, by)
            for first in range(0, n, max(1, _TOKENS // k.block) * k.block)
        ]
        if not n:
            chunks = [(torch.zeros_like(own), own.new_full(own.shape[:2], -torch.inf))]
        parts.append(chunks[0] if len(chunks) == 1 else merge(*zip(*chunks, strict=True)))
    out, lse = _joined(parts, 0)
    return out.to(q.dtype).view(B, H, m, D), lse.view(B, H, m)


def _queries(q, k, v, part, turn, softcap, shift):
    """`_attend` to a part, as many queries at a time as their scores may be."""
    step = max(_ROWS, _SCORES // (len(q) * part.blocks * max(k.head_dim, k.block)))
    pieces = [slice(low, low + step) for low in range(0, q.shape[1], step)]
    return _joined(
        [_attend(q[:, x], k, v, part, turn, softcap, None if shift is None else shift[:, x]) for x in pieces], 1
    )  # fmt: skip


def _joined(pairs, axis):
    """Pairs of out and lse, one behind the other along an axis that both have."""
    return pairs[0] if len(pairs) == 1 else tuple(torch.cat(each, axis) for each in zip(*pairs, strict=True))


def _together(starts, lengths, tokens, D):
    """Which runs go together, and how many blocks lie between their starts."""
    blocks = max(1, -(-min(lengths[0], _TOKENS) // tokens))
    runs, row = len(starts), blocks * max(tokens, D)  # numbers of a query row of a run
    most = max(1, _SCORES // (_ROWS * row))
    distance = starts[1] - starts[0] if runs > 1 else 0
    even = most > 1 and distance > 0 and all(n == lengths[0] for n in lengths)
    if not even or any(s != starts[0] + r * distance for r, s in enumerate(starts)):
        return [(slice(r, r + 1), 0) for r in range(runs)]
    return [(slice(r, min(r + most, runs)), distance) for r in range(0, runs, most)]


class _Part:
    """Blocks of runs that go together, R of them with s blocks each.

    Attributes:
        runs: their indices.
        columns: which tokens of the runs these are, slack behind the last included.
        seen: bool [R, s * T], which tokens count; None = all.
    """

    def __init__(self, runs, start, distance, first, n, tokens, valid):
        """The chunk from token `first` on of runs of n tokens, the first of which starts with block `start`."""
        n = min(n - first, max(1, _TOKENS // tokens) * tokens)
        self.runs, self.start, self.distance, self.blocks = runs, start + first // tokens, distance, -(-n // tokens)
        self.columns = slice(first, first + self.blocks * tokens)
        self.shape, self.seen = (runs.stop - runs.start, self.blocks), None
        if valid is None and n == self.blocks * tokens:
            return
        self.seen = torch.zeros(self.shape[0], self.blocks * tokens, dtype=torch.bool)
        self.seen[:, :n] = True if valid is None else valid.flatten(0, 1)[runs, first : first + n]

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
    if q.shape[1] >= _MANY and turn is None and softcap is None:
        return _attend_dense(q, k, v, part)
    scores = (_by_channel if k.scale.shape[1] == 1 else _by_token)(q, k, part)
    blocks = None
    if k.lowrank is not None or k.sparse is not None or v.lowrank is not None or v.sparse is not None:
        blocks = part.indices()
        key_corrections(scores, q, k, blocks)
    if turn is not None:
        scores += turned_scores(q, *_turn_of(turn, part), part.columns)
    if shift is not None:
        scores += shift
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if part.seen is not None:
        scores.masked_fill_(~part.seen[:, None], -torch.inf)
    top = scores.amax(-1)
    weights = scores.softmax(-1)
    lse = top - weights.amax(-1).log()  # what the largest score has become tells the sum of all
    if part.seen is not None:  # of a query that sees nothing, all this is NaN
        nothing = top == -torch.inf
        weights, lse = weights.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    out = _values(weights, v, part)
    if blocks is not None:
        value_corrections(out, weights, v, blocks, part.seen)
    return out, lse


def _attend_dense(q, k, v, part):
    """`_attend` for many queries, without what is added to single scores."""
    blocks = part.indices().flatten()
    keys, values = (_written_out(x, part, blocks)[:, None] for x in (k, v))
    mask = None
    if part.seen is not None:
        seen = part.seen[:, None, None]
        # slack and holes may hold anything
        values = values.masked_fill_(~seen.mT, 0)
        keys = keys.masked_fill_(~seen.mT, 0)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    out, lse = _SDPA(q[:, None], keys, values, 0.0, False, attn_mask=mask, scale=1.0)
    out, lse = out[:, 0], lse.view(q.shape[:2])
    if mask is not None:
        nothing = ~part.seen.any(1)[:, None]
        out, lse = out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    return out, lse


def _written_out(packed, part, blocks):
    """What the blocks of a part stand for, fp32 [R, s * T, D]; their numbers are `blocks` int64 [R * s]."""
    codes, planes = part.of(packed.codes), 8 // width(packed.bits)
    tokens, D = packed.block, packed.head_dim
    if packed.bits == "fp8":
        codes = codes.view(FP8)
    room = torch.empty(*part.shape, planes, tokens // planes, D)
    for p in range(planes):
        plane = codes if planes == 1 else (codes >> (p * packed.bits)) & (2**packed.bits - 1)
        room[:, :, p] = plane
    scale, zero = (part.of(x).float() for x in (packed.scale, packed.zero))  # [R, s, 1, D] or [R, s, T, groups]
    x = room.view(*part.shape, tokens, D)
    if scale.shape[2] > 1:
        grouped = x.unflatten(3, (scale.shape[3], -1))
        torch.addcmul(zero[..., None], grouped, scale[..., None], out=grouped)
    else:
        torch.addcmul(zero, x, scale, out=x)
    flat = x.view(-1, tokens, D)
    add_corrections(flat, packed, blocks)
    return flat.view(part.shape[0], -1, D)


def _turn_of(turn, part):
    """What belongs to the runs of a part: `turn` as if there were no others."""
    centre, inv_freq, positions, axes = turn
    runs = len(centre)
    shown = positions.expand(-1, -1, runs // positions.shape[1], -1).flatten(1, 2)[:, part.runs, None]
    return centre[part.runs], inv_freq[part.runs], shown, axes


def _tiles(packed, part):
    """The codes of a part, a tile of blocks at a time: fp32 [R * s, T, D] in memory that the next tile overwrites.

    Of 4 bits, the first half of a block's tokens are bytes as they are, the code and 16 times that of a token of the
    second half, which is taken away where there is less of it: from scores and weights. For 2 bits this would cost
    digits: there are three codes above the first.
    """
    codes, (runs, blocks) = part.of(packed.codes), part.shape
    tokens, D, planes = packed.block, packed.head_dim, 8 // width(packed.bits)
    most = max(1, _TILE // (tokens * D))
    step, side = min(blocks, most), max(1, min(runs, most // blocks))  # blocks of a run; runs, where these are all
    floats = torch.empty(side * step * tokens * D)
    for first, low in product(range(0, runs, side), range(0, blocks, step)):
        some, high = slice(first, min(first + side, runs)), min(low + step, blocks)
        count = (some.stop - first) * (high - low)
        tile = codes[some, low:high].reshape(count, tokens // planes, D)
        if packed.bits == "fp8":
            tile = tile.view(FP8)
        room = floats[: count * tokens * D].view(count, planes, tokens // planes, D)
        for p in range(planes):
            plane = tile >> (p * packed.bits) if p else tile
            room[:, p] = plane & 3 if packed.bits == 2 else plane
        yield some, low, high, room.view(count, tokens, D)


def _scores_of_codes(scores, packed):
    """Scores [.., s * T] of tiles -> of codes, in place."""
    if packed.bits == 4:
        first, second = scores.view(-1, 2, packed.block // 2).unbind(1)
        first.sub_(second, alpha=16)


def _weights_of_tiles(weights, packed):
    """Weights [.., s * T] of codes -> of tiles, in place."""
    if packed.bits == 4:
        first, second = weights.view(-1, 2, packed.block // 2).unbind(1)
        second.sub_(first, alpha=16)


def _by_channel(q, k, part):
    """q [R, x, D] . keys with a scale per channel -> fp32 [R, x, s * T]."""
    (runs, blocks), x, T = part.shape, q.shape[1], k.block
    scaled = q[:, None] * part.of(k.scale).float()  # [R, s, x, D]
    scores = q.new_empty(runs, x, blocks, T)
    for some, low, high, codes in _tiles(k, part):
        products = torch.bmm(scaled[some, low:high].reshape(-1, x, k.head_dim), codes.mT)
        scores[some, :, low:high] = products.view(-1, high - low, x, T).transpose(1, 2)
    _scores_of_codes(scores, k)
    scores += torch.bmm(q, part.of(k.zero)[:, :, 0].float().mT).unsqueeze(-1)
    return scores.view(runs, x, blocks * T)


def _by_token(q, k, part):
    """q [R, x, D] . keys with a scale per token and group of channels -> fp32 [R, x, s * T]."""
    (runs, blocks), x = part.shape, q.shape[1]
    scale, zero = (part.of(table).float().flatten(1, 2).unbind(2) for table in (k.scale, k.zero))  # [R, s * T] a group
    grouped = q.chunk(len(scale), 2)
    products = q.new_empty(len(scale), runs, x, blocks * k.block)
    for some, low, high, codes in _tiles(k, part):
        split = codes.view(-1, (high - low) * k.block, k.head_dim).chunk(len(scale), 2)
        for into, queries, own in zip(products, grouped, split, strict=True):
            into[some, :, low * k.block : high * k.block] = queries[some] @ own.mT
    _scores_of_codes(products, k)
    for into, queries, by, more in zip(products, grouped, scale, zero, strict=True):
        into.mul_(by[:, None]).add_(queries.sum(-1, keepdim=True) * more[:, None])
    return products.sum(0) if len(scale) > 1 else products[0]


def _values(weights, v, part):
    """weights fp32 [R, x, s * T] times the values -> fp32 [R, x, D]; unseen slots may hold anything."""
    T = v.block
    scale, zero = (part.of(table).float().flatten(1, 2) for table in (v.scale, v.zero))  # [R, s * T, groups]
    if part.seen is not None:
        hidden = ~part.seen[..., None]
        scale, zero = scale.masked_fill(hidden, 0), zero.masked_fill(hidden, 0)
    scaled = [weights * by.unsqueeze(1) for by in scale.unbind(2)]
    for some in scaled:
        _weights_of_tiles(some, v)
    groups = len(scaled)
    out = torch.bmm(weights, zero)[..., None].expand(-1, -1, -1, v.head_dim // groups).flatten(2).contiguous()
    sums = out.chunk(groups, 2)
    for some, low, high, codes in _tiles(v, part):
        tokens, codes = slice(low * T, high * T), codes.view(-1, (high - low) * T, v.head_dim)
        if v.bits == "fp8" and part.seen is not None:  # other codes are finite whatever they are
            codes.masked_fill_(hidden[some, tokens], 0)
        for into, by, own in zip(sums, scaled, codes.chunk(groups, 2), strict=True):
            into[some].baddbmm_(by[some, :, tokens], own)
    return out
