"""Attention of a few queries over one segment of the cache, dense or ragged, with the log-sum-exp of each query.

    s[b,h,i,j] = scale * q[b,h,i] . k[b,g,j],   g = h // (H / G)
    out[b,h,i] = sum_j softmax_j(s) v[b,g,j],   lse[b,h,i] = log sum_j exp(s)

The lse lets `kernels.merge` join several segments exactly. Dense segments are [B, G, n, D]; ragged ones keep a length
for every (batch, kv head), their rows lying one behind the other in flat [total, D] storage with slack between them.

Floor in bytes: every visible K and V row is read once, 2 * D * itemsize per token and kv head (bf16, D 128: 512 bytes),
whatever the number of query heads. Inference only: no gradient flows through the Triton path.
"""

from __future__ import annotations

import torch

from ._backend import (
    FLOATS,
    LOG2_E,
    MAX_HEAD_DIM,
    MIN_SPLIT,
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
from ._fused import fused, fused_applies
from ._tiles import scaled, softmax_step

_BLOCK_ELEMENTS = 1 << 24  # fp32 scores that the reference holds at a time


def reference(
    q, k, v, *, scale, causal=False, valid=None, start=None, length=None, softcap=None, window=None, visible=None
):
    """Plain torch, fp32 accumulation: the truth, and the path off CUDA where the fused one does not apply. `valid` is
    [B, G, n] or None."""
    B, H, m, D = q.shape
    if start is None:
        G = k.shape[1]
        if valid is not None:  # memory behind an invalid slot may hold NaN, and 0 * NaN is NaN
            v = v.masked_fill(~valid[..., None], 0)
        mask = None if valid is None else valid[:, :, None, None, :]
        if visible is not None:
            mask = visible[:, None, None] if mask is None else mask & visible[:, None, None]
        q, k, v = q.unflatten(1, (G, H // G)), k[:, :, None], v[:, :, None]
        out, lse = _attend(q, k, v, scale, causal, mask, softcap, window)
        return out.reshape(B, H, m, D), lse.reshape(B, H, m)
    rows = q.reshape(start.numel(), B * H // start.numel(), m, D)  # [B * G, group, m, D]
    parts = [
        _attend(rows[r], k[None, s : s + n], v[None, s : s + n], scale, causal, None, softcap, window)
        for r, (s, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True))
    ]
    out, lse = (torch.stack(part) for part in zip(*parts, strict=True))
    return out.reshape(B, H, m, D), lse.reshape(B, H, m)


def _attend(q, k, v, scale, causal, mask, softcap, window):
    """q [..., group, m, D], k and v [..., 1, n, D], mask bool [..., 1, 1 or m, n] -> out as q, lse [..., group, m]."""
    m, n = q.shape[-2], k.shape[-2]
    k, v = k.float(), v.float()
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    rows = max(1, _BLOCK_ELEMENTS // max(1, q.shape[:-2].numel() * n))
    for low in range(0, m, rows):
        high = min(low + rows, m)
        end = max(0, n - m + high) if causal else n  # no query of this block sees further
        scores = _times(q[..., low:high, :].float() * scale, k[..., :end, :].mT)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., low:high, :]
            scores.masked_fill_(~part[..., :end], -torch.inf)
        if causal:
            last = torch.arange(n - m + low, n - m + high, device=q.device)[:, None]
            stored = torch.arange(end, device=q.device)
            scores.masked_fill_(stored > last, -torch.inf)
            if window is not None:
                scores.masked_fill_(stored <= last - window, -torch.inf)
        part = torch.logsumexp(scores, dim=-1)
        # a query that sees nothing has lse -inf; subtracting 0 instead makes its weights exp(-inf) = 0 rather than NaN
        scores.sub_(part.masked_fill(part == -torch.inf, 0)[..., None]).exp_()
        out[..., low:high, :] = _times(scores, v[..., :end, :])
        lse[..., low:high] = part
    return out, lse


def _times(a, b):
    """a [..., group, m, x] @ b [..., 1, x, y] without repeating b: the group folds into the rows."""
    return (a.flatten(-3, -2) @ b.squeeze(-3)).unflatten(-2, a.shape[-3:-1])


@jit
def _tiles_of(p_length, rows, split, ROWS: tl.constexpr):
    """How many tiles each ragged row has."""
    r = tl.arange(0, ROWS)
    return r, (tl.load(p_length + r, mask=r < rows, other=0) + split - 1) // split


@jit
def _place(tile, p_start, p_length, n, rows, split, splits, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Where a tile lies: its row (`rows` for the surplus ones), first key, keys stored in the row, first flat row."""
    if RAGGED:
        r, tiles = _tiles_of(p_length, rows, split, ROWS)
        row = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (r < rows)).to(tl.int32), 0)
        begin = (tile - tl.sum(tl.where(r < row, tiles, 0), 0)) * split
        stored = tl.load(p_length + row, mask=row < rows, other=0)
        origin = tl.load(p_start + row, mask=row < rows, other=0)
    else:
        row = tile // splits
        begin = (tile % splits) * split
        stored = n
        origin = tile.to(tl.int64) * 0
    return row, begin, stored, origin


@jit(do_not_specialize=["n", "m", "split", "splits", "rows", "window"])
def _attend_kernel(
    p_q, p_k, p_v, p_valid, p_visible, p_start, p_length, p_out, p_lse,
    s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_vb, s_vg, s_vn, s_mb, s_mg, s_mn, s_wb, s_wm, s_wn,
    n, m, split, splits, rows, groups, window, scale_log2, cap_log2,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, VISIBLE: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys against one block of the m * GROUP query rows of its kv head -> p_out [tile, GROUP * m, D]."""
    tile, block = tl.program_id(0), tl.program_id(1)
    row, begin, stored, origin = _place(tile, p_start, p_length, n, rows, split, splits, ROWS, RAGGED)
    if row >= rows:
        return
    b, g = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    p_k += b * s_kb + g * s_kg + origin * s_kn
    p_v += b * s_vb + g * s_vg + origin * s_vn
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i, h = packed // GROUP, packed % GROUP  # neighbours are heads of one query, so that causality cuts whole tiles
    d = tl.arange(0, BLOCK_D)
    m_q = (i < m)[:, None] & (d < D)[None, :]
    o_q = b * s_qb + (g * GROUP + h) * s_qh + i.to(tl.int64) * s_qm
    q = tl.load(p_q + o_q[:, None] + d[None, :], mask=m_q, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_D]
    end = tl.minimum(begin + split, stored)
    if CAUSAL:
        end = tl.minimum(end, stored - m + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    if WINDOW:  # the first query of the block reaches furthest back
        begin = tl.maximum(begin, stored - m + block * BLOCK_M // GROUP - window + 1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for low in range(begin, end, BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)
        seen = j < end
        if MASKED:
            seen = seen & (tl.load(p_valid + b * s_mb + g * s_mg + j.to(tl.int64) * s_mn, mask=seen, other=0) != 0)
        m_kv = seen[:, None] & (d < D)[None, :]  # what is not seen is not even read: it may be NaN
        k = tl.load(p_k + j.to(tl.int64)[:, None] * s_kn + d[None, :], mask=m_kv, other=0.0).to(DOT)
        v = tl.load(p_v + j.to(tl.int64)[:, None] * s_vn + d[None, :], mask=m_kv, other=0.0).to(DOT)
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (j[None, :] <= (stored - m + i)[:, None])
        if WINDOW:
            visible = visible & (j[None, :] > (stored - m + i - window)[:, None])
        if VISIBLE:
            o_w = b * s_wb + i.to(tl.int64)[:, None] * s_wm + j.to(tl.int64)[None, :] * s_wn
            visible = visible & (tl.load(p_visible + o_w, mask=(i < m)[:, None] & seen[None, :], other=0) != 0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores = scaled(products, scale_log2, cap_log2, CAPPED)
        p, decay, top, total = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
        acc = acc * decay[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
    o_row = tile.to(tl.int64) * (GROUP * m) + h * m + i
    tl.store(p_out + o_row[:, None] * D + d[None, :], acc / tl.where(total == 0.0, 1.0, total)[:, None], mask=m_q)
    tl.store(p_lse + o_row, (top + tl.log2(total)) * 0.6931471805599453, mask=i < m)


@jit(do_not_specialize=["m", "split", "splits", "rows"])
def _merge_kernel(
    p_part, p_part_lse, p_length, p_out, p_lse, m, split, splits, rows,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the tiles of one (batch, kv head) for one query row."""
    row, query = tl.program_id(0), tl.program_id(1)
    if RAGGED:
        r, every = _tiles_of(p_length, rows, split, ROWS)
        first, tiles = tl.sum(tl.where(r < row, every, 0), 0), tl.sum(tl.where(r == row, every, 0), 0)
    else:
        first, tiles = row * splits, splits
    d = tl.arange(0, BLOCK_D)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for low in range(0, tiles, BLOCK_T):
        t = low + tl.arange(0, BLOCK_T)
        o_part = (first + t).to(tl.int64) * (GROUP * m) + query
        lse = tl.load(p_part_lse + o_part, mask=t < tiles, other=float("-inf"))
        m_part = (lse != float("-inf"))[:, None] & (d < D)[None, :]
        part = tl.load(p_part + o_part[:, None] * D + d[None, :], mask=m_part, other=0.0)
        higher = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(lse - safe)
        decay = tl.exp(top - safe)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        top = higher
    o_row = row.to(tl.int64) * (GROUP * m) + query
    tl.store(p_out + o_row * D + d, acc / tl.where(total == 0.0, 1.0, total), mask=d < D)
    tl.store(p_lse + o_row, top + tl.log(total))


def _tile_shape(query_rows, block_d, itemsize):
    """Fixed table: (BLOCK_M, BLOCK_N, warps, stages). K and V tiles of all stages and the queries stay under the 99 KB
    of the smallest GPUs."""
    row = block_d * itemsize  # bytes
    block_m = min(max(16, min(64, 32768 // row)), max(16, triton.next_power_of_2(query_rows)))
    block_n = max(16, min(64, 16384 // row))
    return block_m, block_n, 8 if block_m * block_d > 4096 else 4, 2 if row * block_n <= 16384 else 1


def _launch(
    q, k, v, *, scale, causal, valid, start, length, softcap=None, window=None, visible=None, split=None
):  # fmt: skip
    """Run the kernels; `split` (tokens of one tile) is chosen here unless a test names it."""
    B, H, m, D = q.shape
    ragged = start is not None
    rows = start.numel() if ragged else B * k.shape[1]
    groups = rows // B
    query_rows = H // groups * m
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    block_d = triton.next_power_of_2(max(16, D))
    block_m, block_n, warps, stages = _tile_shape(query_rows, block_d, k.element_size())
    blocks = triton.cdiv(query_rows, block_m)
    if ragged:  # lengths live on the device: this many tiles suffice for any of them, and the surplus exits
        split, splits = split or MIN_SPLIT * blocks, 1
        tiles = k.shape[0] // split + rows
    else:
        split = split or split_length(k.shape[2], rows * blocks, q)
        splits = max(1, triton.cdiv(k.shape[2], split))
        tiles = rows * splits
    out, lse = q.new_empty((B, H, m, D)), q.new_empty((B, H, m), dtype=torch.float32)
    whole = not ragged and splits == 1
    part = out if whole else q.new_empty((tiles, query_rows, D), dtype=torch.float32)
    part_lse = lse if whole else q.new_empty((tiles, query_rows), dtype=torch.float32)
    shared = {"GROUP": H // groups, "D": D, "ROWS": triton.next_power_of_2(rows) if ragged else 1, "RAGGED": ragged}
    if visible is not None:
        visible = visible.expand(B, m, k.shape[2])
    _attend_kernel[(tiles, blocks)](
        q, k, v, _bytes(valid), _bytes(visible), start, length, part, part_lse,
        *q.stride()[:3], *_strides(k), *_strides(v),
        *((0, 0, 0) if valid is None else valid.stride()), *((0, 0, 0) if visible is None else visible.stride()),
        0 if ragged else k.shape[2], m, split, splits, rows, groups, window or 0,
        float(scale) * LOG2_E, float(softcap or 0) * LOG2_E,
        **shared, CAUSAL=causal, WINDOW=window is not None, MASKED=valid is not None, VISIBLE=visible is not None,
        CAPPED=softcap is not None, DOT=dot_dtype(q),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not whole:
        _merge_kernel[(rows, query_rows)](
            part, part_lse, length, out, lse, m, split, splits, rows, **shared, BLOCK_T=16, BLOCK_D=block_d, num_warps=4
        )
    return out, lse


def _bytes(mask):
    """A bool tensor as what a kernel can load, or None."""
    return None if mask is None else mask.view(torch.uint8)


def _strides(x):
    """Strides over (batch, kv head, token); flat rows have only the last."""
    return (0, 0, x.stride(0)) if x.dim() == 2 else x.stride()[:3]


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    valid: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    visible: torch.Tensor | None = None,
    _backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to one segment; return `(out, lse)`.

    Args:
        q: queries [B, H, m, D], float16, bfloat16 or float32; query head h reads kv head h // (H / G).
        k: dense [B, G, n, D], or flat rows [total, D] when `start` and `length` are given; dtype of q.
        v: as k.
        scale: factor on q . k, usually D ** -0.5.
        causal: the m queries are the last m tokens of every row: query i sees stored tokens with index <= n - m + i
            (ragged: length[r] - m + i). False: every query sees every token.
        valid: dense only; bool [B, n] or [B, G, n]. A slot that is False is never seen and may hold NaN. On a CPU its
            rows are looked at, and all of k and v copied where they hold what arithmetic cannot pass over.
        start: int64 [B * G], first flat row of (b, g) at b * G + g.
        length: int32 [B * G], rows in use there; memory behind them is slack and may hold NaN. Regions must not
            overlap: `total` bounds the number of programs, since reading the lengths would wait for the device.
        softcap: scaled scores s become softcap * tanh(s / softcap), as Gemma 2 does; None leaves them.
        window: with causal only; query i sees of its stored tokens the last `window`, itself counted: index j only if
            j > n - m + i - window, as the sliding windows of transformers. None = all.
        visible: dense only; bool [B or 1, m, n], which query sees which slot, beside everything else. What it hides
            must be finite.

    Returns:
        out [B, H, m, D] in q's dtype and lse [B, H, m] in float32, the natural log, scale applied. A query that sees
        nothing has out 0 and lse -inf.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, `valid` or `visible` come with ragged rows, a
            window without causality, or softcap or window are not positive.
    """
    given = (valid, start, length, softcap, visible)
    if given != (None,) * 5 or not _fits(q, k, v):
        valid = _check(q, k, v, valid, start, length, visible)
        check_softcap(softcap)
    if window is not None:
        _check_window(window, causal)
        if start is None:  # what even the first query no longer sees is cut off: the rest keeps its order and its end
            k, v, valid, visible = _within(window, q, k, v, valid, visible)
    if fused_applies(q, k, v, softcap, _backend):
        return fused(q, k, v, scale, causal, valid, start, length, window, visible)
    run = _launch if use_triton(q, _backend) and q.numel() else reference
    return run(
        q, k, v, scale=scale, causal=causal, valid=valid, start=start, length=length, softcap=softcap, window=window,
        visible=visible,
    )  # fmt: skip


def _fits(q, k, v):
    """Whether dense q, k and v are as they must be, by plain comparisons: `_check` says what is wrong where not."""
    shape, stored = q.shape, k.shape
    return (
        len(shape) == len(stored) == 4 and stored == v.shape and shape[0] == stored[0] and shape[3] == stored[3]
        and stored[1] > 0 and shape[1] % stored[1] == 0 and 0 < shape[3] <= MAX_HEAD_DIM
        and q.dtype == k.dtype == v.dtype and q.dtype in FLOATS and q.device == k.device == v.device
    )  # fmt: skip


def _within(window, q, k, v, valid, visible):
    """The last tokens that any query sees, of all that have tokens."""
    first = k.shape[2] - min(k.shape[2], window + q.shape[2] - 1)
    if not first:
        return k, v, valid, visible
    k, v = k[:, :, first:], v[:, :, first:]
    return k, v, None if valid is None else valid[..., first:], None if visible is None else visible[..., first:]


def _check_window(window, causal):
    """Raise ValueError unless the window is a positive number of tokens and the call causal."""
    if not causal:
        raise ValueError(f"window={window} counts back from each query's own token; it needs causal=True")
    if window < 1:
        raise ValueError(f"window={window} must be at least 1, the token itself")


def _check(q, k, v, valid, start, length, visible):
    """Raise ValueError on bad arguments; return `valid` as [B, G, n] or None."""
    check_tensor("q", q, ("B", "H", "m", "D"), FLOATS)
    check_head_dim("q", q)
    B, H, _, D = q.shape
    if (start is None) != (length is None):
        raise ValueError("start and length come together (ragged rows) or not at all (dense)")
    if start is None:
        check_tensor("k", k, (B, "G", "n", D), (q.dtype,), q)
        check_tensor("v", v, tuple(k.shape), (q.dtype,), q)
        check_groups(H, k.shape[1])
        if visible is not None:
            shared = isinstance(visible, torch.Tensor) and visible.shape[:1] == (1,)
            check_tensor("visible", visible, (1 if shared else B, q.shape[2], k.shape[2]), (torch.bool,), q)
        return check_valid(valid, B, k.shape[1], k.shape[2], q)
    if valid is not None:
        raise ValueError("valid has no meaning for ragged rows: length already says what is stored; pass valid=None")
    if visible is not None:
        raise ValueError("visible has no meaning for ragged rows, whose slots differ by head; pass visible=None")
    check_tensor("k", k, ("total", D), (q.dtype,), q)
    check_tensor("v", v, tuple(k.shape), (q.dtype,), q)
    check_tensor("start", start, ("B*G",), (torch.int64,), q)
    check_tensor("length", length, (start.numel(),), (torch.int32,), q)
    if B == 0 or start.numel() == 0 or start.numel() % B or H % (start.numel() // B):
        raise ValueError(f"start has shape {list(start.shape)}; it must be [B * G], B = {B} and G a divisor of H = {H}")
    regions = zip(start.tolist(), length.tolist(), strict=True) if start.is_cpu else ()
    if any(s < 0 or n < 0 or s + n > k.shape[0] for s, n in regions):
        raise ValueError(f"start and length reach outside the {k.shape[0]} rows of k; every region must lie inside")
    return None
