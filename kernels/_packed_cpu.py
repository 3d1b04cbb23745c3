"""`packed_attention` on a CPU: the reference's arithmetic in as few passes over the codes as torch's operators allow.

Codes become fp32 as they are, whole numbers, in tiles that stay in a core's cache, and are multiplied there. Scales go
where there is least to multiply: those of key channels to the queries, once per block, or to the tile where there are
more queries than half the tokens of a block; those of value tokens to the weights. Zeros and low-rank factors add one
product each per block or token, whatever the number of channels. Single corrections, in units of the codes, are added
to the tile. The scores of thousands of tokens are held at once, so there is a softmax for all of these and none that
runs along; what is made does not grow with longer runs, and no run is ever there as a whole. Runs go together in all
but their tiles.

Many queries are worth a tile as it would be unpacked: torch's fused attention reads that, and no score is ever stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._fused import _ATTEND
from ._packed_part import Part, singles, tiles
from ._packed_reference import rank_of
from ._rotary_centre import turned_scores
from ._weights import rows_of, tokens_together, turn_of, weights_of
from .merge import reference as merge

_TILE = 1 << 19  # numbers unpacked at a time: 2 MB
_SCORES = 1 << 19  # scores held at a time
_ROWS = 256  # query rows at a time
_TOKENS = 32768  # tokens of a run at a time, about
_MANY = 64  # query rows of a run from which tiles are unpacked for fused attention
_SOME = 32  # .. and from which exact tokens go with them, for this spares their own attention besides
_FEWEST = 1024  # .. and at least, whatever the number of queries


def packed_cpu(q, k, v, *, scale, start, length, longest, turn=None, softcap=None, shift=None, valid=None, beside=None):
    """Arguments as the reference's. With `beside`, a `Beside`: out, lse and the weights fp32 [B, H, r] of the last
    query over its last pair, the latter two None if not asked for; or nothing, where runs do not go together."""
    B, H, m, D = q.shape
    runs, starts, lengths = start.numel(), start.tolist(), length.tolist()
    x = B * H // runs * m
    plain = turn is softcap is shift is valid is None and x >= (_MANY if beside is None else _SOME)
    fused = plain and _ATTEND is not None and _whole(k, v, starts, lengths)
    short = x % 4 == 3 and not fused  # products of four rows are faster than those of three
    rows = rows_of(q, runs, scale, short)
    if shift is not None:
        shift = shift.reshape(runs, x, 1) * scale
        shift = F.pad(shift, (0, 0, 0, 1)) if short else shift
    pieces = [slice(low, low + _ROWS) for low in range(0, rows.shape[1], _ROWS)]
    # What is made for each token beside its scores is bounded, too.
    held = 4 if fused else max(4, min(rows.shape[1], _ROWS))
    groups, parts = list(_together(lengths, held, k.block)), []
    if beside is not None:
        chunks = [Part(groups[0][0], starts, lengths, columns, k.block, valid) for columns in groups[0][1]]
        if fused:
            per_token = beside.centre is not None and k.scale.shape[1] > 1  # whose table has no channels
            if len(groups) * len(chunks) > 1 or beside.row or beside.q is not None or per_token:
                return None
            out, lse = _unpacked(rows, k, v, chunks[0], beside)
            return out.to(q.dtype).reshape(B, H, m, D), lse.reshape(B, H, m), None
        if len(groups) * len(pieces) > 1 or not chunks:
            return None
        exact = beside.at(rows, rows if beside.q is None else rows_of(beside.q, runs, scale, short))
        out, lse, row = _with_exact(rows, k, v, chunks, turn, softcap, exact, beside)
        row = None if row is None else row[:, :x].reshape(B, H, m, -1)[:, :, -1]
        lse = None if lse is None else lse[:, :x].reshape(B, H, m)
        return out[:, :x].to(q.dtype).reshape(B, H, m, D), lse, row
    for some, chunks in groups:
        own, by, found = rows[some], None if shift is None else shift[some], []
        for columns in chunks:
            part = Part(some, starts, lengths, columns, k.block, valid)
            if fused:
                found.append(_unpacked(own, k, v, part))
                continue
            pairs = [_attend(own[:, p], k, v, part, turn, softcap, None if by is None else by[:, p]) for p in pieces]
            found.append(_joined(pairs, 1))
        if not found:
            found = [(torch.zeros_like(own), own.new_full(own.shape[:2], -torch.inf))]
        parts.append(found[0] if len(found) == 1 else merge(*zip(*found, strict=True)))
    out, lse = _joined(parts, 0)
    return out[:, :x].to(q.dtype).reshape(B, H, m, D), lse[:, :x].reshape(B, H, m)


def _with_exact(q, k, v, chunks, turn, softcap, exact, asked):
    """`_attend` over several parts of all runs, of which the last takes the exact tokens along -> out, lse or None, and
    the weights of the last pair [R, x, r] or None."""
    lses = asked.lse or len(chunks) > 1
    found = [_attend(q, k, v, part, turn, softcap, None) for part in chunks[:-1]]
    out, lse, weights = _attend(q, k, v, chunks[-1], turn, softcap, None, exact, lses)
    row = weights[..., weights.shape[2] - exact.pairs[-1][0].shape[1] :] if asked.row else None
    if found:
        own = lse
        out, lse = merge(*zip(*found, (out, lse), strict=True))
        row = None if row is None else row * (own - lse).exp().unsqueeze(-1)
    return out, lse if lse is None or exact.shift is None else lse + exact.shift[..., 0], row


def _joined(pairs, axis):
    """Pairs of out and lse, one behind the other along an axis that both have."""
    return pairs[0] if len(pairs) == 1 else tuple(torch.cat(each, axis) for each in zip(*pairs, strict=True))


def _together(lengths, rows, tokens):
    """Which runs go together, and the columns that they read at a time: as many scores as may be held.

    Runs of unequal length go together as long as no more than a third of what is read is nothing.
    """
    most, first = max(_FEWEST, _SCORES // rows), 0
    while first < len(lengths):
        last, total, longest = first + 1, lengths[first], lengths[first]
        while last < len(lengths):
            total, longest = total + lengths[last], max(longest, lengths[last])
            step, runs = tokens_together(longest, _TOKENS, most, tokens), last + 1 - first
            if runs * rows * min(longest, step) > _SCORES or 3 * total < 2 * longest * runs:
                break
            last += 1
        longest = max(lengths[first:last])
        step = tokens_together(longest, _TOKENS, most, tokens)
        yield slice(first, last), [slice(low, low + step) for low in range(0, longest, step)]
        first = last


def _attend(q, k, v, part, turn, softcap, shift, exact=None, need_lse=True):
    """q fp32 [R, x, D], scaled -> out fp32 [R, x, D], lse [R, x], and the weights of exact tokens if there are any."""
    scores = (_by_channel if k.scale.shape[1] == 1 else _by_token)(q, k, part)
    if k.lowrank is not None:
        _add_rank(scores, q, k, part)
    if turn is not None:
        scores += turned_scores(q, *turn_of(turn, part.runs), part.columns)
    if shift is not None:
        scores += shift
    seen, n = part.seen, scores.shape[2]
    if exact is not None:
        scores = torch.cat([scores, *exact.scores()], 2)
        seen = None if seen is None else F.pad(seen, (0, scores.shape[2] - n), value=True)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    weights, lse = weights_of(scores, seen, need_lse)
    if exact is None:
        return _values(weights, v, part), lse
    out, weights = _values(weights[..., :n], v, part), weights[..., n:]
    exact.add(out, weights)
    return out, lse, weights


def _whole(k, v, starts, lengths):
    """Whether runs are whole blocks, as many in each, of which each run's share the low-rank directions."""
    if not lengths[0] or lengths[0] % k.block or any(n != lengths[0] for n in lengths):
        return False
    every = Part(slice(0, len(lengths)), starts, lengths, slice(0, lengths[0]), k.block, None)
    return all(x.lowrank is None or _one_direction(x, every) is not None for x in (k, v))


def _unpacked(q, k, v, part, beside=None):
    """As `_attend` without a turning centre, a shift or a soft cap, by fused attention over tiles of runs that are
    `_whole`, as they are; with the exact tokens of `beside` behind the last tile of every run."""
    tables, centre = [], None if beside is None or beside.centre is None else beside.centre[part.runs, None, None]
    for packed in (k, v):
        rank, (scale, zero) = None, _table(packed, part)
        if packed.lowrank is not None:
            rank = part.of(packed.lowrank.a).flatten(1, 2).float(), _one_direction(packed, part).mT
        if packed is k and centre is not None:  # beside exact keys these must be whole
            zero = zero + centre
        tables.append((rank, tiles(packed, part, _TILE, singles(packed, part, None), scale, zero)))
    (k_rank, keys), (v_rank, values) = tables
    exact = None if beside is None else [[x.flatten(0, 1).float() for x in pair] for pair in beside.pairs]
    outs, lses = [[] for _ in q], [[] for _ in q]
    for (some, low, high, a), (_, _, _, b) in zip(keys, values, strict=True):
        tokens, own = slice(low * k.block, high * k.block), q[some, None]
        pair = []
        for which, (x, rank) in enumerate(((a, k_rank), (b, v_rank))):
            x = x.view(len(own), -1, k.head_dim)
            x = x if rank is None else x.baddbmm_(rank[0][some, tokens], rank[1][some])
            if exact is not None and high == part.shape[1]:
                x = torch.cat([x, *(each[which][some] for each in exact)], 1)
            pair.append(x[:, None])
        out, lse = _ATTEND(own, *pair, 0.0, False, attn_mask=None, scale=1.0)
        if len(own) == len(q) and high - low == part.shape[1]:
            return out[:, 0], lse[:, 0]
        for r, run in enumerate(range(some.start, some.stop)):
            outs[run].append(out[r, 0])
            lses[run].append(lse[r, 0])
    parts = [torch.stack(x) for x in zip(*outs, strict=True)], [torch.stack(x) for x in zip(*lses, strict=True)]
    return (parts[0][0], parts[1][0]) if len(parts[0]) == 1 else merge(*parts)


def _table(packed, part):
    """Scale and zero of a part, fp32 [R, s, 1 or T, D or groups]."""
    return tuple(part.of(x).float() for x in (packed.scale, packed.zero))


def _nowhere_0(scale, packed):
    """Scales by which single corrections can be divided: the codes of a group that is one number are 0."""
    return scale if packed.sparse is None else scale.clamp(min=2**-24)  # float16 has no smaller one


def _by_channel(q, k, part):
    """q [R, x, D] . keys with a scale per channel -> fp32 [R, x, s * T]."""
    (runs, blocks), x, T = part.shape, q.shape[1], k.block
    scale, zero = _table(k, part)
    scores = q.new_empty(runs, x, blocks * T)
    if 2 * x >= T:
        for some, low, high, keys in tiles(k, part, _TILE, singles(k, part, None), scale, zero):
            own = keys.view(some.stop - some.start, -1, k.head_dim)
            scores[some, :, low * T : high * T] = torch.bmm(q[some], own.mT)
        return scores
    scale = _nowhere_0(scale, k)
    scaled, by_block = q[:, None] * scale, scores.view(runs, x, blocks, T)  # [R, s, x, D]
    of_zero = torch.bmm(q, zero[:, :, 0].mT).unsqueeze(-1)
    for some, low, high, codes in tiles(k, part, _TILE, singles(k, part, scale)):
        products = torch.bmm(scaled[some, low:high].reshape(-1, x, k.head_dim), codes.mT)
        products, here = products.view(-1, high - low, x, T).transpose(1, 2), (some, slice(None), slice(low, high))
        torch.add(products, of_zero[here], out=by_block[here])
    return scores


def _by_token(q, k, part):
    """q [R, x, D] . keys with a scale per token and group of channels -> fp32 [R, x, s * T]."""
    (runs, blocks), x, T = part.shape, q.shape[1], k.block
    scale, zero = _table(k, part)
    groups = scale.shape[3]
    scale, of_tile = _nowhere_0(scale, k), scale if groups > 1 else None
    scores = q.new_empty(runs, x, blocks * T)
    for some, low, high, codes in tiles(k, part, _TILE, singles(k, part, scale if of_tile is None else None), of_tile):
        own = codes.view(-1, (high - low) * T, k.head_dim)
        scores[some, :, low * T : high * T] = torch.bmm(q[some], own.mT)
    if of_tile is None:
        scores.mul_(scale.view(runs, 1, -1))
    return scores.baddbmm_(q.unflatten(2, (groups, -1)).sum(3), zero.flatten(1, 2).mT)


def _values(weights, v, part):
    """weights fp32 [R, x, s * T] times the values -> fp32 [R, x, D]; unseen slots may hold anything."""
    T, D = v.block, v.head_dim
    scale, zero = _table(v, part)
    if part.seen is not None:
        hidden = ~part.seen[..., None]
        scale, zero = (table.masked_fill(hidden.view(*scale.shape[:3], 1), 0) for table in (scale, zero))
    # Weights times a matrix of few columns: several times faster with the tokens of a column side by side.
    columns = zero.flatten(1, 2).mT.contiguous()
    groups = columns.shape[1]
    rank = None if v.lowrank is None else _one_direction(v, part)
    if rank is not None:
        a = part.of(v.lowrank.a).flatten(1, 2).mT.float()
        columns = torch.cat([columns, a if part.seen is None else a.masked_fill(hidden.mT, 0)], 1)
    added = torch.bmm(columns, weights.mT).mT  # [R, x, groups + ranks]
    out = added[..., :groups] if groups == 1 else added[..., :groups].repeat_interleave(D // groups, 2)
    if rank is not None:
        out = torch.baddbmm(out, added[..., groups:], rank.mT)
    else:
        out = out.expand(-1, -1, D).contiguous()
    if v.lowrank is not None and rank is None:
        a, directions = rank_of(v, part.indices().view(part.shape))
        a = a if part.seen is None else a.masked_fill(hidden.view(*a.shape[:3], 1), 0)
        out += torch.einsum("rxst,rstk,rsdk->rxd", weights.unflatten(2, part.shape[1:] + (-1,)), a, directions)
    # One scale for all channels of a token goes to its weight, several to the tile.
    scale, of_tile = _nowhere_0(scale, v), scale if groups > 1 else None
    extra = singles(v, part, scale if of_tile is None else None)
    if of_tile is None:
        weights = weights * scale.view(len(weights), 1, -1)
    for some, low, high, codes in tiles(v, part, _TILE, extra, of_tile):
        tokens, codes = slice(low * T, high * T), codes.view(-1, (high - low) * T, D)
        if v.bits == "fp8" and part.seen is not None:  # other codes are finite whatever they are
            codes.masked_fill_(hidden[some, tokens], 0)
        out[some].baddbmm_(weights[some, :, tokens], codes)
    return out


def _one_direction(packed, part):
    """The low-rank directions fp32 [R, D, r] of runs whose blocks all have the same; None where they have several."""
    chunks, p = part.of(packed.lowrank.chunk).tolist(), packed.lowrank.p
    if any(own.count(own[0]) < len(own) for own in chunks):
        return None
    first = [own[0] for own in chunks]
    if first == list(range(first[0], first[0] + len(first))):
        return p[first[0] : first[0] + len(first)].float()
    return p[first].float()


def _add_rank(scores, q, k, part):
    """Adds what the low-rank corrections of keys make of q [R, x, D]: scores [R, x, s * T]."""
    directions = _one_direction(k, part)
    if directions is not None:
        a = part.of(k.lowrank.a).flatten(1, 2).float()
        scores.baddbmm_(torch.bmm(q, directions), a.mT)
        return
    a, directions = rank_of(k, part.indices().view(part.shape))
    scores += torch.einsum("rxd,rsdk,rstk->rxst", q, directions, a).flatten(2)
