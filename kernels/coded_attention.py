"""Attention of a few queries over rows of `kernels.codebook`, read as codes: nothing is ever turned back but the query.

    s[b,h,i,j] = scale * (q[b,h,i] R_k . c_k[j] s_k[j] + q[b,h,i] . centre),   p = softmax_j(s)
    out[b,h,i] = (sum_j p[j] s_v[j] c_v[j]) R_v^T,                             lse[b,h,i] = log sum_j exp(s)

A rotation keeps products, so the query is turned once instead of every key; and it is linear, so the weighted sum of
values is turned back once instead of every value. The scales go to scores and weights, one number a token. What remains
for a token is a look-up of its centroids and two dot products.

A centre that was subtracted from keys comes back as in `kernels.packed_attention`: the same number for all scores of a
query, or cosines and sines where it turns with the position. Keys that are marked were coded without it.

Floor in bytes: the rows of the tokens, once, whatever the number of query heads.
"""

from __future__ import annotations

from functools import partial

import torch

from ._backend import (
    FLOATS,
    LOG2_E,
    MAX_HEAD_DIM,
    check_head_dim,
    check_softcap,
    check_tensor,
    dense_rows,
    dot_dtype,
    jit,
    split_length,
    tl,
    triton,
    use_triton,
)
from ._coded_cpu import coded_cpu
from ._rotary_centre import check_turn, turned_products, turned_scores, turned_tile
from ._tiles import scaled, softmax_step
from ._weights import rows_of
from .beside import Exact, merge_exact
from .codebook import centroids, decode, row_bytes, turn, turn_back
from .decode_attention import _merge_kernel
from .merge import merge

_NUMBERS = 2**19  # centroids that are looked up at a time: 2 MB stay in a processor's cache
_QUERIES = 512  # query rows of a run that attend at a time


@jit
def _vectors(p_rows, o_rows, p_table, d, mask, BITS: tl.constexpr):
    """Centroids [tokens, channels] of the rows that begin at o_rows."""
    bit = d * BITS
    at = p_rows + o_rows[:, None] + (bit // 8)[None, :]
    word = tl.load(at, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte; behind the last code the scale begins
        word |= tl.load(at + 1, mask=mask, other=0).to(tl.int32) << 8
    return tl.load(p_table + ((word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)), mask=mask, other=0.0)


@jit
def _scales(p_rows, o_rows, seen, BYTES: tl.constexpr):
    """Scales fp32 [tokens], and whether each is marked: float16, and its sign, at the end of a row."""
    low = tl.load(p_rows + o_rows + (BYTES - 2), mask=seen, other=0).to(tl.int16)
    high = tl.load(p_rows + o_rows + (BYTES - 1), mask=seen, other=0).to(tl.int16)
    size = ((high & 127) << 8 | low).to(tl.float16, bitcast=True)
    return size.to(tl.float32), high > 127


@jit(do_not_specialize=["x", "n", "split", "splits"])
def _coded_kernel(
    p_q, p_turned, p_k, p_v, k_table, v_table, p_shift, p_centre, p_freq, p_positions, p_valid,
    s_kb, s_kg, s_kn, s_vb, s_vg, s_vn, s_pb, s_pg, s_hb, s_hg, s_hn, p_out, p_lse,
    x, n, split, splits, groups, scale_log2, cap_log2,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    HALF: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One split of one run against one block of its x query rows -> p_out [run * splits + part, x, D], still turned."""
    run, part = tl.program_id(0) // splits, tl.program_id(0) % splits
    b, g = (run // groups).to(tl.int64), (run % groups).to(tl.int64)
    i, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    o_q = run.to(tl.int64) * x * D + i * D
    m_q = (i < x)[:, None] & (d < D)[None, :]
    q = tl.load(p_turned + o_q[:, None] + d[None, :], mask=m_q, other=0.0).to(DOT)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SHIFTED:
        shift = tl.load(p_shift + run * x + i, mask=i < x, other=0.0)
    if HALF:
        with_cos, with_sin, freq, axis = turned_products(
            p_q, o_q, i < x, p_centre, p_freq, None, run, D, HALF, 1, BLOCK_F
        )
        p_positions += b * s_pb + g * s_pg
    begin = part * split
    end = tl.minimum(begin + split, n)
    for low in range(begin, end, BLOCK_T):
        j = low + tl.arange(0, BLOCK_T)
        seen = j < end
        if MASKED:
            seen = seen & (tl.load(p_valid + b * s_hb + g * s_hg + j.to(tl.int64) * s_hn, mask=seen, other=0) != 0)
        mask = seen[:, None] & (d < D)[None, :]
        o_k = b * s_kb + g * s_kg + j.to(tl.int64) * s_kn
        size, marked = _scales(p_k, o_k, seen, K_BYTES)
        keys = _vectors(p_k, o_k, k_table, d, mask, K_BITS)
        scores = tl.dot(q, tl.trans(keys.to(DOT)), input_precision="ieee") * size[None, :]
        if SHIFTED:
            centres = tl.zeros([BLOCK_M, BLOCK_T], tl.float32) + shift[:, None]
            if HALF:
                centres += turned_tile(with_cos, with_sin, freq, axis, p_positions, 0, j, seen, 1)
            scores += tl.where(marked[None, :], 0.0, centres)
        scores = tl.where(seen[None, :], scaled(scores, scale_log2, cap_log2, CAPPED), float("-inf"))
        p, decay, top, total = softmax_step(scores, top, total)
        o_v = b * s_vb + g * s_vg + j.to(tl.int64) * s_vn
        size, marked = _scales(p_v, o_v, seen, V_BYTES)
        values = _vectors(p_v, o_v, v_table, d, mask, V_BITS)
        acc = acc * decay[:, None] + tl.dot((p * size[None, :]).to(DOT), values.to(DOT), input_precision="ieee")
    o_row = tl.program_id(0).to(tl.int64) * x + i
    tl.store(p_out + o_row[:, None] * D + d[None, :], acc / tl.where(total == 0.0, 1.0, total)[:, None], mask=m_q)
    tl.store(p_lse + o_row, (top + tl.log2(total)) * 0.6931471805599453, mask=i < x)


def _launch(q, turned_q, k, v, bits, shift, turn_of, softcap, valid, dot, split=None):
    """Run the kernel: q fp32 [runs, x, D] as it is, and turned in the model's dtype; rows [B, G, n, bytes]; shift fp32
    [runs, x] or None. `split` (tokens of one program) is chosen here unless a test names it."""
    (runs, x, D), (G, n) = q.shape, k.shape[1:3]
    k, v, block_d = dense_rows(k), dense_rows(v), triton.next_power_of_2(max(16, D))
    centre, inv_freq, positions, _ = turn_of or (None, None, None, None)
    half = 0 if inv_freq is None else inv_freq.shape[1]
    # what turns multiplies fp32 tiles besides, which take the shared memory of other query rows
    most = min(64 if half == 0 else 32 if half <= 64 else 16, 16 if block_d > 256 else 64)
    block_m = min(most, max(16, triton.next_power_of_2(x)))
    block_t = 64 if block_d <= 128 else 32 if block_d <= 256 else 16
    blocks = triton.cdiv(x, block_m)
    split = triton.cdiv(split or split_length(n, runs * blocks, q), block_t) * block_t
    splits = max(1, triton.cdiv(n, split))
    out, lse = torch.empty_like(q), q.new_empty(runs, x)
    part, part_lse = (out, lse) if splits == 1 else (q.new_empty(runs * splits, x, D), q.new_empty(runs * splits, x))
    strides = (0, 0) if positions is None else positions.expand(-1, -1, G, -1).stride()[1:3]
    strides += (0, 0, 0) if valid is None else valid.stride()
    _coded_kernel[(runs * splits, blocks)](
        q, turned_q, k, v, *(centroids(each, q.device).to(turned_q.dtype) for each in bits), shift,
        centre, inv_freq, positions, None if valid is None else valid.view(torch.uint8),
        *k.stride()[:3], *v.stride()[:3], *strides, part, part_lse, x, n, split, splits, G,
        LOG2_E, float(softcap or 0) * LOG2_E, D=D, K_BITS=bits[0], V_BITS=bits[1], K_BYTES=k.shape[3],
        V_BYTES=v.shape[3], HALF=half, SHIFTED=shift is not None, MASKED=valid is not None,
        CAPPED=softcap is not None, DOT=dot, BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_D=block_d,
        BLOCK_F=triton.next_power_of_2(max(16, half)), num_warps=8 if block_m * block_d > 4096 else 4,
        num_stages=2 if block_d <= 256 else 1,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(runs, x)](
            part, part_lse, None, out, lse, x, split, splits, runs, GROUP=1, D=D, ROWS=1, RAGGED=False, BLOCK_T=16,
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out, lse


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
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
    need_lse: bool = True,
    _backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
        beside: exact keys and values [B, G, r, D] in q's dtype that all queries see too: for a few tokens more in the
            same softmax, which on a CPU costs less than a merge of two.
        need_lse: False spares making lse where it costs anything; None may come back in its place.

    Returns:
        out [B, H, m, D] in q's dtype and lse [B, H, m] in fp32; 0 and -inf where a query sees no token.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    if not _fits(q, k, v, bits, signs, valid, beside):
        _check(q, k, v, bits, signs, valid, beside)
    check_softcap(softcap)
    G, n = k.shape[1:3]
    x, launched = q.shape[1] // G * q.shape[2], use_triton(q, _backend) and q.numel() and n
    fused = not launched and _is_fused(q, n, _backend)
    # On a CPU products of four rows are faster than those of three.
    rows = rows_of(q, q.shape[0] * G, scale, fused and x % 4 == 3)
    query, *centred = _centred(q, rows, signs, centre, inv_freq, positions, n)
    told = bits, *centred, softcap, None if valid is None else valid.expand(q.shape[0], G, n)
    if fused:
        out, lse = _on_cpu(rows, query, k, v, told, signs[1], beside, need_lse)
    else:
        run = partial(_launch, dot=dot_dtype(q)) if launched else reference
        out, lse = run(rows, query.to(q.dtype) if launched else query, k, v, *told)
        out = turn_back(out, signs[1])
    out = out[:, :x].to(q.dtype).reshape(q.shape)
    lse = None if lse is None else lse[:, :x].reshape(q.shape[:3])
    return (out, lse) if fused or beside is None else merge_exact(out, lse, q, Exact([beside]), scale, softcap)


def _on_cpu(rows, query, k, v, told, signs, beside, need_lse):
    """`coded_cpu`, turned back by the values' `signs` [D]."""
    exact = None if beside is None else tuple(part.flatten(0, 1).float() for part in beside)
    out, lse, more = coded_cpu(rows, query, k, v, *told, exact, need_lse)
    out = turn_back(out, signs)
    # Exact values were never turned.
    return out if more is None else out.add_(more), lse


def _is_fused(q, n, backend):
    """Whether these queries take the CPU's path, which knows no gradient."""
    graded = q.requires_grad and torch.is_grad_enabled()
    return q.is_cpu and bool(q.numel()) and n > 0 and backend in (None, "fused") and not graded


def _centred(q, rows, signs, centre, inv_freq, positions, n):
    """Query rows turned as the keys were before they were coded; what the centre adds to all scores, by the dims that
    RoPE leaves alone; and what its other dims need. The last two are None where there is no such thing."""
    query = turn(rows, signs[0])
    if centre is None:
        if inv_freq is not None:
            raise ValueError("inv_freq without centre: nothing but a centre is turned; give both or neither")
        return query, None, None
    centre, turned, still = centre.flatten(0, 1), None, 0
    if inv_freq is not None:
        centre, inv_freq = centre.contiguous(), inv_freq.flatten(0, 1).contiguous()
        turned = centre, inv_freq, check_turn(q, centre, inv_freq, positions, None, n), None
        still = 2 * inv_freq.shape[1]
    return query, torch.bmm(rows[..., still:], centre[:, still:, None])[..., 0], turned


def reference(q, query, k, v, bits, shift, turned, softcap, valid):
    """Plain torch, in tiles of tokens and queries, fp32 throughout: the truth, and the path off CUDA. As `_launch`."""
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid = None if valid is None else valid.flatten(0, 1)[:, None]
    parts = [
        _attend(q[:, some], query[:, some], k, v, bits, 0.0 if shift is None else shift[:, some, None], turned,
                shift is not None, softcap, valid)
        for some in (slice(low, low + _QUERIES) for low in range(0, max(1, q.shape[1]), _QUERIES))
    ]  # fmt: skip
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


def _attend(q, query, k, v, bits, shift, turned, centred, softcap, valid):
    """q fp32 [runs, x, D], scaled, and turned; rows [runs, n, bytes] -> out fp32 [runs, x, D], still turned, and lse
    [runs, x]."""
    runs, n, D = *k.shape[:2], q.shape[-1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    step = max(16, _NUMBERS // (runs * D))
    for low in range(0, n, step):
        tile = slice(low, min(low + step, n))
        seen = None if valid is None else valid[..., tile]
        c, size = decode(k[:, tile], bits[0], D)
        scores = query @ c.mT * _only(size[:, None], seen)
        if centred:
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


def _fits(q, k, v, bits, signs, valid, beside):
    """Whether the common arguments are as they must be, by plain comparisons: `_check` says what is wrong where not."""
    if not q.dim() == k.dim() == 4 or valid is not None:
        return False
    (B, H, _, D), (G, n) = q.shape, k.shape[1:3]
    return (
        0 < D <= MAX_HEAD_DIM and G > 0 and H % G == 0 and q.dtype in FLOATS and k.dtype == v.dtype == torch.uint8
        and k.shape == (B, G, n, row_bytes(bits[0], D)) and v.shape == (B, G, n, row_bytes(bits[1], D))
        and signs.shape == (2, D) and signs.dtype in (torch.int8, torch.float32)
        and all(x.dim() == 4 and x.shape[:2] == (B, G) and x.shape[3] == D and x.dtype == q.dtype for x in beside or ())
        and all(x.device == q.device for x in (k, v, signs, *(beside or ())))
    )  # fmt: skip


def _check(q, k, v, bits, signs, valid, beside):
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
    for i, x in enumerate(beside or ()):
        check_tensor(f"beside[{i}]", x, (B, k.shape[1], "r", D), (q.dtype,), q)
