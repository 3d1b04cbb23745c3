"""`window_mass` on a CPU, from the log-sum-exp of each query: one product of matrices and one exp in tiles that stay in
the processor's cache.

    mass[j] = sum_i exp(scale * q[i] . k[j] - lse[i])

The log-sum-exp rides along as one more channel of the queries, beside a channel of ones in the keys: what the product
gives is then ready for exp. Where the attention of the same queries has not told it, `causal_lse` does.
"""

from __future__ import annotations

import torch

from ._fused import fused

_QUERIES, _KEYS = 128, 1024  # of one tile: 512 KiB in fp32
FEW = 64  # queries up to which the reference is at least as fast


def causal_lse(q, k, scale):
    """Log-sum-exp fp32 [B, H, w] of each query over the keys that it sees."""
    return fused(q, k, k, scale, True, None, None, None, None, None)[1]


def fused_mass(q, k, scale, lse, squares):
    """Arguments as `window_mass` after its checks; lse fp32 [B, H, w]."""
    B, H, w, _ = q.shape
    G, n = k.shape[1:3]
    q = torch.cat([q.float() * scale, -lse[..., None]], -1)
    k = torch.cat([k.float(), k.new_ones((), dtype=torch.float32).expand(B, G, n, 1)], -1)
    sums = q.new_zeros((2 if squares else 1, B, H, n))
    for b in range(B):
        for h in range(H):
            _add_head(sums[:, b, h], q[b, h], k[b, h // (H // G)].T)
    return (sums[0], sums[1]) if squares else sums[0]


def _add_head(sums, q, keys):
    """Adds to sums [1 or 2, n] what queries [w, D] of the last w of n keys [D, n] give each of them."""
    w, n = q.shape[0], keys.shape[1]
    for first in range(0, n, _KEYS):
        tile = slice(first, first + _KEYS)
        of_tile = keys[:, tile]
        for low in range(max(0, first - (n - w)), w, _QUERIES):  # earlier queries see none of these keys
            p = (q[low : low + _QUERIES] @ of_tile).exp_()
            if n - w + low < first + _KEYS - 1:
                p.tril_(n - w + low - first)
            sums[0, tile] += p.sum(0)
            if len(sums) > 1:
                sums[1, tile] += p.square_().sum(0)
