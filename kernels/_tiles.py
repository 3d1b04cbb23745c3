"""Device functions that more than one kernel is made of."""

from __future__ import annotations

from kernels._backend import jit, tl


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
