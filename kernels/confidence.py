"""What a sampler asks of a row of logits, in one pass over the vocabulary instead of a softmax and a sort.

    lse = log sum_j exp(z_j),   p_j = exp(z_j - lse),   token = argmax_j z_j (the lowest id of equals),
    probability = p_token,   second = max of p_j over j != token,   entropy = -sum_j p_j log p_j

Everything is fp32 whatever the logits are: in bf16 the confidences of a canvas tie by the hundred, and the order of
unmasking would depend on the device. Suppressed ids (the mask token) count as -inf and are never the token.

Floor in bytes: the logits are read once, V * itemsize per row, 24 bytes written. Long rows are cut in pieces, so that
a few rows fill a GPU; a second, tiny kernel folds the pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._backend import FLOATS, check_tensor, dense_rows, jit, split_length, tl, triton, use_triton

_BLOCK = 4096
_WORDS = 128  # of a piece of a row in which the plain path looks for the largest, where the row has many of them
_HELD = 2**18  # numbers that the plain path writes at a time


class Confidence(NamedTuple):
    """Per row of logits: `token` int64, the others float32, all of shape [n] (natural logarithms).

    `second` and `entropy` may be left out, see `confidence`.
    """

    token: torch.Tensor
    probability: torch.Tensor
    second: torch.Tensor | None
    entropy: torch.Tensor | None
    lse: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """probability - second, fp32 [n]."""
        return self.probability - self.second


def reference(logits, suppress=None, spread=True):
    """Plain torch, fp32: the truth, and the path off CUDA. Arguments as `confidence`."""
    z = logits.float()
    if suppress is not None and z.numel() <= _HELD:
        # Of a few numbers a copy costs less than the operations that avoid it.
        z = z.index_fill(1, suppress, -torch.inf)
    top, token = _largest(z)
    if z.numel() <= _HELD and not spread and -torch.inf not in top.tolist():
        probability = z.softmax(1).amax(1)
        return Confidence(token, probability, None, None, top - probability.log())
    if suppress is not None and not set(suppress.tolist()).isdisjoint(token.tolist()):
        # Seldom: only then is a copy of all logits worth its two passes.
        z = z.index_fill(1, suppress, -torch.inf)
        top, token = _largest(z)
    nothing = -torch.inf in top.tolist()
    if not spread and not nothing:
        return _probability(z, top, token, suppress)
    empty = top == -torch.inf
    if nothing and suppress is not None:
        # of nothing but -inf the first may be a suppressed one
        token = torch.where(empty, _first_free(suppress, z.shape[1]), token)
    away = z - top.masked_fill(empty, 0)[:, None]  # large logits lose their digits in lse, not here
    if suppress is not None:
        away.index_fill_(1, suppress, -torch.inf)
    mass = away.exp()
    total = mass.sum(1)
    probability, log_total = total.reciprocal().masked_fill(empty, 0), total.log()
    second = entropy = None
    if spread:
        log_total_or_0 = log_total.masked_fill(empty, 0)
        # -sum p log p with log p = away - log_total, and 0 log 0 = 0
        moment = (mass * away.masked_fill(away == -torch.inf, 0)).sum(1)
        entropy = (log_total_or_0 - moment * probability).masked_fill(empty, 0)
        second = mass.scatter(1, token[:, None], 0).amax(1) * probability
    return Confidence(token, probability, second, entropy, top + log_total)


def _probability(z, top, token, suppress):
    """What `reference` gives without the spread, where no row is of -inf alone; `top` [n] is the logit of `token`."""
    wanted = token[:, None]
    if suppress is not None:
        wanted = torch.cat([wanted, suppress.expand(len(z), -1)], 1)
    # softmax takes the exponents and their sum in one pass, which are three in operations of their own. A few rows at a
    # time: what it writes stays in the processor's cache, and no fresh memory is asked for.
    rows = max(1, _HELD // z.shape[1])
    mass = [part.softmax(1).gather(1, at) for part, at in zip(z.split(rows), wanted.split(rows), strict=True)]
    mass = mass[0] if len(mass) == 1 else torch.cat(mass)
    # No suppressed id has more than the token, so nothing of size is lost in the difference.
    probability = mass[:, 0] if suppress is None else mass[:, 0] / (1 - mass[:, 1:].sum(1))
    return Confidence(token, probability, None, None, top - probability.log())


def _largest(z):
    """Each row's largest of z [n, V] and its index, of equals the first."""
    n, words = z.shape
    if words < 8 * _WORDS or z.is_cuda:
        return z.max(1)
    # Many values in a row are compared at once, with their indices they are not: so first the piece, then the place.
    whole = words // _WORDS * _WORDS
    tops = z[:, :whole].unflatten(1, (-1, _WORDS)).amax(2)
    if whole < words:
        tops = torch.cat([tops, z[:, whole:].amax(1, keepdim=True)], 1)
    piece = tops.max(1).indices
    # Behind the row's end its last value again, which is no new first of equals.
    place = (piece[:, None] * _WORDS + torch.arange(_WORDS, device=z.device)).clamp(max=words - 1)
    top, column = z.gather(1, place).max(1)
    return top, place.gather(1, column[:, None])[:, 0]


def _first_free(suppress, words):
    """The lowest id that is not suppressed, int64 without dimensions."""
    free = torch.ones(min(words, len(suppress) + 1), dtype=torch.bool, device=suppress.device)
    low = suppress[suppress < len(free)]
    return free.index_fill(0, low, False).byte().argmax()


@jit  # V and the piece's length stay specialised: where they divide by 16, whole vectors are loaded
def _scan_kernel(
    p_z, p_suppress, p_part, p_token, s_zn, V, split,
    SUPPRESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of one row -> its token, largest and second logit, sum of exp(a) and of exp(a) a, a = z - top."""
    row, piece, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    p_z += row * s_zn
    nothing = float("-inf")
    top = tl.full([1], nothing, tl.float32)
    second = tl.full([1], nothing, tl.float32)
    token = tl.full([1], 2147483647, tl.int32)
    total = tl.zeros([1], tl.float32)
    moment = tl.zeros([1], tl.float32)
    for low in range(piece * split, tl.minimum((piece + 1) * split, V), BLOCK):
        j = low + tl.arange(0, BLOCK)
        seen = (j < V) & (j < (piece + 1) * split)
        z = tl.load(p_z + j, mask=seen, other=nothing).to(tl.float32)
        for i in tl.static_range(SUPPRESS):
            seen = seen & (j != tl.load(p_suppress + i))
        z = tl.where(seen, z, nothing)
        here = tl.max(z, 0)
        first = tl.min(tl.where(seen & (z == here), j, 2147483647), 0)
        beside = tl.max(tl.where(j == first, nothing, z), 0)
        token = tl.where(here > top, first, tl.where(here == top, tl.minimum(first, token), token))
        second = tl.maximum(tl.maximum(second, beside), tl.minimum(here, top))
        higher = tl.maximum(top, here)
        safe = tl.where(higher == nothing, 0.0, higher)
        shift = tl.where(top == nothing, 0.0, top - safe)
        moment = (moment + shift * total) * tl.exp(shift)
        total *= tl.exp(shift)
        away = tl.where(z == nothing, 0.0, z - safe)
        p = tl.where(z == nothing, 0.0, tl.exp(z - safe))
        total += tl.sum(p, 0)
        moment += tl.sum(p * away, 0)
        top = higher
    one = tl.arange(0, 1)
    o_part = (row * splits + piece) * 4
    tl.store(p_part + o_part + one, top)
    tl.store(p_part + o_part + 1 + one, second)
    tl.store(p_part + o_part + 2 + one, total)
    tl.store(p_part + o_part + 3 + one, moment)
    tl.store(p_token + row * splits + piece + one, token)


@jit(do_not_specialize=["V", "splits"])
def _fold_kernel(p_part, p_piece, p_token, p_out, V, splits, BLOCK: tl.constexpr):
    """The pieces of one row -> token, and (probability, second, entropy, lse) as rows of p_out [4, n]."""
    row, n = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    inside = i < splits
    nothing = float("-inf")
    o_part = (row * splits + i) * 4
    tops = tl.load(p_part + o_part, mask=inside, other=nothing)
    seconds = tl.load(p_part + o_part + 1, mask=inside, other=nothing)
    totals = tl.load(p_part + o_part + 2, mask=inside, other=0.0)
    moments = tl.load(p_part + o_part + 3, mask=inside, other=0.0)
    tokens = tl.load(p_piece + row * splits + i, mask=inside, other=2147483647)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, tokens, 2147483647), 0)
    # of the winning piece the second, of the others the first
    second = tl.max(tl.where(tokens == token, seconds, tops), 0)
    safe = tl.where(top == nothing, 0.0, top)
    shift = tl.where(tops == nothing, 0.0, tops - safe)
    weight = tl.exp(shift)
    total = tl.sum(totals * weight, 0)
    mean = tl.sum((moments + shift * totals) * weight, 0) / tl.where(total == 0.0, 1.0, total)
    log_total = tl.log(tl.where(total == 0.0, 1.0, total))
    empty = top == nothing
    tl.store(p_token + row, tl.minimum(token, V - 1).to(tl.int64))
    tl.store(p_out + row, tl.where(empty, 0.0, tl.exp(-log_total)))
    tl.store(p_out + n + row, tl.where(second == nothing, 0.0, tl.exp(second - safe - log_total)))
    tl.store(p_out + 2 * n + row, log_total - mean)
    tl.store(p_out + 3 * n + row, tl.where(empty, nothing, top + log_total))


def _launch(logits, suppress=None, split=None):
    """`split` (ids of one piece) is chosen here unless a test names it."""
    n, V = logits.shape
    logits = dense_rows(logits)
    split = split or triton.cdiv(split_length(V, n, logits), _BLOCK) * _BLOCK
    splits = triton.cdiv(V, split)
    part = logits.new_empty((n, splits, 4), dtype=torch.float32)
    piece = logits.new_empty((n, splits), dtype=torch.int32)
    token = logits.new_empty(n, dtype=torch.int64)
    out = logits.new_empty((4, n), dtype=torch.float32)
    hidden = 0 if suppress is None else len(suppress)
    _scan_kernel[(n, splits)](
        logits, suppress if hidden else None, part, piece, logits.stride(0), V, split,
        SUPPRESS=hidden, BLOCK=min(_BLOCK, triton.next_power_of_2(split)), num_warps=8,
    )  # fmt: skip
    _fold_kernel[(n,)](part, piece, token, out, V, splits, BLOCK=triton.next_power_of_2(splits), num_warps=1)
    return Confidence(token, *out)


def confidence(
    logits: torch.Tensor, *, suppress: torch.Tensor | None = None, spread: bool = True, _backend: str | None = None
) -> Confidence:
    """The likeliest token of each row of logits, and how sure the row is of it.

    Args:
        logits: [n, V] with V >= 1, float16, bfloat16 or float32. -inf is allowed, +inf and NaN are not. Not changed.
        suppress: int64 [s], ids in [0, V) that count as -inf, a handful; not all of the vocabulary.
        spread: whether `second` and `entropy` are wanted. Off CUDA they take passes of their own, and are None without;
            the kernel has them from its one pass in any case.

    Returns:
        Confidence of [n] each. A row of nothing but -inf has its lowest id that is not suppressed, probability and
        entropy 0, lse -inf.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or V is 0.
    """
    check_tensor("logits", logits, ("n", "V"), FLOATS)
    if not logits.shape[1]:
        raise ValueError(f"logits has shape {list(logits.shape)}; V must be at least 1")
    if suppress is not None:
        check_tensor("suppress", suppress, ("s",), (torch.int64,), logits)
    if use_triton(logits, _backend) and len(logits):
        return _launch(logits, suppress)
    return reference(logits, suppress, spread)
