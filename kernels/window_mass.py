"""How much attention each key receives from the last w queries, without ever holding the w x n matrix.

    P[b,h,i,j] = softmax_j(scale * q[b,h,i] . k[b,g,j]) over j <= n - w + i and valid,   mass[b,h,j] = sum_i P[b,h,i,j]

`squares` adds sum_i P^2, from which a caller gets the variance over the queries. With w = n this is the accumulated
attention of H2O and D2O, and costs as much arithmetic as the prefill attention itself.

A learned sink (gpt-oss) is one more entry of each query's softmax: it takes its share of P and is no key.

Floor in bytes: K is read twice (once per pass), q once, [B, H, n] fp32 written once; for w in the tens the bound is
arithmetic, 4 * w * H * n * D operations. Nothing is repeated per query head.
"""

from __future__ import annotations

import torch

from ._backend import (
    FLOATS,
    LOG2_E,
    check_groups,
    check_head_dim,
    check_softcap,
    check_tensor,
    check_valid,
    dense_rows,
    dot_dtype,
    jit,
    split_length,
    tl,
    triton,
    use_triton,
)
from ._fused import fused_applies
from ._fused_mass import FEW, causal_lse, fused_mass
from ._tiles import scaled, softmax_step

_BLOCK_ELEMENTS = 1 << 24  # fp32 probabilities that the reference holds at a time


def reference(q, k, *, scale, valid=None, squares=False, softcap=None, sinks=None):
    """Plain torch in blocks of query rows, fp32: the truth, and the path off CUDA. `valid` is [B, G, n] or None."""
    B, H, w, D = q.shape
    G, n = k.shape[1:3]
    q, keys = q.reshape(B, G, H // G, w, D), k.float().mT
    sums = q.new_zeros((2 if squares else 1, B, G, H // G, n), dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().view(G, H // G, 1, 1)
    rows = max(1, _BLOCK_ELEMENTS // max(1, B * H * n))
    for low in range(0, w, rows):
        high = min(low + rows, w)
        end = n - w + high  # no query of this block sees further
        some = None if valid is None else valid[..., :end]
        p = _probabilities(q[..., low:high, :], keys[..., :end], scale, some, softcap, sinks)
        sums[0, ..., :end] += p.sum(-2)
        if squares:
            sums[1, ..., :end] += p.square_().sum(-2)
    sums = sums.view(-1, B, H, n)
    return (sums[0], sums[1]) if squares else sums[0]


def _probabilities(q, keys, scale, valid, softcap, sinks):
    """q [B, G, group, r, D] are the queries of the last r of `end` keys [B, G, D, end] -> P [B, G, group, r, end]."""
    r, end = q.shape[-2], keys.shape[-1]
    scores = (q.flatten(2, 3).float() * scale @ keys).unflatten(2, q.shape[2:4])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    last = torch.arange(end - r, end, device=q.device)
    unseen = torch.arange(end, device=q.device) > last[:, None]
    if valid is not None:  # a padding query sees nothing, a padding key is seen by none
        unseen = unseen | ~valid[:, :, None, :] | ~valid[:, :, end - r :, None]
        unseen = unseen[:, :, None]
    scores.masked_fill_(unseen, -torch.inf)
    lse = _beside_sinks(torch.logsumexp(scores, dim=-1, keepdim=True), sinks)
    return scores.sub_(lse.masked_fill_(lse == -torch.inf, 0)).exp_()


def _beside_sinks(lse, sinks):
    """Log-sum-exp of keys and sink together; a query that sees no key (-inf) still sees nothing. `sinks` broadcasts."""
    if sinks is None:
        return lse
    return torch.logaddexp(lse, sinks.expand_as(lse)).masked_fill_(lse == -torch.inf, -torch.inf)


@jit(do_not_specialize=["n", "w", "split", "splits"])
def _lse_kernel(
    p_q, p_k, p_valid, p_lse, s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_mb, s_mg, s_mn,
    n, w, split, splits, groups, scale_log2, cap_log2,
    GROUP: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First pass: one block of the w * GROUP query rows over one split of the keys -> p_lse [splits, B, H, w]."""
    row, piece, block = tl.program_id(0) // splits, tl.program_id(0) % splits, tl.program_id(1)
    b, g = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    p_k += b * s_kb + g * s_kg
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i, h = packed // GROUP, packed % GROUP
    d = tl.arange(0, BLOCK_D)
    alive = i < w
    if MASKED:
        p_valid += b * s_mb + g * s_mg
        alive = alive & (tl.load(p_valid + (n - w + i).to(tl.int64) * s_mn, mask=alive, other=0) != 0)
    o_q = b * s_qb + (g * GROUP + h) * s_qh + i.to(tl.int64) * s_qm
    q = tl.load(p_q + o_q[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0).to(DOT)

    end = tl.minimum((piece + 1) * split, n - w + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    end = tl.minimum(end, n)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for low in range(piece * split, end, BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)
        seen = j < end
        if MASKED:
            seen = seen & (tl.load(p_valid + j.to(tl.int64) * s_mn, mask=seen, other=0) != 0)
        k = tl.load(p_k + j.to(tl.int64)[:, None] * s_kn + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        products = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")
        scores = scaled(products, scale_log2, cap_log2, CAPPED)
        visible = seen[None, :] & alive[:, None] & (j[None, :] <= (n - w + i)[:, None])
        _, _, top, total = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
    rows = tl.num_programs(0) // splits
    o_lse = (piece * rows + row).to(tl.int64) * (GROUP * w) + h * w + i
    tl.store(p_lse + o_lse, (top + tl.log2(total)) * 0.6931471805599453, mask=i < w)


@jit(do_not_specialize=["n", "w"])
def _mass_kernel(
    p_q, p_k, p_valid, p_lse, p_mass, p_squares, s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_mb, s_mg, s_mn,
    n, w, groups, scale_log2, cap_log2,
    GROUP: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SQUARES: tl.constexpr, CAPPED: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Second pass: a block of keys, loaded once, against all queries of its group. It owns its columns: no atomics."""
    row, block = tl.program_id(0), tl.program_id(1)
    b, g = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seen = j < n
    if MASKED:
        p_valid += b * s_mb + g * s_mg
        seen = seen & (tl.load(p_valid + j.to(tl.int64) * s_mn, mask=seen, other=0) != 0)
    o_k = b * s_kb + g * s_kg + j.to(tl.int64) * s_kn
    k = tl.load(p_k + o_k[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    first = tl.maximum(block * BLOCK_N - (n - w), 0)  # earlier queries see none of these keys
    for h in range(GROUP):
        mass = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        p_head = p_q + b * s_qb + (g * GROUP + h) * s_qh
        for low in range(first, w, BLOCK_M):
            i = low + tl.arange(0, BLOCK_M)
            lse = tl.load(p_lse + (row.to(tl.int64) * GROUP + h) * w + i, mask=i < w, other=float("-inf"))
            alive = lse != float("-inf")  # a padding query, or one that sees nothing: not read, no mass
            m_q = alive[:, None] & (d < D)[None, :]
            q = tl.load(p_head + i.to(tl.int64)[:, None] * s_qm + d[None, :], mask=m_q, other=0.0)
            products = tl.dot(k, tl.trans(q.to(DOT)), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            scores = scaled(products, scale_log2, cap_log2, CAPPED)
            visible = seen[:, None] & alive[None, :] & (j[:, None] <= (n - w + i)[None, :])
            p = tl.where(visible, tl.exp2(scores - tl.where(alive, lse, 0.0)[None, :] * 1.4426950408889634), 0.0)
            mass += tl.sum(p, 1)
            if SQUARES:
                squares += tl.sum(p * p, 1)
        o_mass = (row.to(tl.int64) * GROUP + h) * n + j
        tl.store(p_mass + o_mass, mass, mask=j < n)
        if SQUARES:
            tl.store(p_squares + o_mass, squares, mask=j < n)


def _launch(q, k, *, scale, valid, squares, softcap=None, lse=None, sinks=None, split=None):
    """Run both passes, the second alone if lse is known; `split` (keys of one program of the first) is chosen here
    unless a test names it."""
    B, H, w, D = q.shape
    G, n = k.shape[1:3]
    q, k = dense_rows(q), dense_rows(k)
    block_d = triton.next_power_of_2(max(16, D))
    row = block_d * k.element_size()  # bytes
    block_n, most = max(16, min(64, 16384 // row)), max(16, min(64, 32768 // row))
    block_m = min(most, max(16, triton.next_power_of_2(H // G * w)))
    blocks = triton.cdiv(H // G * w, block_m)
    split = split or split_length(n, B * G * blocks, q)
    splits = max(1, triton.cdiv(n, split))
    common = (*q.stride()[:3], *k.stride()[:3], *((0, 0, 0) if valid is None else valid.stride()))
    flags = {"GROUP": H // G, "D": D, "MASKED": valid is not None, "DOT": dot_dtype(q), "CAPPED": softcap is not None}
    flags |= {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2 if row * block_n <= 16384 else 1}
    valid = None if valid is None else valid.view(torch.uint8)
    scales = float(scale) * LOG2_E, float(softcap or 0) * LOG2_E
    if lse is None:
        lse = q.new_empty((splits, B, H, w), dtype=torch.float32)
        _lse_kernel[(B * G * splits, blocks)](
            q, k, valid, lse, *common, n, w, split, splits, G, *scales, **flags, BLOCK_M=block_m
        )
        lse = lse[0] if splits == 1 else lse.logsumexp(0)
    lse = _beside_sinks(lse, None if sinks is None else sinks.float()[:, None]).contiguous()
    mass = q.new_empty((B, H, n), dtype=torch.float32)
    second = torch.empty_like(mass) if squares else None
    _mass_kernel[(B * G, triton.cdiv(n, block_n))](
        q, k, valid, lse, mass, second, *common, n, w, G, *scales, **flags, SQUARES=squares,
        BLOCK_M=min(most, max(16, triton.next_power_of_2(w))),
    )  # fmt: skip
    return (mass, second) if squares else mass


def window_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    valid: torch.Tensor | None = None,
    squares: bool = False,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    _backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sum the causal attention of a window of queries over each key; return `mass`, or `(mass, squares)`.

    Args:
        q: post-RoPE queries [B, H, w, D] of the LAST w tokens of the n keys, float16, bfloat16 or float32.
        k: post-RoPE keys [B, G, n, D] of the same dtype, w <= n.
        scale: factor on q . k, usually D ** -0.5.
        valid: bool [B, n] or [B, G, n]; a False slot is neither seen nor does its query count. It may hold NaN.
        squares: also return the sums of squared probabilities.
        softcap: scaled scores s become softcap * tanh(s / softcap) before the softmax, as Gemma 2 does; None leaves
            them.
        lse: fp32 [B, H, w], what causal `decode_attention` of these queries over these keys told, if it is at hand:
            then the scores need not be made twice. Only without `valid`.
        sinks: [H] of any float dtype, a logit of each head that takes part in the softmax of every query; None = none.

    Returns:
        mass [B, H, n] in float32 over ALL n keys, the window included; its sum over n is the number of valid queries,
        less what their sinks took.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, w > n, softcap is not positive, or lse comes
            with valid.
    """
    check_tensor("q", q, ("B", "H", "w", "D"), FLOATS)
    check_head_dim("q", q)
    B, H, w, D = q.shape
    check_tensor("k", k, (B, "G", "n", D), (q.dtype,), q)
    G, n = k.shape[1:3]
    check_groups(H, G)
    if w > n:
        raise ValueError(f"q has shape {list(q.shape)}, a window of {w} queries; the limit is n = {n}, the keys of k")
    check_softcap(softcap)
    valid = check_valid(valid, B, G, n, q)
    if lse is not None:
        check_tensor("lse", lse, (B, H, w), (torch.float32,), q)
        if valid is not None:
            raise ValueError("lse and valid come together: what attention tells counts all keys; give one of them")
    if sinks is not None:
        check_tensor("sinks", sinks, (H,), FLOATS, q)
    if valid is None and q.numel() and (lse is not None or w > FEW) and fused_applies(q, k, k, softcap, _backend):
        lse = causal_lse(q, k, scale) if lse is None else lse
        return fused_mass(q, k, scale, _beside_sinks(lse, None if sinks is None else sinks.float()[:, None]), squares)
    how = {"scale": scale, "valid": valid, "squares": squares, "softcap": softcap, "sinks": sinks}
    if use_triton(q, _backend) and q.numel():
        return _launch(q, k, lse=lse, **how)
    return reference(q, k, **how)
