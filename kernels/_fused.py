"""`decode_attention` on a CPU by torch's own fused attention, which also tells the log-sum-exp.

The operator is the one behind `torch.nn.functional.scaled_dot_product_attention` on a CPU: tiles of keys, sums in fp32.
What it lacks is made here. Its causality counts from the first key, so queries at the end of a longer row attend twice:
to what was there before them, and to themselves. A row that a mask empties has lse 0. Heads of a group each walk all
keys: where no query is told apart by its place, the group is folded into the queries, and keys are read once.
"""

from __future__ import annotations

import torch

from .merge import joined

_ATTEND = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
if _ATTEND is not None:
    _ATTEND = _ATTEND.default  # spares a choice of overloads at each call
_FOLD = 64  # query rows of a kv head up to which folding wins: beyond, its copies of queries and outputs cost more
_QUERIES = 512  # queries that attend in a window at a time
_FINITE = 1e18  # products of numbers below it stay in the range of fp32


def fused_applies(q, k, v, softcap, backend):
    """Whether the fused path shall run, by plain comparisons; ValueError where a test asks for it in vain."""
    if backend is not None and backend != "fused":
        return False
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    applies = q.is_cpu and softcap is None and not graded and _ATTEND is not None
    if backend == "fused" and not applies:
        raise ValueError(
            f"_backend='fused' needs a CPU (q is on {q.device}), softcap=None (it is {softcap}), no gradient and "
            "torch's fused attention; use None, which falls back to the reference"
        )
    return applies


def fused(q, k, v, scale, causal, valid, start, length, window, visible):
    """Arguments as `decode_attention` after its checks: `valid` is [B, G, n]."""
    B, H, m, D = q.shape
    k, v = _dense(k), _dense(v)
    if start is None:
        return _segment(_dense(q), k, v, scale, causal, valid, window, visible)
    runs = start.numel()
    rows = _dense(q).reshape(runs, 1, B * H // runs, m, D)
    reach = k.shape[0] if window is None else window + m - 1  # tokens that any query of a region sees, at most
    parts = []
    for r, (s, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        region = (None, None, slice(s + max(0, n - reach), s + n))
        parts.append(_segment(rows[r], k[region], v[region], scale, causal, None, window, None))
    if len(parts) == 1:
        return parts[0][0].view(B, H, m, D), parts[0][1].view(B, H, m)
    return (
        torch.stack([out for out, _ in parts]).view(B, H, m, D),
        torch.stack([lse for _, lse in parts]).view(B, H, m),
    )  # fmt: skip


def _dense(x):
    """`x` with neighbouring channels, which is all that the operator needs of its strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _segment(q, k, v, scale, causal, valid, window, visible):
    """Dense q [B, H, m, D] against k, v [B, G, n, D] -> out, lse [B, H, m]."""
    m, n = q.shape[2], k.shape[2]
    if not m or not n or not q.shape[0]:
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if valid is not None:
        k, v, valid = _without_nan(k, v, valid)
    if window is not None and window >= n:
        window = None
    if valid is None and visible is None and window is None:
        if not causal or m == 1:
            return _whole(q, k, v, scale)
        if m <= n:
            return _causal(q, k, v, scale)
    if m <= _QUERIES:
        return _masked(q, k, v, scale, _seen(q, k, causal, window, valid, visible))
    parts = []
    for low in range(0, m, _QUERIES):  # a mask of all queries would be as large as the scores
        high = min(low + _QUERIES, m)
        end = max(0, n - m + high) if causal else n
        first = 0 if window is None else max(0, end - (high - low) - window + 1)
        keys = slice(first, end)
        parts.append(
            _segment(
                q[:, :, low:high], k[:, :, keys], v[:, :, keys], scale, causal,
                None if valid is None else valid[..., keys], window,
                None if visible is None else visible[:, low:high, keys],
            )
        )  # fmt: skip
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _whole(q, k, v, scale, mask=None):
    """No query is told apart by its place; mask [B or 1, G or 1, 1 or m, n] in q's dtype is added to the scores."""
    B, H, m, D = q.shape
    G = k.shape[1]
    group = H // G
    if group * m > _FOLD:
        if mask is not None and 1 < mask.shape[1] < H:
            mask = mask.repeat_interleave(group, 1)
        return _ATTEND(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:
        mask = (mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)).transpose(0, 1)
    # KV heads lead and batch rows come behind: what returns, query by query, is [B, H, m, D] without a copy
    if B == 1:
        q, k, v = q.reshape(G, 1, group * m, D), k.transpose(0, 1), v.transpose(0, 1)
        out, lse = _ATTEND(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out.view(1, H, m, D), lse.view(1, H, m)
    q, k, v = q.reshape(B, G, group * m, D).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    out, lse = _ATTEND(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out.transpose(0, 1).view(B, H, m, D), lse.transpose(0, 1).view(B, H, m)


def _causal(q, k, v, scale):
    """The m queries are the last of n tokens, 1 < m <= n."""
    old = k.shape[2] - q.shape[2]
    out, lse = _ATTEND(q, k[:, :, old:], v[:, :, old:], 0.0, True, scale=scale)
    if not old:
        return out, lse
    before, before_lse = _whole(q, k[:, :, :old], v[:, :, :old], scale)
    return joined(before, out, before_lse, lse)


def _masked(q, k, v, scale, seen):
    """seen bool [B or 1, G or 1, 1 or m, n]."""
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    out, lse = _whole(q, k, v, scale, mask)
    nothing = ~seen.any(-1)[:, :, None]  # the operator says 0 of these
    lse = lse.unflatten(1, (k.shape[1], -1)).masked_fill(nothing, -torch.inf)
    return out, lse.flatten(1, 2)


def _seen(q, k, causal, window, valid, visible):
    """Which query sees which slot: bool [B or 1, G or 1, 1 or m, n]."""
    m, n = q.shape[2], k.shape[2]
    seen = None
    if causal and m > 1:
        seen = torch.ones(1, 1, m, n, dtype=torch.bool).tril_(n - m)
        seen = seen if window is None else seen.triu_(n - m - window + 1)
    for more in (None if valid is None else valid[:, :, None], None if visible is None else visible[:, None]):
        if more is not None:
            seen = more if seen is None else seen & more
    return seen


def _without_nan(k, v, valid):
    """k and v free of what neither a score of -inf nor a weight of 0 passes over, copied only where there is such.

    valid comes back as [B, 1, n] where heads share it, and as None where every slot is valid.
    """
    if valid.stride(1) == 0:
        valid = valid[:, :1]
    hidden = ~valid
    if not bool(hidden.any()):
        return k, v, None
    return _harmless(k, hidden), _harmless(v, hidden), valid


def _harmless(x, hidden):
    """x [B, G, n, D], its slots `hidden` bool [B, G or 1, n] filled with 0 if one holds NaN, inf or the like."""
    rows = x[hidden] if hidden.shape[1] == x.shape[1] else x.transpose(1, 2)[hidden[:, 0]]
    return x if float(rows.abs().amax()) < _FINITE else x.masked_fill(hidden[..., None], 0)
