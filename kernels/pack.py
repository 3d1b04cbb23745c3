"""Store keys or values as small integers: pack, unpack, and what an approximation may add to the codes.

    scale = (max - min) / (2^bits - 1),   code = round((x - min) / scale),   x ~ code * scale + min

Tokens are packed in blocks of T. Per channel (keys): one scale for the T tokens of a block and each channel. Per token
(values; keys too in MiKV): one scale for each token and group of neighbouring channels. Codes of 8 / bits tokens share
a byte: bit plane p of byte row i is token p * (T * bits / 8) + i of its block, so that unpacking is one shift for a run
of neighbouring tokens, and keys and values unpack in the same order.

Scale and minimum are float16 whatever the model's dtype: bfloat16 would keep 8 of their 11 bits, and its rounding of a
large minimum costs more than a step of 4 bits. Codes are rounded against the ROUNDED scale and minimum.

"fp8" stores a byte a number too, as an 8-bit float (e4m3) of its distance from the group's mean: coarser than 8-bit
integers for most numbers, finer near the mean of a group that single numbers stretch.

    scale = max |x - mean| / 448,   x ~ e4m3((x - mean) / scale) * scale + mean

Plain torch on every device: a block is packed once in its life, so it is the reading of it that has a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from ._backend import FLOATS, check_head_dim, check_tensor

Bits = Literal[2, 4, 8, "fp8"]
BITS: tuple[Bits, ...] = get_args(Bits)
MIN_BLOCK, MAX_BLOCK = 16, 128
FLOAT16_MAX = 65504.0
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
Layout = Literal["channel", "token"]


@dataclass(frozen=True)
class LowRank:
    """A correction of rank r: block n adds a[n] @ p[chunk[n]]^T.

    Attributes:
        a: float16 [N, T, r], what each token takes of the chunk's directions.
        p: float16 [C, D, r], the directions of each chunk.
        chunk: int32 [N], which chunk a block belongs to.
    """

    a: torch.Tensor
    p: torch.Tensor
    chunk: torch.Tensor


@dataclass(frozen=True)
class Sparse:
    """Corrections of single entries: block n adds delta[e] at its entry at[e], for start[n] <= e < start[n] + count[n].

    Attributes:
        start: int32 [N].
        count: int32 [N].
        at: int16 [E], the lower 16 bits of token * D + channel inside the block, which are all it has.
        delta: float16 [E].
    """

    start: torch.Tensor
    count: torch.Tensor
    at: torch.Tensor
    delta: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """N blocks of T tokens of D channels.

    Attributes:
        codes: uint8 [N, T * bits / 8, D].
        scale, zero: float16 [N, 1, D] (per channel) or [N, T, D / group] (per token); zero is the minimum, under "fp8"
            the mean.
        bits: 2, 4, 8 or "fp8".
        lowrank, sparse: corrections on top, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: Bits
    lowrank: LowRank | None = None
    sparse: Sparse | None = None

    @property
    def blocks(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def block(self) -> int:
        """T, tokens of a block."""
        return self.codes.shape[1] * 8 // width(self.bits)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.codes.shape[2]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name ("codes", "lowrank.a", ..)."""
        held = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        for name in ("lowrank", "sparse"):
            part = getattr(self, name)
            if part is not None:
                held |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(part)}
        return held

    @classmethod
    def from_tensors(cls, held: dict[str, torch.Tensor], bits: Bits) -> Packed:
        """What had these `tensors()`."""
        own = {name: x for name, x in held.items() if "." not in name}
        for name, kind in (("lowrank", LowRank), ("sparse", Sparse)):
            part = {key.removeprefix(f"{name}."): x for key, x in held.items() if key.startswith(f"{name}.")}
            if part:
                own[name] = kind(**part)
        return cls(**own, bits=bits)

    def take(self, blocks: torch.Tensor) -> Packed:
        """A copy of the blocks with int64 indices `blocks` [M], and of nothing else; an index may come twice."""
        lowrank, sparse = self.lowrank, self.sparse
        if lowrank is not None:
            used, chunk = lowrank.chunk[blocks].unique(return_inverse=True)
            lowrank = LowRank(lowrank.a[blocks], lowrank.p[used.long()], chunk.int())
        if sparse is not None:
            _, entry = entries(sparse, blocks)
            count = sparse.count[blocks]
            start = (count.cumsum(0) - count).int()
            sparse = Sparse(start, count, sparse.at[entry], sparse.delta[entry])
        return Packed(self.codes[blocks], self.scale[blocks], self.zero[blocks], self.bits, lowrank, sparse)


def entries(sparse: Sparse, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of the blocks int64 [M]: whose they are (index into `blocks`) and where they lie, int64 [E] each."""
    count = sparse.count[blocks].long()
    owner = torch.arange(len(blocks), device=count.device).repeat_interleave(count)
    # From the number of an entry among all of `blocks` to where it lies: one step per block.
    step = sparse.start[blocks].long() - (count.cumsum(0) - count)
    return owner, step.index_select(0, owner) + torch.arange(len(owner), device=count.device)


def width(bits: Bits) -> int:
    """Bits that a code takes."""
    return 8 if bits == "fp8" else bits


def check_block(bits: Bits, tokens: int, head_dim: int, group: int | None = None) -> None:
    """Raise ValueError unless blocks of `tokens` tokens with channel groups of `group` (None = not grouped) can be."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} cannot be packed; use {', '.join(map(str, BITS[:-1]))} or {BITS[-1]!r}")
    if tokens % MIN_BLOCK or not MIN_BLOCK <= tokens <= MAX_BLOCK:
        raise ValueError(
            f"a group of {tokens} tokens cannot be packed; use a multiple of {MIN_BLOCK} up to {MAX_BLOCK}, e.g. 64"
        )
    if group is not None and (group < 1 or head_dim % group):
        raise ValueError(
            f"a group of {group} channels does not divide head_dim {head_dim}; use {channel_group(head_dim)}"
        )


def channel_group(head_dim: int, most: int = 64) -> int:
    """The largest divisor of `head_dim` that is at most `most`: the default group of values (64 for 128, 40 for 80)."""
    return max(size for size in range(1, min(most, head_dim) + 1) if head_dim % size == 0)


def pack(
    x: torch.Tensor,
    bits: Bits,
    *,
    layout: Layout,
    group: int | None = None,
    ignore: torch.Tensor | None = None,
) -> Packed:
    """Pack whole blocks.

    Args:
        x: [N, T, D], float16, bfloat16 or float32; T a multiple of 16, at most 128.
        bits: 2, 4, 8 or "fp8".
        layout: "channel": a scale per block and channel; "token": a scale per token and group of channels.
        group: "token" only: channels of a group, a divisor of D; None = the largest divisor up to 64.
        ignore: bool, broadcastable to [N, T, D]: entries that do not widen the range (padding, outliers that are kept
            elsewhere). They get the nearest code. They may hold anything finite.

    Returns:
        A `Packed`. A group whose entries are equal has scale 0 and unpacks to its minimum.

    Raises:
        ValueError: wrong shape, dtype, bits, layout or group; NaN or inf in `x`; values beyond float16.
    """
    check_tensor("x", x, ("N", "T", "D"), FLOATS)
    check_head_dim("x", x)
    if layout not in ("channel", "token"):
        raise ValueError(f"layout={layout!r} is not known; use 'channel' or 'token'")
    blocks, tokens, dim = x.shape
    if layout == "channel" and group is not None:
        raise ValueError(f"group={group} has no meaning per channel, where a group is a block of tokens; leave it out")
    if layout == "token" and group is None:
        group = channel_group(dim)
    check_block(bits, tokens, dim, group)
    x = x.float()
    _check_range(x)
    # [N, 1, T, D, 1] or [N, T, 1, D / group, group]: the axes 2 and 4 share a scale
    shape = (blocks, 1, tokens, dim, 1) if layout == "channel" else (blocks, tokens, 1, dim // group, group)
    grouped = x.reshape(shape)
    table = (blocks, 1, dim) if layout == "channel" else (blocks, tokens, dim // group)
    ignore = None if ignore is None else ignore.expand(x.shape).reshape(shape)
    scale, zero = _float_table(grouped, ignore) if bits == "fp8" else _integer_table(grouped, ignore, bits)
    step = scale.float()
    codes = ((grouped - zero.float()) * torch.where(step > 0, 1 / step, 0)).view(x.shape)
    if bits == "fp8":
        stored = codes.clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
    else:
        stored = _into_bytes(codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8), bits)
    return Packed(stored, scale.reshape(table), zero.reshape(table), bits)


def _integer_table(x: torch.Tensor, ignore: torch.Tensor | None, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, float16, of grouped entries, whose axes 2 and 4 share one."""
    low, high = x, x
    if ignore is not None:
        low, high = x.masked_fill(ignore, torch.inf), x.masked_fill(ignore, -torch.inf)
    zero, top = low.amin((2, 4), keepdim=True), high.amax((2, 4), keepdim=True)
    if ignore is not None:  # a group of nothing but ignored entries
        nothing = zero > top
        zero, top = zero.masked_fill(nothing, 0), top.masked_fill(nothing, 0)
    zero = zero.half()
    return ((top - zero.float()) / (2**bits - 1)).clamp(min=0).half(), zero


def _float_table(x: torch.Tensor, ignore: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and mean, float16, of grouped entries, whose axes 2 and 4 share one."""
    seen = torch.ones_like(x, dtype=torch.bool) if ignore is None else ~ignore
    zero = ((x * seen).sum((2, 4), keepdim=True) / seen.sum((2, 4), keepdim=True).clamp(min=1)).half()
    far = ((x - zero.float()).abs() * seen).amax((2, 4), keepdim=True)
    return (far / FP8_MAX).half(), zero


def unpack(packed: Packed) -> torch.Tensor:
    """What the blocks stand for, corrections included: float32 [N, T, D]. For tests, scoring and copies only."""
    return expand(packed, torch.arange(packed.blocks, device=packed.codes.device), corrections=True)


def expand(packed: Packed, blocks: torch.Tensor, corrections: bool = False) -> torch.Tensor:
    """The blocks with int64 indices `blocks` [M] in float32 [M, T, D], without low-rank and sparse terms or with."""
    codes = _from_bytes(packed.codes[blocks], packed.bits)
    scale, zero = packed.scale[blocks].float(), packed.zero[blocks].float()
    if scale.shape[1] > 1:
        codes = codes.unflatten(2, (scale.shape[2], -1))
        scale, zero = scale[..., None], zero[..., None]
    x = (codes * scale + zero).reshape(len(blocks), packed.block, packed.head_dim)
    if corrections:
        add_corrections(x, packed, blocks)
    return x


def add_corrections(x: torch.Tensor, packed: Packed, blocks: torch.Tensor) -> None:
    """Adds the low-rank and sparse terms of blocks int64 [M] to x float32 [M, T, D], in place."""
    if packed.lowrank is not None:
        part = packed.lowrank
        x += part.a[blocks].float() @ part.p[part.chunk[blocks].long()].float().mT
    if packed.sparse is not None:
        owner, entry = entries(packed.sparse, blocks)
        where = owner * (packed.block * packed.head_dim) + (packed.sparse.at[entry].long() & 0xFFFF)
        x.view(-1).index_add_(0, where, packed.sparse.delta[entry].float())


def _into_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, T, D] -> [N, T * bits / 8, D]."""
    planes = codes.unflatten(1, (8 // bits, -1))
    packed = planes[:, 0].clone()
    for p in range(1, 8 // bits):
        packed |= planes[:, p] << (p * bits)
    return packed


def _from_bytes(packed: torch.Tensor, bits: Bits) -> torch.Tensor:
    """The inverse, as float32."""
    if bits == "fp8":
        return packed.view(FP8).float()
    planes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, 1).float()


def _check_range(x: torch.Tensor) -> None:
    """Raise ValueError on what float16 scales cannot describe."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not largest <= FLOAT16_MAX:  # also true for NaN, which max hands on
        what = "NaN or inf" if not largest < float("inf") else f"a magnitude of {largest:.3g}"
        raise ValueError(f"x holds {what}; packing needs finite values of at most {FLOAT16_MAX:.0f}")
