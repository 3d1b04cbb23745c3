"""Attention of a few queries over rows of `kernels.codebook`, read as codes: nothing is ever turned back but the query.

    s[b,h,i,j] = scale * (q[b,h,i] R_k . c_k[j] s_k[j] + q[b,h,i] . centre),   p = softmax_j(s)
    out[b,h,i] = (sum_j p[j] s_v[j] c_v[j]) R_v^T,                             lse[b,h,i] = log sum_j exp(s)

A rotation keeps products, so the query is turned once instead of every key; and it is linear, so the weighted sum of
values is turned back once instead of every value. The scales go to scores and weights, one number a token. What remains
for a token is a look-up of its centroids and two dot products.

A centre that was subtracted from keys comes back as in `kernels.packed_attention`: the same number for all scores of a
query, or cosines and sines where it turns with the position. Keys that are marked were coded without it.

Plain torch on every device, in tiles of tokens and queries, fp32 throughout.
"""

from __future__ import annotations

import torch

from ._backend import FLOATS, check_head_dim, check_softcap, check_tensor
from ._rotary_centre import check_turn, turned_scores
from .codebook import decode, row_bytes, turn, turn_back
from .merge import merge

_NUMBERS = 2**19  # centroids that are looked up at a time: 2 MB stay in a processor's cache
_QUERIES = 512  # query rows of a run that attend at a time


def coded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bits: tuple[int, int],
    signs: torch.Tensor,
    scale: float,
    centre: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to coded tokens, all of which lie before the queries; return `(out, lse)`.

    Args:
        q: [B, H, m, D], float16, bfloat16 or float32; query head h reads kv head h // (H / G).
        k: uint8 [B, G, n, bytes], rows of `encode`.
        v: as k.
        bits: of the codes of keys and of values.
        signs: [2, D], those of keys and of values.
        scale: factor on q . k, usually D ** -0.5.
        centre: fp32 [B, G, D], what was subtracted from all unmarked keys before they were coded, or None.
        inv_freq: fp32 [B, G, R / 2]: the centre had been turned for each key, see `packed_attention`.
        positions: int32 [B, G or 1, n] of the tokens; with inv_freq.
        softcap: scaled scores s become softcap * tanh(s / softcap).
        valid: bool [B, G or 1, n]; a token that is False is never seen, and its rows may hold anything.

    Returns:
        out [B, H, m, D] in q's dtype and lse [B, H, m] in fp32; 0 and -inf where a query sees no token.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    _check(q, k, v, bits, signs, valid)
    check_softcap(softcap)
    B, H, m, D = q.shape
    G, n = k.shape[1:3]
    rows = q.reshape(B * G, H // G * m, D).float() * scale
    valid = None if valid is None else valid.expand(B, G, n).reshape(B * G, 1, n)
    turned = None
    if inv_freq is not None:
        centre, inv_freq = centre.flatten(0, 1), inv_freq.flatten(0, 1)
        turned = centre, inv_freq, check_turn(q, centre, inv_freq, positions, None, n), None
    elif centre is not None:
        centre = centre.flatten(0, 1)
    parts = [
        _attend(some, k.flatten(0, 1), v.flatten(0, 1), bits, signs, centre, turned, softcap, valid)
        for some in rows.split(_QUERIES, 1)
    ]
    out, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return turn_back(out, signs[1]).to(q.dtype).view(B, H, m, D), lse.view(B, H, m)


def _attend(q, k, v, bits, signs, centre, turned, softcap, valid):
    """q fp32 [runs, x, D], scaled; rows [runs, n, bytes] -> out fp32 [runs, x, D], still turned, and lse [runs, x]."""
    runs, n, D = *k.shape[:2], q.shape[-1]
    query, shift = turn(q, signs[0]), 0.0  # the shift is what dims of the centre that do not turn add to all scores
    if centre is not None:
        still = 0 if turned is None else 2 * turned[1].shape[1]
        shift = q[..., still:] @ centre[:, still:, None]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    step = max(16, _NUMBERS // (runs * D))
    for low in range(0, n, step):
        tile = slice(low, min(low + step, n))
        seen = None if valid is None else valid[..., tile]
        c, size = decode(k[:, tile], bits[0], D)
        scores = query @ c.mT * _only(size[:, None], seen)
        if centre is not None:
            centres = shift if turned is None else shift + turned_scores(q, *turned, tile)
            scores += centres * ~size[:, None].signbit()
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        of_tile = scores.logsumexp(-1)
        weights = (scores - of_tile.masked_fill(of_tile == -torch.inf, 0)[..., None]).exp()
        c, size = decode(v[:, tile], bits[1], D)
        found = (weights * _only(size[:, None], seen)) @ c
        if low == 0:
            out, lse = found, of_tile
        else:
            out, lse = (x[0] for x in merge([out[None], found[None]], [lse[None], of_tile[None]]))
    return out, lse


def _only(size: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Scales [runs, 1, n] of the tokens that are seen, without marks; of others, which may hold NaN, 0."""
    size = size.abs()
    return size if seen is None else size.masked_fill(~seen, 0)


def _check(q, k, v, bits, signs, valid):
    """Raise ValueError on bad arguments."""
    check_tensor("q", q, ("B", "H", "m", "D"), FLOATS)
    check_head_dim("q", q)
    B, H, _, D = q.shape
    check_tensor("k", k, (B, "G", "n", row_bytes(bits[0], D)), (torch.uint8,), q)
    check_tensor("v", v, (*k.shape[:3], row_bytes(bits[1], D)), (torch.uint8,), q)
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"q has {H} heads and k has {k.shape[1]}; the first must be a multiple of the second")
    check_tensor("signs", signs, (2, D), (torch.int8, torch.float32), q)
    if valid is not None:
        check_tensor("valid", valid, (B, "G or 1", k.shape[2]), (torch.bool,), q)
