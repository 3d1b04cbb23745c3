"""The reference of `packed_attention`: plain torch, in tiles of dequantised tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._rotary_centre import turned_scores
from .pack import entries, expand

_TOKENS = 256  # keys of a run that the reference dequantises at a time
_QUERIES = 512  # query rows of a run that it takes at a time
_ROWS = 32  # query rows up to which single entries are moved row by row


def reference(q, k, v, *, scale, start, length, longest, turn=None, softcap=None, shift=None, valid=None):
    """Plain torch, fp32 accumulation: the truth. Walks the runs side by side, tile by tile.

    shift is None or fp32 [B, H, m], added to all products of a query; valid None or bool [B, G, n].
    """
    B, H, m, D = q.shape
    runs = start.numel()
    rows = q.reshape(runs, B * H // runs * m, D)
    valid = None if valid is None else valid.reshape(runs, -1)
    shift = rows.new_zeros(1) if shift is None else shift
    shifts = shift.expand(B, H, m).reshape(runs, rows.shape[1], 1).split(_QUERIES, dim=1)
    parts = [
        _walk(part.float() * scale, k, v, start, length, longest, turn, softcap, more.float() * scale, valid)
        for part, more in zip(rows.split(_QUERIES, dim=1), shifts, strict=True)
    ]  # fmt: skip
    out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return out.to(q.dtype).reshape(B, H, m, D), lse.reshape(B, H, m)


def _walk(q, k, v, start, length, longest, turn, softcap, shift, valid):
    """q fp32 [runs, x, D], scaled; shift [runs, x, 1], scaled too; valid [runs, n] -> out fp32 [runs, x, D], lse
    [runs, x]: the online softmax over tiles of blocks."""
    runs, x, D = q.shape
    tokens, step = k.block, max(1, _TOKENS // k.block)
    top = q.new_full((runs, x, 1), -torch.inf)
    total, acc = torch.zeros_like(top), torch.zeros_like(q)
    for low in range(0, -(-longest // tokens), step):
        block = torch.arange(low, min(low + step, -(-longest // tokens)), device=q.device)
        seen = (block[:, None] * tokens + torch.arange(tokens, device=q.device)).view(1, -1) < length[:, None]
        if valid is not None:  # it may end before the last tile does
            some = valid[:, low * tokens : low * tokens + seen.shape[1]]
            seen = seen & F.pad(some, (0, seen.shape[1] - some.shape[1]))
        inside = block * tokens < length[:, None]
        blocks = torch.where(inside, start[:, None] + block, 0)  # block 0 stands in where a run has ended
        scores = _scores(q, k, blocks)
        if turn is not None:
            scores += turned_scores(q, *turn, slice(low * tokens, low * tokens + scores.shape[2]))
        scores += shift
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(~seen[:, None], -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = higher.masked_fill(higher == -torch.inf, 0)
        p, decay, top = scores.sub_(safe).exp_(), (top - safe).exp(), higher
        total = total * decay + p.sum(-1, keepdim=True)
        acc = acc * decay + _weighted(p, v, blocks, seen)
    out = acc / total.masked_fill(total == 0, 1)
    return out, (top + total.log())[..., 0]


def _scores(q, k, blocks):
    """q [runs, x, D] against the blocks int64 [runs, s] -> fp32 [runs, x, s * T]."""
    runs, s = blocks.shape
    flat = blocks.reshape(-1)
    scores = q @ expand(k, flat).view(runs, s * k.block, -1).mT
    key_corrections(scores, q, k, blocks)
    return scores


def key_corrections(scores, q, k, blocks):
    """Adds what low rank and single entries make of q [runs, x, D] in the blocks [runs, s]: scores [runs, x, s * T]."""
    runs, s = blocks.shape
    if k.lowrank is not None:
        a, p = rank_of(k, blocks)
        scores += torch.einsum("rxd,rsdk,rstk->rxst", q, p, a).flatten(2)
    if k.sparse is not None:
        token, channel, delta = _entries_of(k, blocks)
        scores += _moved(q, channel, token, delta, s * k.block)


def _weighted(p, v, blocks, seen):
    """p fp32 [runs, x, s * T] times the values of the blocks -> fp32 [runs, x, D]; unseen slots may hold anything."""
    runs, s = blocks.shape
    values = expand(v, blocks.reshape(-1)).view(runs, s * v.block, -1)
    out = p @ values.masked_fill_(~seen[..., None], 0)
    value_corrections(out, p, v, blocks, seen)
    return out


def value_corrections(out, p, v, blocks, seen):
    """Adds what low rank and single entries make of weights p [runs, x, s * T]: out [runs, x, D]; seen None = all."""
    runs, s = blocks.shape
    if v.lowrank is not None:
        a, directions = rank_of(v, blocks)
        a = a if seen is None else a.masked_fill(~seen.view(runs, s, -1, 1), 0)
        out += torch.einsum("rxst,rstk,rsdk->rxd", p.unflatten(2, (s, -1)), a, directions)
    if v.sparse is not None:
        token, channel, delta = _entries_of(v, blocks)
        out += _moved(p, token, channel, delta, out.shape[-1])


def _moved(x, source, target, factor, width):
    """Column source[e] of x fp32 [runs, rows, n], times factor[e], added up in column target[e] of [runs, rows, width].

    Columns are counted through all runs, int32 [E]: those of run r begin at r * n and at r * width.
    """
    runs, rows, _ = x.shape
    x = x.transpose(0, 1).reshape(rows, -1)
    if rows <= _ROWS:  # one number at a time is a tight loop of torch, a row of numbers a call each
        sums = x.new_zeros(rows, runs * width)
        for own, into in zip(x, sums, strict=True):
            into.index_add_(0, target, own.index_select(0, source) * factor)
    else:
        sums = x.new_zeros(runs * width, rows).index_add_(0, target, x.mT[source] * factor[:, None]).mT
    return sums.view(rows, runs, width).transpose(0, 1)


def rank_of(packed, blocks):
    """What the blocks [runs, s] take of their directions: fp32 a [runs, s, T, r], p [runs, s, D, r]."""
    part, own = packed.lowrank, blocks.reshape(-1)
    a, p = part.a.index_select(0, own), part.p.index_select(0, part.chunk.index_select(0, own))
    return a.float().unflatten(0, blocks.shape), p.float().unflatten(0, blocks.shape)


def _entries_of(packed, blocks):
    """The corrected entries of the blocks [runs, s]: token among the runs * s * T, channel among the runs * D, int32
    each, and delta, fp32."""
    owner, entry = entries(packed.sparse, blocks.reshape(-1))
    at, owner, D = packed.sparse.at.index_select(0, entry).int() & 0xFFFF, owner.int(), packed.head_dim
    token = at.div(D, rounding_mode="floor")
    channel = at - token * D + owner.div(blocks.shape[1], rounding_mode="floor") * D
    return owner * packed.block + token, channel, packed.sparse.delta.index_select(0, entry).float()
