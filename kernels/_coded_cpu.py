"""`coded_attention` on a CPU for tokens of which all scores are held at once: one softmax, and none that runs along.

A byte is looked up as the numbers that it stands for, in tiles that stay in a core's cache; a tile is multiplied and
overwritten. Scales of keys go to the scores, those of values to the weights.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from ._rotary_centre import turned_scores
from ._weights import tokens_together, turn_of, weights_of
from .codebook import Room, scales, vectors
from .merge import reference as merge

_TILE = 1 << 19  # numbers that are looked up at a time: 2 MB
_SCORES = 1 << 19  # scores held at a time
_ROWS = 256  # query rows at a time
_TOKENS, _FEWEST = 32768, 1024  # tokens of a run at a time, about, and at least


def coded_cpu(q, query, k, v, bits, shift, turned, softcap, valid, beside=None, need_lse=True):
    """Arguments as the reference's, and its results: out, still turned, and lse, which may be None if not needed; then
    what out lacks, fp32 [runs, x, D] that is not turned, or None.

    Args:
        beside: keys and values fp32 [runs, r, D], which are seen too.
    """
    runs = len(q)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid = None if valid is None else valid.flatten(0, 1)
    rows, n = min(_ROWS, q.shape[1]), k.shape[1]
    step = tokens_together(n, _TOKENS, max(_FEWEST, _SCORES // rows))
    side = max(1, _SCORES // (rows * step))  # runs that go together
    tiles = [slice(low, min(low + step, n)) for low in range(0, n, step)]

    def attended(q, query, some, of):
        """out, lse and what out lacks of query rows `of` of some runs, which are q and query."""
        by, turn = None if shift is None else shift[some, of], None if turned is None else turn_of(turned, some)
        more = None if beside is None else tuple(part[some] for part in beside)
        parts = [
            _attend(
                q, query, k[some, tile], v[some, tile], bits, by, turn, softcap,
                None if valid is None else valid[some, tile], tile, more if tile is tiles[-1] else None,
                need_lse or len(tiles) > 1,
            )
            for tile in tiles
        ]  # fmt: skip
        out, lse, exact = parts[-1]
        if len(parts) > 1:
            own = lse
            out, lse = merge(*zip(*(part[:2] for part in parts), strict=True))
            exact = None if exact is None else exact * (own - lse).exp()[..., None]
        return out, lse, exact

    if runs <= side and q.shape[1] <= rows:
        return attended(q, query, slice(0, runs), slice(0, rows))
    out, lse, need_lse = torch.empty_like(q), q.new_empty(q.shape[:2]), True
    exact = None if beside is None else torch.empty_like(q)
    for first, low in product(range(0, runs, side), range(0, q.shape[1], rows)):
        here = slice(first, first + side), slice(low, low + rows)
        out[here], lse[here], lacks = attended(q[here], query[here], *here)
        if exact is not None:
            exact[here] = lacks
    return out, lse, exact


def _attend(q, query, k, v, bits, shift, turned, softcap, seen, columns, beside, need_lse):
    """q fp32 [R, x, D], scaled, and turned; rows [R, n, bytes] of the tokens `columns` -> out fp32 [R, x, D], still
    turned, lse [R, x], and what the tokens beside these add to the output, which is not turned, or None."""
    (R, n, _), (x, D) = k.shape, q.shape[1:]
    size, step = scales(k), max(16, _TILE // (R * D))
    tiles = [slice(low, min(low + step, n)) for low in range(0, n, step)]
    room = Room(R * min(step, n) * (D + -D % 8))
    scores = q.new_empty(R, x, n + (0 if beside is None else beside[0].shape[1]))
    coded = scores[..., :n]
    for tile in tiles:
        coded[..., tile] = torch.bmm(query, vectors(k[:, tile], bits[0], D, room).mT)
    coded.mul_(size.abs()[:, None])
    if shift is not None:
        centres = shift[..., None]
        if turned is not None:
            centres = centres + turned_scores(q, *turned, columns)
        coded.addcmul_(centres, torch.logical_not(size.signbit(), out=torch.empty_like(size))[:, None])
    if beside is not None:
        scores[..., n:] = torch.bmm(q, beside[0].mT)
        seen = None if seen is None else F.pad(seen, (0, scores.shape[2] - n), value=True)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    weights, lse = weights_of(scores, seen, need_lse)
    exact = None if beside is None else torch.bmm(weights[..., n:], beside[1])
    size, coded = scales(v).abs(), weights[..., :n]
    coded.mul_((size if seen is None else size.masked_fill(~seen[:, :n], 0))[:, None])
    out = torch.bmm(coded[..., tiles[0]], vectors(v[:, tiles[0]], bits[1], D, room))
    for tile in tiles[1:]:
        out.baddbmm_(coded[..., tile], vectors(v[:, tile], bits[1], D, room))
    return out, lse, exact
