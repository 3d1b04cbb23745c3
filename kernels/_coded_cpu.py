"""`coded_attention` on a CPU for tokens of which all scores are held at once: one softmax, and none that runs along.

A byte is looked up as the numbers that it stands for, in tiles that stay in a core's cache; a tile is multiplied and
overwritten. Scales of keys go to the scores, those of values to the weights.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from ._rotary_centre import turned_scores
from ._weights import weights_of
from .codebook import scales, vectors
from .merge import reference as merge

_TILE = 1 << 19  # numbers that are looked up at a time: 2 MB
_SCORES = 1 << 19  # scores held at a time
_ROWS = 256  # query rows at a time
_TOKENS, _FEWEST = 8192, 1024  # tokens of a run at a time, at most and at least


def coded_cpu(q, query, k, v, bits, shift, turned, softcap, valid):
    """Arguments and results as the reference's."""
    runs, x, _ = q.shape
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid = None if valid is None else valid.flatten(0, 1)
    if x % 4 == 3:  # products of four rows are faster than those of three
        q, query = F.pad(q, (0, 0, 0, 1)), F.pad(query, (0, 0, 0, 1))
        shift = None if shift is None else F.pad(shift, (0, 1))
    rows = min(_ROWS, q.shape[1])
    step = min(_TOKENS, max(_FEWEST, _SCORES // rows), max(1, k.shape[1]))
    side = max(1, _SCORES // (rows * step))  # runs that go together
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    tiles = [slice(low, low + step) for low in range(0, k.shape[1], step)]
    for first, low in product(range(0, runs, side), range(0, q.shape[1], rows)):
        some = slice(first, first + side)
        here = (some, slice(low, low + rows))
        by, turn = None if shift is None else shift[here], None if turned is None else _turn_of(turned, some, runs)
        parts = [
            _attend(
                q[here], query[here], k[some, tile], v[some, tile], bits, by, turn, softcap,
                None if valid is None else valid[some, tile], tile,
            )
            for tile in tiles
        ]  # fmt: skip
        out[here], lse[here] = parts[0] if len(parts) == 1 else merge(*zip(*parts, strict=True))
    return out[:, :x], lse[:, :x]


def _turn_of(turned, some, runs):
    """What belongs to some of the runs: `turned` as if there were no others."""
    centre, inv_freq, positions, axes = turned
    shown = positions.expand(-1, -1, runs // positions.shape[1], -1).flatten(1, 2)[:, some, None]
    return centre[some], inv_freq[some], shown, axes


def _attend(q, query, k, v, bits, shift, turned, softcap, seen, columns):
    """q fp32 [R, x, D], scaled, and turned; rows [R, n, bytes] of the tokens `columns` -> out fp32 [R, x, D], still
    turned, and lse [R, x]."""
    (R, n, _), (x, D) = k.shape, q.shape[1:]
    size, scores = scales(k), q.new_empty(R, x, n)
    step = max(16, _TILE // (R * D))
    tiles = [slice(low, low + step) for low in range(0, n, step)]
    for tile in tiles:
        c = vectors(k[:, tile], bits[0], D).mT
        if len(tiles) == 1:
            torch.bmm(query, c, out=scores)
        else:
            scores[..., tile] = torch.bmm(query, c)
    scores.mul_(size.abs()[:, None])
    if shift is not None:
        centres = shift[..., None]
        if turned is not None:
            last = slice(columns.start, columns.start + n)
            centres = centres + turned_scores(q, *turned, last)
        scores += centres * ~size[:, None].signbit()
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    weights, lse = weights_of(scores, seen)
    size = scales(v).abs()
    weights.mul_((size if seen is None else size.masked_fill(~seen, 0))[:, None])
    out = torch.zeros_like(q)
    for tile in tiles:
        out.baddbmm_(weights[..., tile], vectors(v[:, tile], bits[1], D))
    return out, lse
