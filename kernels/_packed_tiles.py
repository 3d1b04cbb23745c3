"""Reading a block of a `Packed` inside a kernel: its codes, tokens, low-rank factors and sparse entries, as tiles."""

from __future__ import annotations

from ._backend import jit, tl


@jit
def codes(p_codes, block, t, d, mask, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Codes of tokens t of a block, fp32 [tokens, channels]. Planes read the same bytes: all but one from L1.

    BITS 0 = 8-bit floats (e4m3), read on any GPU: their bits are those of a float16 of a 256th the size.
    """
    if BITS == 0:
        place = (block * T + t)[:, None] * D + d[None, :]
        byte = tl.load(p_codes + place, mask=mask, other=0).to(tl.uint16)
        half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    rows: tl.constexpr = T * BITS // 8
    byte = tl.load(p_codes + (block * rows + t % rows)[:, None] * D + d[None, :], mask=mask, other=0).to(tl.int32)
    return ((byte >> (t // rows * BITS)[:, None]) & ((1 << BITS) - 1)).to(tl.float32)


@jit
def by_token(
    p_codes, p_scale, p_zero, block, t, d, mask,
    BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Dequantised tokens of a block whose scales are per token and channel group, fp32 [tokens, channels]."""
    o = (block * T + t)[:, None] * TABLE + (d // (D // TABLE))[None, :]
    scale = tl.load(p_scale + o, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(p_zero + o, mask=mask, other=0.0).to(tl.float32)
    return codes(p_codes, block, t, d, mask, BITS, T, D) * scale + zero


@jit
def rank_tiles(
    p_a, p_p, p_chunk, block, t, d, seen, DOT: tl.constexpr, RANK: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):
    """A [tokens, r] and P [channels, r] of a block, padded with zeros to tiles that can be multiplied."""
    r = tl.arange(0, 16)
    chunk = tl.load(p_chunk + block).to(tl.int64)
    m_r = (r < RANK)[None, :]
    a = tl.load(p_a + (block * T + t)[:, None] * RANK + r[None, :], mask=seen[:, None] & m_r, other=0.0)
    p = tl.load(p_p + (chunk * D + d)[:, None] * RANK + r[None, :], mask=(d < D)[:, None] & m_r, other=0.0)
    return a.to(tl.float32).to(DOT), p.to(tl.float32).to(DOT)


@jit
def entry_tile(p_at, p_delta, first, count, e, D: tl.constexpr):
    """Token, channel and delta of entries e of a block; what is no entry has token -1 and delta 0."""
    real = e < count
    at = tl.load(p_at + first + e, mask=real, other=0).to(tl.int32) & 0xFFFF
    delta = tl.load(p_delta + first + e, mask=real, other=0.0).to(tl.float32)
    return tl.where(real, at // D, -1), at % D, delta
