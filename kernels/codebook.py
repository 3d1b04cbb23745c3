"""Store single vectors as codes of their turned coordinates: encode, decode (TurboQuant, arXiv 2504.19874).

    y = (x / |x|) R sqrt(D),   code[i] = how many boundaries are <= y[i],   x ~ s * c R^T,   c[i] = centroid[code[i]]

R is fixed: random signs, then a Hadamard matrix. It leaves every coordinate of any vector nearly normal with variance
1, so that one codebook serves all: that with the least squared error for a normal variable (Lloyd and Max). Nothing is
fitted to the data and no vector knows of another. A dimension that is no power of two gets the Hadamard matrix of its
largest such factor, times the orthogonal matrix cos + sin (Hartley) of the odd rest: closed form, the same everywhere.

The signs are needed: without them a vector with a constant part is one spike after a Hadamard matrix, and a spike lies
outside of every codebook (at D = 128 and 3 bits, three quarters of its square are lost; with signs a thirtieth).

A vector becomes one row of bytes: its codes, then s in float16. Code j lies at bit j * bits of the row, lowest first.
Plain torch on every device: a vector is encoded once in its life.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ._backend import FLOATS

Fit = Literal["norm", "plain", "least", "unbiased"]
FITS: tuple[Fit, ...] = get_args(Fit)
MAX_BITS = 8
_VECTORS = 4096  # of one run that are encoded at a time: the steps on the way are larger than the vectors
_AT_ONCE = {1: 8, 2: 4, 3: 4, 4: 2}  # codes that one look-up finds: tables of at most 4096 entries stay in the cache
_TINY = torch.finfo(torch.float32).tiny
_AS_ONE = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}  # so many fp32 as one number


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits centroids of least squared error for a normal variable of variance 1, ascending.

    Each is the mean of what lies nearest to it. Newton's method on that condition, from the start that holds in the
    limit of many centroids: quantiles of the density's cube root, which is a normal one of variance 3.
    """
    n = 2**bits
    c = math.sqrt(3) * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for _ in range(30):
        edges = F.pad((c[1:] + c[:-1]) / 2, (1, 1), value=40.0)  # beyond 40 there is nothing
        edges[0] = -40.0
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        mean = -density.diff() / mass
        up, down = density[1:] * (edges[1:] - mean) / mass / 2, density[:-1] * (mean - edges[:-1]) / mass / 2
        slope = torch.diag(1 - up - down) - torch.diag(up[:-1], 1) - torch.diag(down[1:], -1)
        c = c - torch.linalg.solve(slope, c - mean)
    return tuple(((c - c.flip(0)) / 2).tolist())


def check_bits(bits: int) -> None:
    """Raise ValueError unless codes of so many bits can be."""
    if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r} cannot be coded; use a number from 1 to {MAX_BITS}, e.g. 4")


def row_bytes(bits: int, dim: int) -> int:
    """Bytes of one vector: bits * dim / 8 (dim rounded up to a multiple of 8), and 2 for its scale."""
    return -(-dim // 8) * bits + 2


def turn(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """x R in fp32: x [.., D], signs [D] of 1 and -1. Keeps lengths and products."""
    return (x.float() * signs) @ _basis(x.shape[-1], x.device)


def turn_back(y: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """y R^T in fp32, the inverse of `turn`."""
    return (y.float() @ _basis(y.shape[-1], y.device)) * signs


def encode(
    x: torch.Tensor, signs: torch.Tensor, bits: int, fit: Fit = "norm", marked: torch.Tensor | None = None
) -> torch.Tensor:
    """Code vectors.

    Args:
        x: [.., n, D], float16, bfloat16 or float32.
        signs: [D] of 1 and -1, or with dims in front that are 1 or those of x.
        bits: of a code, 1 to 8.
        fit: how s is chosen. "norm": what is decoded has the length of x. "plain": s = |x| / sqrt(D), as the paper;
            codes shrink, hence so does what is decoded. "least": the least squared error. "unbiased": what is decoded
            has the length of x in the direction of x.
        marked: bool [.., n], one more bit of each vector, for the caller: the sign of its scale, which has no other
            use. None = no vector has it.

    Returns:
        uint8 [.., n, row_bytes]. A vector of 0 decodes to 0; NaN, inf or an s beyond float16 to NaN or inf.

    Raises:
        ValueError: a wrong dtype, shape, fit or number of bits.
    """
    check_bits(bits)
    if x.dtype not in FLOATS or x.dim() < 2 or signs.shape[-1:] != x.shape[-1:] or signs.dim() > x.dim():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and signs are {list(signs.shape)}; encode needs floats [.., n, D] and [D]"
        )
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} is not known; use {', '.join(map(repr, FITS[:-1]))} or {FITS[-1]!r}")
    parts = [_encode(part, signs, bits, fit) for part in x.split(_VECTORS, -2)]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    if marked is not None:
        mark(rows, marked)
    return rows


def mark(rows: torch.Tensor, marked: torch.Tensor) -> None:
    """Marks those of the rows uint8 [.., n, row_bytes], which have no mark yet, where bool [.., n] is True."""
    rows[..., -1].add_(marked.view(torch.uint8), alpha=128)  # the high byte of a float16 comes last


def _encode(x: torch.Tensor, signs: torch.Tensor, bits: int, fit: Fit) -> torch.Tensor:
    root, x = x.shape[-1] ** 0.5, x.float()
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = turn(x, signs).mul_(root / size.clamp(min=_TINY))
    codes = torch.bucketize(y, _boundaries(bits, x.device), right=True)
    c = centroids(bits, x.device).take(codes)
    if fit == "norm":
        scale = size / torch.linalg.vector_norm(c, dim=-1, keepdim=True)
    elif fit == "plain":
        scale = size / root
    elif fit == "least":
        scale = size / root * (y * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)
    else:
        scale = (size * root / (y * c).sum(-1, keepdim=True)).masked_fill(size == 0, 0)
    return torch.cat([to_bytes(codes, bits), scale.half().view(torch.uint8)], -1)


def decode(rows: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of bytes stand for, still turned.

    Returns:
        c fp32 [.., n, dim] and s fp32 [.., n], of which the sign is the mark (-0.0 is marked, too); the vector is
        `turn_back(c * s.abs()[..., None], signs)`.
    """
    return vectors(rows, bits, dim), scales(rows)


def scales(rows: torch.Tensor) -> torch.Tensor:
    """The scales of rows, marked or not: fp32 [.., n]."""
    two = rows[..., -2:]
    if two.storage_offset() % 2 or any(stride % 2 for stride in two.stride()[:-1]) or two.stride(-1) != 1:
        two = two.clone(memory_format=torch.contiguous_format)  # a float16 may not start at an odd byte
    return two.view(torch.float16)[..., 0].float()


class Room:
    """Memory in which rows are looked up tile by tile: what is fresh at every tile costs more than the look-up.

    Args:
        numbers: of the largest tile.
    """

    def __init__(self, numbers: int) -> None:
        self._numbers, self._index = torch.empty(numbers, dtype=torch.float32), torch.empty(numbers, dtype=torch.int32)

    def found(self, index: torch.Tensor, table: torch.Tensor, width: int) -> torch.Tensor:
        """The entries, fp32 [.., width], of a table [n] of numbers that are `width` fp32 each; the next ones overwrite
        them."""
        at, numbers = self._index[: index.numel()], self._numbers[: width * index.numel()].view(table.dtype)
        at.view(index.shape).copy_(index)
        torch.index_select(table, 0, at, out=numbers)
        return numbers.view(torch.float32).view(*index.shape, width)


def vectors(rows: torch.Tensor, bits: int, dim: int, room: Room | None = None) -> torch.Tensor:
    """The centroids of rows: fp32 [.., n, dim], in `room` if there is one."""
    packed, at_once = rows[..., :-2], _AT_ONCE.get(bits, 1)
    index = packed if at_once * bits == 8 else _pieces(packed, bits, at_once)
    if rows.is_cpu and at_once in _AS_ONE:
        room = Room(index.numel() * at_once) if room is None else room
        found = room.found(index, _as_one(bits, at_once), at_once)
    else:
        found = F.embedding(index.int(), _table(bits, at_once, rows.device))
    return found.flatten(-2)[..., :dim]


def to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [.., D] below 2^bits as uint8 [.., D / 8 * bits]: eight codes fill `bits` whole bytes."""
    codes = codes.long() if codes.shape[-1] % 8 == 0 else F.pad(codes.long(), (0, -codes.shape[-1] % 8))
    if bits == 4:
        return torch.add(codes[..., ::2], codes[..., 1::2], alpha=16).byte()
    if 8 % bits == 0:  # no code reaches into another byte
        return (codes.unflatten(-1, (-1, 8 // bits)) << _steps(8, bits, codes.device)).sum(-1).byte()
    word = (codes.unflatten(-1, (-1, 8)) << _steps(8 * bits, bits, codes.device)).sum(-1, keepdim=True)
    return (word >> _steps(8 * bits, 8, codes.device)).to(torch.uint8).flatten(-2)


def from_bytes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int64 [.., D], D a multiple of 8."""
    return _pieces(packed, bits, 1).long()


def _pieces(packed: torch.Tensor, bits: int, codes: int) -> torch.Tensor:
    """So many neighbouring codes as one number: [.., D / codes], int32 where 8 codes fit in one, else int64."""
    width, whole = codes * bits, torch.int32 if bits <= 4 else torch.int64
    word = packed.unflatten(-1, (-1, bits)).to(whole) << torch.arange(0, 8 * bits, 8, device=packed.device, dtype=whole)
    shifts = torch.arange(0, 8 * bits, width, device=packed.device, dtype=whole)
    return ((word.sum(-1, keepdim=True, dtype=whole) >> shifts) & (2**width - 1)).flatten(-2)


@cache
def _steps(stop: int, by: int, device: torch.device) -> torch.Tensor:
    """0, by, 2 by, .. below `stop`: int64."""
    return torch.arange(0, stop, by, device=device)


@cache
def centroids(bits: int, device: torch.device) -> torch.Tensor:
    """What codes of so many bits stand for, ascending: fp32 [2^bits]."""
    return torch.tensor(lloyd_max(bits), device=device)


@cache
def _boundaries(bits: int, device: torch.device) -> torch.Tensor:
    """What lies half-way between the centroids: fp32 [2^bits - 1]."""
    known = centroids(bits, device)
    return (known[1:] + known[:-1]) / 2


@cache
def _table(bits: int, codes: int, device: torch.device) -> torch.Tensor:
    """The centroids of all numbers of `codes` neighbouring codes: fp32 [2^(bits * codes), codes]."""
    number = torch.arange(2 ** (bits * codes), device=device)[:, None]
    each = (number >> torch.arange(0, bits * codes, bits, device=device)) & (2**bits - 1)
    return centroids(bits, device)[each]


@cache
def _as_one(bits: int, codes: int) -> torch.Tensor:
    """`_table` on the CPU as [2^(bits * codes)] numbers: these are copied in a tight loop, and rows one call each."""
    return _table(bits, codes, torch.device("cpu")).view(_AS_ONE[codes])[:, 0]


@cache
def _basis(dim: int, device: torch.device) -> torch.Tensor:
    """The rotation without its signs: fp32 [dim, dim], symmetric and its own inverse; one for all caches."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(hadamard)) == 0:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    odd = torch.arange(dim // len(hadamard), dtype=torch.float64)
    angle = odd[:, None] * odd * (2 * math.pi / len(odd))
    return (torch.kron(hadamard, angle.cos() + angle.sin()) / dim**0.5).float().to(device)
