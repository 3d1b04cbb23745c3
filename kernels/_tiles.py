"""Device functions that more than one kernel is made of."""

from __future__ import annotations

from ._backend import jit, tl


@jit
def scaled(products, scale_log2, cap_log2, CAPPED: tl.constexpr):
    """Products q . k as base-2 scores: scaled, and if CAPPED bent by cap * tanh(score / cap).

    tanh x = 1 - 2 / (exp 2x + 1) needs no library and ends at -1 and 1 where exp leaves the range of fp32.
    """
    scores = products * scale_log2
    if CAPPED:
        scores = cap_log2 - 2.0 * cap_log2 / (tl.exp2(scores * (2.8853900817779268 / cap_log2)) + 1.0)
    return scores


@jit
def softmax_step(scores, top, total):
    """Take a tile of base-2 scores [M, N] into the running softmax: its weights, the decay of the past, top, total.

    -inf scores weigh nothing, and a row of nothing but -inf stays at top -inf, total 0 without a NaN.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(top - safe)
    return p, decay, higher, total * decay + tl.sum(p, 1)
