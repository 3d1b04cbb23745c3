"""Attention of a few queries over packed keys and values, read as codes: no tensor of dequantised keys is ever made.

    s[b,h,i,j] = scale * q[b,h,i] . (K[j] + centre),  K = codes * scale + zero (+ A P^T) (+ delta), V likewise
    out[b,h,i] = sum_j softmax_j(s) V[j],             lse[b,h,i] = log sum_j exp(s)

Ragged by construction: a run is one (batch, kv head); it owns whole blocks of T tokens from block start[r] on, and its
first length[r] tokens count. Dense caches are the case of equal runs. Rules of arithmetic that save reading and work:

- keys with a scale per channel: q . (c s + z) = (q s) . c + q . z, so the query is scaled once per block and the codes
  are multiplied as they are (centred, so that rounding the scaled query to bf16 is not amplified);
- low rank: q . (A P^T) = (q P) A^T and p (A P^T) = (p A) P^T, r numbers per query instead of T x D;
- sparse: entry (j, c) adds q[c] delta to score j, and p[j] delta to channel c of the output;
- a centre common to all keys of a run adds the same number to all their scores: it changes only the lse;
- a centre that turns with the token's position, as RoPE and M-RoPE turn a key bias: `kernels._rotary_centre`.

Floor in bytes: codes, scales and corrections of the visible tokens, once, whatever the number of query heads.
"""

from __future__ import annotations

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
from ._packed_cpu import packed_cpu
from ._packed_reference import reference
from ._packed_tiles import by_token, codes, entry_tile, rank_tiles
from ._rotary_centre import check_turn, turned_products, turned_tile
from ._tiles import scaled, softmax_step
from .beside import Beside, Exact, check_beside, merge_exact
from .decode_attention import _merge_kernel
from .pack import Packed, width


@jit
def _key_scores(
    p_q, o_q, m_row, q, p_codes, p_scale, p_zero, p_a, p_p, p_chunk, p_first, p_count, p_at, p_delta,
    block, t, d, seen, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TABLE: tl.constexpr,
    RANK: tl.constexpr, SPARSE: tl.constexpr, DOT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """q [queries, channels] . keys t of a block, fp32 [queries, tokens]; TABLE 0 = a scale per channel."""
    mask = seen[:, None] & (d < D)[None, :]
    if TABLE == 0:  # scale the query, multiply the codes
        s = tl.load(p_scale + block * D + d, mask=d < D, other=0.0).to(tl.float32)
        z = tl.load(p_zero + block * D + d, mask=d < D, other=0.0).to(tl.float32)
        half: tl.constexpr = (1 << BITS) // 2
        own = codes(p_codes, block, t, d, mask, BITS, T, D) - half
        scores = tl.dot((q * s[None, :]).to(DOT), tl.trans(own.to(DOT)), input_precision="ieee")
        scores += tl.sum(q * (z + half * s)[None, :], 1)[:, None]
    else:
        keys = by_token(p_codes, p_scale, p_zero, block, t, d, mask, BITS, T, D, TABLE)
        scores = tl.dot(q.to(DOT), tl.trans(keys.to(DOT)), input_precision="ieee")
    if RANK:
        a, p = rank_tiles(p_a, p_p, p_chunk, block, t, d, seen, DOT, RANK, T, D)
        qp = tl.dot(q.to(DOT), p, input_precision="ieee")
        scores += tl.dot(qp.to(DOT), tl.trans(a), input_precision="ieee")
    if SPARSE:
        first, count = tl.load(p_first + block), tl.load(p_count + block)
        for e in range(0, count, BLOCK_E):
            token, c, delta = entry_tile(p_at, p_delta, first, count, e + tl.arange(0, BLOCK_E), D)
            q_e = tl.load(p_q + o_q[:, None] + c[None, :], mask=m_row[:, None], other=0.0).to(tl.float32)
            here = (token[:, None] == t[None, :]).to(tl.float32).to(DOT)  # [BLOCK_E, tokens]
            scores += tl.dot((q_e * delta[None, :]).to(DOT), here, input_precision="ieee")
    return scores


@jit
def _value_sums(
    p, p_codes, p_scale, p_zero, p_a, p_p, p_chunk, p_first, p_count, p_at, p_delta,
    block, t, d, seen, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TABLE: tl.constexpr,
    RANK: tl.constexpr, SPARSE: tl.constexpr, DOT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Weights p [queries, tokens] times the values of tokens t of a block, fp32 [queries, channels]."""
    mask = seen[:, None] & (d < D)[None, :]
    values = by_token(p_codes, p_scale, p_zero, block, t, d, mask, BITS, T, D, TABLE)
    sums = tl.dot(p.to(DOT), values.to(DOT), input_precision="ieee")
    if RANK:
        a, directions = rank_tiles(p_a, p_p, p_chunk, block, t, d, seen, DOT, RANK, T, D)
        pa = tl.dot(p.to(DOT), a, input_precision="ieee")
        sums += tl.dot(pa.to(DOT), tl.trans(directions), input_precision="ieee")
    if SPARSE:
        first, count = tl.load(p_first + block), tl.load(p_count + block)
        for e in range(0, count, BLOCK_E):
            token, c, delta = entry_tile(p_at, p_delta, first, count, e + tl.arange(0, BLOCK_E), D)
            here = (token[:, None] == t[None, :]).to(tl.float32).to(DOT)
            there = (c[:, None] == d[None, :]).to(tl.float32).to(DOT)  # [BLOCK_E, channels]
            p_e = tl.dot(p.to(DOT), tl.trans(here), input_precision="ieee") * delta[None, :]
            sums += tl.dot(p_e.to(DOT), there, input_precision="ieee")
    return sums


@jit(do_not_specialize=["m", "split", "splits"])
def _packed_kernel(
    p_q, k_codes, k_scale, k_zero, k_a, k_p, k_chunk, k_first, k_count, k_at, k_delta,
    v_codes, v_scale, v_zero, v_a, v_p, v_chunk, v_first, v_count, v_at, v_delta,
    p_start, p_length, p_centre, p_freq, p_axis, p_positions, p_valid, p_shift, s_pa, s_pb, s_pg, s_hb, s_hg, s_hn,
    p_out, p_lse, s_qb, s_qh, s_qm, m, split, splits, groups, scale_log2, cap_log2,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_TABLE: tl.constexpr, V_TABLE: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr,
    K_SPARSE: tl.constexpr, V_SPARSE: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One split of one run against one block of its m * GROUP query rows -> p_out [run * splits + part, rows, D]."""
    run, part = tl.program_id(0) // splits, tl.program_id(0) % splits
    b, g = (run // groups).to(tl.int64), (run % groups).to(tl.int64)
    packed = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, h = packed // GROUP, packed % GROUP
    d = tl.arange(0, BLOCK_D)
    m_q = (i < m)[:, None] & (d < D)[None, :]
    o_q = b * s_qb + (g * GROUP + h) * s_qh + i.to(tl.int64) * s_qm
    q = tl.load(p_q + o_q[:, None] + d[None, :], mask=m_q, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    first = tl.load(p_start + run)
    begin = part * split
    end = tl.minimum(begin + split, tl.load(p_length + run))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HALF:
        with_cos, with_sin, freq, axis = turned_products(
            p_q, o_q, i < m, p_centre, p_freq, p_axis, run, D, HALF, AXES, BLOCK_F
        )
        p_positions += b * s_pb + g * s_pg
    if SHIFTED:
        shift = tl.load(p_shift + run.to(tl.int64) * (GROUP * m) + h * m + i, mask=i < m, other=0.0)
    for low in range(begin, end, BLOCK_T):  # a tile lies within one block: BLOCK_T divides T
        block = first + low // T
        t = low % T + tl.arange(0, BLOCK_T)
        j = low + tl.arange(0, BLOCK_T)
        seen = j < end
        if MASKED:
            o_valid = b * s_hb + g * s_hg + j.to(tl.int64) * s_hn
            seen = seen & (tl.load(p_valid + o_valid, mask=seen, other=0) != 0)
        scores = _key_scores(
            p_q, o_q, i < m, q, k_codes, k_scale, k_zero, k_a, k_p, k_chunk, k_first, k_count, k_at, k_delta,
            block, t, d, seen, K_BITS, T, D, K_TABLE, K_RANK, K_SPARSE, DOT, BLOCK_E,
        )  # fmt: skip
        if HALF:
            scores += turned_tile(with_cos, with_sin, freq, axis, p_positions, s_pa, j, seen, AXES)
        if SHIFTED:
            scores += shift[:, None]
        scores = tl.where(seen[None, :], scaled(scores, scale_log2, cap_log2, CAPPED), float("-inf"))
        p, decay, top, total = softmax_step(scores, top, total)
        acc = acc * decay[:, None] + _value_sums(
            p, v_codes, v_scale, v_zero, v_a, v_p, v_chunk, v_first, v_count, v_at, v_delta,
            block, t, d, seen, V_BITS, T, D, V_TABLE, V_RANK, V_SPARSE, DOT, BLOCK_E,
        )  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * (GROUP * m) + h * m + i
    tl.store(p_out + o_row[:, None] * D + d[None, :], acc / tl.where(total == 0.0, 1.0, total)[:, None], mask=m_q)
    tl.store(p_lse + o_row, (top + tl.log2(total)) * 0.6931471805599453, mask=i < m)


def _arguments(packed):
    """The ten tensors of a `Packed` in the kernel's order, None for what it has not."""
    rank, sparse = packed.lowrank, packed.sparse
    ranked = (None,) * 3 if rank is None else (rank.a, rank.p, rank.chunk)
    single = (None,) * 4 if sparse is None else (sparse.start, sparse.count, sparse.at, sparse.delta)
    return packed.codes, packed.scale, packed.zero, *ranked, *single


def _launch(
    q, k, v, *, scale, start, length, longest, turn=None, softcap=None, shift=None, valid=None, split=None
):  # fmt: skip
    """Run the kernel; `split` (tokens of one program, whole blocks) is chosen here unless a test names it."""
    B, H, m, D = q.shape
    runs, tokens = start.numel(), k.block
    group, q = B * H // runs, dense_rows(q)
    query_rows = group * m
    block_d = triton.next_power_of_2(max(16, D))
    half = 0 if turn is None else turn[1].shape[1]
    # a turning centre multiplies fp32 tiles besides: they take the shared memory of the other query rows
    most = 64 if half == 0 else 32 if half <= 64 else 16
    most = min(most, 16 if block_d > 256 else 64)
    # the largest power of two that divides T, within 64 and what two fp32 tiles may take of shared memory
    block_t = min(tokens & -tokens, 64 if block_d <= 128 else 32 if block_d <= 256 else 16)
    block_m = min(most, max(16, triton.next_power_of_2(query_rows)))
    blocks = triton.cdiv(query_rows, block_m)
    split = split or split_length(longest, runs * blocks, q)
    split = triton.cdiv(split, tokens) * tokens
    splits = max(1, triton.cdiv(longest, split))
    out, lse = q.new_empty((B, H, m, D)), q.new_empty((B, H, m), dtype=torch.float32)
    part = out if splits == 1 else q.new_empty((runs * splits, query_rows, D), dtype=torch.float32)
    part_lse = lse if splits == 1 else q.new_empty((runs * splits, query_rows), dtype=torch.float32)
    centre, inv_freq, positions, axes = turn or (None, None, None, None)
    strides = (0, 0, 0) if turn is None else positions.expand(-1, -1, runs // B, -1).stride()[:3]
    strides += (0, 0, 0) if valid is None else valid.stride()
    _packed_kernel[(runs * splits, blocks)](
        q, *_arguments(k), *_arguments(v), start, length, centre, inv_freq, axes, positions,
        None if valid is None else valid.view(torch.uint8), shift, *strides, part, part_lse,
        *q.stride()[:3], m, split, splits, runs // B, float(scale) * LOG2_E, float(softcap or 0) * LOG2_E,
        GROUP=group, D=D, T=tokens, K_BITS=0 if k.bits == "fp8" else k.bits, V_BITS=0 if v.bits == "fp8" else v.bits,
        K_TABLE=0 if k.scale.shape[1] == 1 else k.scale.shape[2], V_TABLE=v.scale.shape[2],
        K_RANK=0 if k.lowrank is None else k.lowrank.a.shape[2],
        V_RANK=0 if v.lowrank is None else v.lowrank.a.shape[2],
        K_SPARSE=k.sparse is not None, V_SPARSE=v.sparse is not None, HALF=half,
        AXES=1 if axes is None else 3, MASKED=valid is not None, SHIFTED=shift is not None,
        CAPPED=softcap is not None, DOT=dot_dtype(q), BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_D=block_d,
        BLOCK_E=32 if block_d <= 256 else 16,
        BLOCK_F=triton.next_power_of_2(max(16, half)),
        num_warps=8 if block_m * block_d > 4096 else 4, num_stages=2 if block_d <= 256 else 1,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(runs, query_rows)](
            part, part_lse, None, out, lse, m, split, splits, runs, GROUP=group, D=D, ROWS=1, RAGGED=False,
            BLOCK_T=16, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out, lse


def packed_attention(
    q: torch.Tensor,
    k: Packed,
    v: Packed,
    *,
    scale: float,
    start: torch.Tensor,
    length: torch.Tensor,
    longest: int,
    centre: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
    beside: Exact | None = None,
    _backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attend to packed tokens, all of which lie before the queries; return `(out, lse)`.

    Args:
        q: queries [B, H, m, D], float16, bfloat16 or float32; query head h reads kv head h // (H / G).
        k: packed per channel or per token, with at most 16 ranks; every block is of T tokens.
        v: packed per token, the same blocks.
        scale: factor on q . k, usually D ** -0.5.
        start: int64 [B * G], first block of (b, g) at b * G + g.
        length: int32 [B * G], its tokens; what lies behind them in the last block, or in later blocks, is slack.
        longest: the largest length, known to the caller so that nothing here waits for the device.
        centre: float32 [B * G, D], what was subtracted from all keys of a run before packing, or None.
        inv_freq: float32 [B * G, R / 2] with R <= D: the centre had been turned for each key, in radians per position
            and pair of dims (f, f + R / 2); the dims from R on stood still. None = all did.
        positions: int32 [B, G or 1, n] with n >= longest: of token j of a run in column j. With inv_freq; with axes
            [3, B, G or 1, n], its time, height and width.
        axes: int32 [R / 2], under M-RoPE the axis (0 t, 1 h, 2 w) whose position turns each pair (see
            `kernels.rotate.frequency_axes`); None = a token has one position.
        softcap: scaled scores s, those of the centre included, become softcap * tanh(s / softcap), as Gemma 2 does.
        valid: bool [B, G or 1, n] with n >= longest: a run's token j in column j. One that is False is never seen; its
            codes, its own scales and its low-rank factors may hold anything.
        beside: exact tokens in the same softmax, which costs a CPU less than attentions that are merged.

    Returns:
        out [B, H, m, D] in q's dtype and lse [B, H, m] in float32, the natural log, scale applied. A query of a run
        without tokens has out 0 and lse -inf. What `beside` asks for besides.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """
    valid = _checked(q, k, v, start, length, longest, centre, softcap, valid)
    turn, still = _turning(q, centre, inv_freq, positions, axes, longest)
    told = dict(scale=scale, start=start, length=length, longest=longest, turn=turn, softcap=softcap, valid=valid)
    run = _implementation(q, _backend)
    if beside is not None:
        check_beside(beside.pairs, q, start.numel() // q.shape[0])
        if run is packed_cpu and (found := _in_one_softmax(q, k, v, beside, told, centre, still)):
            return found
    common = _common(q, centre, still)
    out, lse = run(q, k, v, **told, shift=None if softcap is None else common)
    # What is the same for all scores of a query changes nothing but their log-sum-exp.
    lse = lse if common is None or softcap is not None else lse + common * scale
    return (out, lse) if beside is None else merge_exact(out, lse, q, beside, scale, softcap)


def _in_one_softmax(q, k, v, beside, told, centre, still):
    """What `packed_attention` returns, by the CPU's path; None where attentions that are merged are better."""
    softcap = told["softcap"]
    more = Beside(beside.pairs, beside.q, beside.lse, beside.row, None if softcap else centre, still)
    if not more.is_cheap or (softcap and centre is not None):
        return None
    found = packed_cpu(q, k, v, **told, beside=more)
    return found if found is None or beside.row else found[:2]


def _checked(q, k, v, start, length, longest, centre, softcap, valid):
    """`valid` as it is read. Raises ValueError on bad arguments."""
    if not _fits(q, k, v, start, length, centre):
        _check(q, k, v, start, length, longest, centre)
    _check_runs(k, start, length, longest)
    check_softcap(softcap)
    return None if valid is None else _check_holes(valid, q.shape[0], start.numel() // q.shape[0], longest, q)


def _implementation(q, backend):
    """What computes these queries: the kernel, the CPU's path, which knows no gradient, or the reference."""
    if q.numel() and use_triton(q, backend):
        return _launch
    if q.numel() and q.is_cpu and backend in (None, "fused") and not (q.requires_grad and torch.is_grad_enabled()):
        return packed_cpu
    return reference


def _turning(q, centre, inv_freq, positions, axes, longest):
    """What of a centre turns, as (centre, inv_freq, positions, axes) or None, and how many dims these are. Raises
    ValueError on bad arguments."""
    if inv_freq is None:
        return None, 0
    positions = check_turn(q, centre, inv_freq, positions, axes, longest)
    axes = None if axes is None else axes.contiguous()
    return (centre.contiguous(), inv_freq.contiguous(), positions, axes), 2 * inv_freq.shape[1]


def _common(q, centre, still):
    """What the dims of a centre from `still` on, which do not turn, add to all scores of a query before they are
    scaled: fp32 [B, H, m] or None."""
    if centre is None or still >= q.shape[-1]:
        return None
    rows = q.reshape(len(centre), -1, q.shape[-1])[..., still:].float()
    return (rows @ centre[..., still:, None]).view(q.shape[:3])


def _check_holes(valid, batch, groups, longest, like):
    """Raise ValueError on a bad `valid`; return it as a view [B, G, n]."""
    check_tensor("valid", valid, (batch, "G or 1", "n"), (torch.bool,), like)
    if valid.shape[1] not in (1, groups) or valid.shape[2] < longest:
        raise ValueError(f"valid has shape {list(valid.shape)}; it must be [{batch}, {groups} or 1, n >= {longest}]")
    return valid.expand(batch, groups, -1)


def _fits(q, k, v, start, length, centre):
    """Whether the common arguments are as they must be, by plain comparisons: `_check` says what is wrong where not."""
    if q.dim() != 4 or q.dtype not in FLOATS or not 0 < q.shape[3] <= MAX_HEAD_DIM or start.dim() != 1:
        return False
    (B, H, _, D), runs = q.shape, len(start)
    return (
        B > 0 and runs > 0 and runs % B == 0 and H % (runs // B) == 0 and length.shape == start.shape
        and start.dtype == torch.int64 and length.dtype == torch.int32 and v.scale.shape[1] != 1
        and all(
            x.codes.shape == (k.blocks, k.block * width(x.bits) // 8, D) and x.codes.dtype == torch.uint8
            and (x.lowrank is None or x.lowrank.a.shape[2] <= 16)
            for x in (k, v)
        )
        and (centre is None or centre.shape == (runs, D) and centre.dtype == torch.float32)
        and all(x is None or x.device == q.device for x in (start, length, k.codes, v.codes, centre))
    )  # fmt: skip


def _check(q, k, v, start, length, longest, centre):
    """Raise ValueError on bad arguments."""
    check_tensor("q", q, ("B", "H", "m", "D"), FLOATS)
    check_head_dim("q", q)
    B, H, _, D = q.shape
    check_tensor("start", start, ("B*G",), (torch.int64,), q)
    check_tensor("length", length, (start.numel(),), (torch.int32,), q)
    runs = start.numel()
    if B == 0 or runs == 0 or runs % B or H % (runs // B):
        raise ValueError(f"start has shape {list(start.shape)}; it must be [B * G], B = {B} and G a divisor of H = {H}")
    for name, packed in (("k", k), ("v", v)):
        check_tensor(f"{name}.codes", packed.codes, (k.blocks, k.block * width(packed.bits) // 8, D), (torch.uint8,), q)
        if packed.lowrank is not None and packed.lowrank.a.shape[2] > 16:
            raise ValueError(f"{name} has rank {packed.lowrank.a.shape[2]}; the kernel takes at most 16")
    if v.scale.shape[1] == 1:
        raise ValueError("v is packed per channel; values are packed per token: pack(v, bits, layout='token')")
    if centre is not None:
        check_tensor("centre", centre, (runs, D), (torch.float32,), q)


def _check_runs(k, start, length, longest):
    """Raise ValueError where runs do not lie among the blocks, as far as the host knows."""
    if start.device.type == "cpu":
        bounds = start.tolist(), length.tolist()
        blocks = k.blocks
        fits = (s >= 0 and 0 <= n <= longest and s - (-n // k.block) <= blocks for s, n in zip(*bounds, strict=True))
        if not all(fits):
            raise ValueError(
                f"start, length and longest={longest} do not fit {k.blocks} blocks of {k.block} tokens: every run must "
                "lie inside, and none be longer than `longest`"
            )
