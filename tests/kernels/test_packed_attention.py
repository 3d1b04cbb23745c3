from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.helpers import TOLERANCE, mismatch, randn
from textkv.kernels import decode_attention, pack, packed_attention
from textkv.kernels.pack import LowRank, Packed, Sparse, unpack
from textkv.kernels.rotate import frequency_axes

module = importlib.import_module("textkv.kernels.packed_attention")
tiles = importlib.import_module("textkv.kernels._packed_reference")

BACKENDS = pytest.mark.parametrize("backend", ["reference", "fused", "triton"])


def with_corrections(packed: Packed, rank: int, single: int) -> Packed:
    """Random corrections: `rank` directions of one chunk per two blocks, and `single` entries in every second block."""
    blocks, T, D = packed.blocks, packed.block, packed.head_dim
    lowrank = sparse = None
    if rank:
        chunk = torch.arange(blocks) // 2
        lowrank = LowRank(randn(blocks, T, rank).half(), randn(blocks // 2 + 1, D, rank).half(), chunk.int())
    if single:
        count = torch.arange(blocks).remainder(2) * single
        at = torch.cat([torch.zeros(0)] + [torch.randperm(T * D)[: int(n)] for n in count]).short()
        sparse = Sparse((count.cumsum(0) - count).int(), count.int(), at, randn(len(at)).half() * 3)
    return Packed(packed.codes, packed.scale, packed.zero, packed.bits, lowrank, sparse)


def cache(lengths, *, T=16, D=32, bits=(4, 2), keys="channel", rank=0, single=0, slack=1):
    """Packed K and V of runs with these lengths, slack blocks full of NaN scales between them, and the rows' bounds."""
    need = [-(-n // T) for n in lengths]
    start = torch.tensor([sum(need[:r]) + slack * r for r in range(len(need))])
    blocks = sum(need) + slack * len(need)
    k = pack(randn(blocks, T, D) + torch.linspace(-4, 4, D), bits[0], layout=keys)
    v = pack(randn(blocks, T, D), bits[1], layout="token", group=D // 2)
    k, v = with_corrections(k, rank, single), with_corrections(v, rank, single)
    used = torch.zeros(blocks, dtype=torch.bool)
    for s, n in zip(start.tolist(), need, strict=True):
        used[s : s + n] = True
    for packed in (k, v):
        packed.scale[~used], packed.zero[~used] = float("nan"), float("nan")
    length = torch.tensor(lengths, dtype=torch.int32)
    return k, v, {"start": start, "length": length, "longest": max(lengths)}


def rotary_centre(lengths, D, half, shared=False, size=5.0, axes=None):
    """A centre that turns, and positions with gaps, -1 where a run has no token; `shared` by the heads of a row. With
    `axes` each token has three, as a patch of an image behind a text has."""
    runs, n = len(lengths), max(lengths)
    positions = torch.randint(0, 4, (2 if runs > 2 else 1, 1 if shared else 2, n)).cumsum(-1) + 900
    if axes is not None:
        positions = positions + torch.randint(0, 40, (3, *positions.shape))
        axes = torch.tensor(axes, dtype=torch.int32)
    if not shared:
        positions = positions.masked_fill(torch.arange(n) >= torch.tensor(lengths).view(-1, 2, 1), -1)
    inv_freq = 10000.0 ** -(torch.arange(half) / half) * torch.ones(runs, 1)
    inv_freq[0] = 0  # a head whose centre stands still
    turn = {"centre": size * randn(runs, D), "inv_freq": inv_freq, "positions": positions.int()}
    return turn if axes is None else turn | {"axes": axes}


def truth(
    q, k, v, rows, scale, centre=None, inv_freq=None, positions=None, axes=None, softcap=None, valid=None
):  # fmt: skip
    """Ragged attention over everything unpacked."""
    keys, values = unpack(k), unpack(v)
    if inv_freq is not None:
        half = inv_freq.shape[1]
        shown = positions[None].expand(half, -1, -1, -1) if axes is None else positions[axes.long()]
        shown = shown.expand(-1, -1, len(inv_freq) // shown.shape[1], -1).flatten(1, 2)
        for r, (s, n) in enumerate(zip(rows["start"].tolist(), rows["length"].tolist(), strict=True)):
            angle = shown[:, r, :n].T.double() * inv_freq[r]
            c1, c2 = centre[r, :half].double(), centre[r, half : 2 * half].double()
            turned = torch.cat([c1 * angle.cos() - c2 * angle.sin(), c2 * angle.cos() + c1 * angle.sin()], 1)
            turned = torch.cat([turned, centre[r, 2 * half :].expand(n, -1)], 1)
            keys.flatten(0, 1)[s * k.block : s * k.block + n] += turned.float()
        centre = None
    if centre is not None:
        for r, (s, n) in enumerate(zip(rows["start"].tolist(), rows["length"].tolist(), strict=True)):
            keys[s : s + -(-n // k.block)] += centre[r]
    T = k.block
    if valid is not None:
        return dense_truth(q, keys, values, rows, T, scale, softcap, valid)
    out, lse = decode_attention(
        q.float(), keys.flatten(0, 1), values.flatten(0, 1), scale=scale,
        start=rows["start"] * T, length=rows["length"],
        softcap=softcap, _backend="reference",
    )  # fmt: skip
    return out, lse


def dense_truth(q, keys, values, rows, T, scale, softcap, valid):
    """The same with holes: the runs as rows of a dense store, what no run has or `valid` hides as its holes."""
    n, runs = rows["longest"], len(rows["start"])
    shape = (q.shape[0], runs // q.shape[0], n)
    seen = (torch.arange(n) < rows["length"][:, None]).view(shape) & valid[..., :n].expand(shape)
    where = ((rows["start"] * T)[:, None] + torch.arange(n)).clamp(max=keys.shape[0] * T - 1)
    k, v = (x.flatten(0, 1)[where].view(*shape, -1) for x in (keys, values))
    return decode_attention(q.float(), k, v, scale=scale, valid=seen, softcap=softcap, _backend="reference")


def differs(q, k, v, rows, scale, backend, tolerance=None, **centre):
    """What attention over the packed tokens gives otherwise than over the unpacked ones, "" = nothing."""
    out, lse = packed_attention(q, k, v, scale=scale, **rows, **centre, _backend=backend)
    if out.dtype != q.dtype or lse.dtype != torch.float32:
        return f"out is {out.dtype} and lse {lse.dtype}"
    return mismatch((out.float(), lse), truth(q, k, v, rows, scale, **centre), tolerance or 4 * TOLERANCE[q.dtype])


@BACKENDS
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (4, 2), ("fp8", "fp8"), (4, "fp8")])
def test_equals_attention_over_what_is_unpacked(backend, keys, bits, interpreted):
    k, v, rows = cache((48, 16, 7, 33), bits=bits, keys=keys)
    assert not differs(randn(2, 4, 1, 32), k, v, rows, 0.2, backend)


@BACKENDS
@pytest.mark.parametrize("rank, single", [(1, 0), (4, 0), (0, 5), (3, 40)])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_low_rank_and_single_corrections(backend, rank, single, keys, interpreted):
    k, v, rows = cache((48, 0, 32, 16), rank=rank, single=single, keys=keys)
    assert not differs(randn(1, 8, 3, 32), k, v, rows, 0.2, backend)


@BACKENDS
@pytest.mark.parametrize("T, D, group", [(32, 80, 1), (48, 64, 7), (128, 32, 4), (16, 20, 2)])
def test_block_sizes_head_dims_and_groups(backend, T, D, group, interpreted):
    k, v, rows = cache((T, 2 * T), T=T, D=D, rank=2, single=9)
    assert not differs(randn(1, 2 * group, 1, D), k, v, rows, D**-0.5, backend)


@BACKENDS
def test_runs_without_tokens_and_no_query(backend, interpreted):
    k, v, rows = cache((0, 16))
    out, lse = packed_attention(randn(1, 4, 1, 32), k, v, scale=0.2, **rows, _backend=backend)
    assert bool((out[:, :2] == 0).all()) and bool((lse[:, :2] == -torch.inf).all())
    assert bool(lse[:, 2:].isfinite().all())
    k, v, rows = cache((0, 0), slack=0)
    out, lse = packed_attention(randn(1, 4, 2, 32), k, v, scale=0.2, **rows, _backend=backend)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    k, v, rows = cache((16, 16))
    out, lse = packed_attention(randn(1, 4, 0, 32), k, v, scale=0.2, **rows, _backend=backend)
    assert out.shape == (1, 4, 0, 32) and lse.shape == (1, 4, 0)


@BACKENDS
def test_the_centre_changes_only_the_log_sum_exp(backend, interpreted):
    k, v, rows = cache((32, 16))
    q, centre = randn(1, 4, 2, 32), 5 * randn(2, 32)
    assert not differs(q, k, v, rows, 0.2, backend, centre=centre)
    with_centre = packed_attention(q, k, v, scale=0.2, centre=centre, **rows, _backend=backend)
    without = packed_attention(q, k, v, scale=0.2, **rows, _backend=backend)
    assert torch.equal(with_centre[0], without[0]) and not torch.equal(with_centre[1], without[1])


@BACKENDS
@pytest.mark.parametrize("D, half", [(32, 16), (64, 32), (80, 40), (96, 24), (128, 64), (20, 3)])
def test_a_centre_that_turns_with_the_position(backend, D, half, interpreted):
    lengths = (48, 16, 0, 33)
    k, v, rows = cache(lengths)
    if D != 32:
        k, v, rows = cache(lengths, D=D, rank=2, single=5)
    assert not differs(randn(2, 4, 3, D), k, v, rows, D**-0.5, backend, 1e-4, **rotary_centre(lengths, D, half))


@BACKENDS
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "D, sections, interleaved",
    [(32, [4, 6, 6], False), (32, [6, 5, 5], True), (80, [16, 12, 12], False), (20, [1, 1, 1], True)],
)
def test_a_centre_that_turns_with_three_axes(backend, D, sections, interleaved, shared, interpreted):
    lengths = (48, 16, 0, 33)
    k, v, rows = cache(lengths, D=D, rank=2, single=5)
    centre = rotary_centre(lengths, D, sum(sections), shared, 2.0, frequency_axes(sections, interleaved))
    assert not differs(randn(2, 4, 3, D), k, v, rows, D**-0.5, backend, 1e-4, **centre)


@BACKENDS
def test_three_axes_of_one_position_are_one_axis(backend, interpreted):
    k, v, rows = cache((48, 33))
    q, centre = randn(1, 4, 2, 32), rotary_centre((48, 33), 32, 16)
    plain = packed_attention(q, k, v, scale=0.2, **rows, **centre, _backend=backend)
    axes = torch.arange(16, dtype=torch.int32) % 3
    three = centre | {"positions": centre["positions"].expand(3, -1, -1, -1), "axes": axes}
    ours = packed_attention(q, k, v, scale=0.2, **rows, **three, _backend=backend)
    assert all(torch.equal(mine, true) for mine, true in zip(ours, plain, strict=True))


@BACKENDS
@pytest.mark.parametrize("keys, shared", [("channel", True), ("token", False)])
def test_a_large_turning_centre_keeps_its_accuracy_in_bf16(backend, keys, shared, interpreted):
    k, v, rows = cache((64, 48), keys=keys)
    centre = rotary_centre((64, 48), 32, 16, shared, size=600.0)
    q = (randn(1, 4, 1, 32) / 20).bfloat16()  # scores of some hundreds
    assert not differs(q, k, v, rows, 1.0, backend, 2.0**-6, **centre)


def test_a_centre_that_turns_by_nothing_stands_still(interpreted):
    k, v, rows = cache((48, 33))
    q, centre = randn(1, 4, 2, 32), rotary_centre((48, 33), 32, 16)
    still = packed_attention(q, k, v, scale=0.2, centre=centre["centre"], **rows, _backend="reference")
    for backend in ("reference", "triton"):
        ours = packed_attention(
            q, k, v, scale=0.2, **rows, **centre | {"inv_freq": 0 * centre["inv_freq"]}, _backend=backend
        )
        assert not mismatch(ours, still, 1e-4)


@pytest.mark.parametrize("split", [16, 32, 1000])
def test_a_turning_centre_does_not_depend_on_the_split(split, interpreted):
    k, v, rows = cache((80, 16, 0, 65))
    q, centre = randn(2, 4, 2, 32), rotary_centre((80, 16, 0, 65), 32, 16)
    turn = (centre["centre"], centre["inv_freq"], centre["positions"][None], None)
    ours = module._launch(q, k, v, scale=0.2, **rows, turn=turn, split=split)
    assert not mismatch(ours, truth(q, k, v, rows, 0.2, **centre), 1e-4)


@pytest.mark.parametrize("split", [16, 32, 1000])
def test_result_does_not_depend_on_the_split(split, interpreted):
    k, v, rows = cache((80, 16, 0, 65), rank=2, single=6)
    q = randn(2, 4, 2, 32)
    ours = module._launch(q, k, v, scale=0.2, **rows, split=split)
    assert not mismatch(ours, truth(q, k, v, rows, 0.2), 4e-5)


@pytest.mark.parametrize("tokens, queries", [(16, 3), (64, 512)])
def test_reference_does_not_depend_on_its_tiles(tokens, queries, monkeypatch):
    k, v, rows = cache((80, 16, 0, 65), rank=2, single=6)
    q = randn(2, 4, 2, 32)
    monkeypatch.setattr(tiles, "_TOKENS", tokens)
    monkeypatch.setattr(tiles, "_QUERIES", queries)
    assert not differs(q, k, v, rows, 0.2, "reference")
    assert not differs(q, k, v, rows, 0.2, "reference", 1e-4, **rotary_centre((80, 16, 0, 65), 32, 16))


def test_more_query_rows_than_a_tile_holds(interpreted):
    k, v, rows = cache((48, 32), rank=2, single=6)
    assert not differs(randn(1, 8, 20, 32), k, v, rows, 0.2, "triton")


def test_bf16_queries(interpreted):
    k, v, rows = cache((48, 32), rank=2, single=6)
    assert not differs(randn(1, 4, 1, 32, dtype=torch.bfloat16), k, v, rows, 0.2, "triton")
    assert not differs(randn(1, 4, 1, 32, dtype=torch.bfloat16), k, v, rows, 0.2, "reference")


@BACKENDS
def test_extreme_scores(backend, interpreted):
    keys = torch.full((2, 16, 32), -1e4 / 32)
    keys[1, 3] = 1e4 / 32  # one key at +1e4, all others at -1e4
    values = torch.arange(32.0).view(2, 16, 1).expand(2, 16, 32)
    k, v = pack(keys, 8, layout="token"), pack(values, 8, layout="token")
    rows = {"start": torch.tensor([0]), "length": torch.tensor([32]).int(), "longest": 32}
    out, lse = packed_attention(torch.ones(1, 1, 1, 32), k, v, scale=1.0, **rows, _backend=backend)
    assert not mismatch(out, torch.full((1, 1, 1, 32), 19.0))
    assert not mismatch(lse, torch.full((1, 1, 1), 1e4), 1e-3)


@BACKENDS
@pytest.mark.parametrize("centre", [None, "still", "turned", "partly"])
def test_soft_cap(backend, centre, interpreted):
    lengths = (48, 16, 0, 33)
    k, v, rows = cache(lengths, rank=2, single=5)
    q = 2 * randn(2, 4, 3, 32)
    options = {}
    if centre == "still":
        options = {"centre": 3 * randn(4, 32)}
    elif centre is not None:
        options = rotary_centre(lengths, 32, 16 if centre == "turned" else 5)
    assert not differs(q, k, v, rows, 0.3, backend, 2e-4, softcap=8.0, **options)
    bent = packed_attention(q, k, v, scale=0.3, softcap=8.0, **rows, **options, _backend=backend)
    assert bool((bent[1] <= 8.0 + torch.log(torch.tensor(48.0))).all())  # no score is above the cap


@BACKENDS
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_holes_are_never_seen_whatever_they_hold(backend, shared, softcap, interpreted):
    lengths = (48, 16, 0, 33)
    k, v, rows = cache(lengths, bits=("fp8", 4), keys="token", rank=2)
    valid = torch.rand(2, 1 if shared else 2, 60) > 0.4
    valid[1, -1] = False  # a run of which nothing is left
    assert not differs(randn(2, 6, 2, 32), k, v, rows, 0.3, backend, softcap=softcap, valid=valid)
    before = packed_attention(Q4, k, v, scale=0.3, valid=valid, softcap=softcap, **rows, _backend=backend)
    assert bool((before[1][1, -2:] == -torch.inf).all()) and bool((before[0][1, -2:] == 0).all())
    for r, (s, n) in enumerate(zip(rows["start"].tolist(), lengths, strict=True)):
        for j in (~valid.expand(2, 2, 60)[r // 2, r % 2, :n]).nonzero()[:, 0].tolist():
            block, token = s + j // 16, j % 16
            k.codes[block, token] = 0x7F  # NaN among 8-bit floats
            for packed in (k, v):
                packed.scale[block, token] = packed.zero[block, token] = float("nan")
                packed.lowrank.a[block, token] = float("nan")
    after = packed_attention(Q4, k, v, scale=0.3, valid=valid, softcap=softcap, **rows, _backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@BACKENDS
@pytest.mark.parametrize("T, rank, single", [(64, 0, 0), (128, 2, 40)])
def test_heads_of_512_channels(backend, T, rank, single, interpreted):
    k, v, rows = cache((T, T + 3), T=T, D=512, rank=rank, single=single)
    assert not differs(randn(1, 4, 1, 512), k, v, rows, 0.04, backend)


@BACKENDS
def test_strided_queries(backend, interpreted):
    k, v, rows = cache((48, 32))
    q = randn(1, 3, 4, 32).transpose(1, 2)
    assert not differs(q, k, v, rows, 0.2, backend)


def test_other_runs_do_not_matter(interpreted):
    k, v, rows = cache((48, 32), rank=2, single=6)
    q = randn(1, 2, 1, 32)
    before = packed_attention(q, k, v, scale=0.2, **rows, _backend="triton")
    shorter = rows | {"length": torch.tensor([48, 20]).int()}
    after = packed_attention(q, k, v, scale=0.2, **shorter, _backend="triton")
    assert torch.equal(before[0][:, 0], after[0][:, 0]) and not torch.equal(before[0][:, 1], after[0][:, 1])


K, V, ROWS = cache((16, 32), D=16)
Q4 = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(3))
Q = torch.zeros(1, 4, 1, 16)
TURN = rotary_centre((16, 32), 16, 8)
THREE = rotary_centre((16, 32), 16, 8, axes=frequency_axes([2, 3, 3], False))


@pytest.mark.parametrize(
    "q, k, v, options, message",
    [
        (Q[0], K, V, {}, r"q has shape \[4, 1, 16\]; it must be \[B, H, m, D\]"),
        (Q.double(), K, V, {}, "q is float64"),
        (Q[:, :3], K, V, {}, r"start has shape \[2\]; it must be \[B \* G\], B = 1 and G a divisor of H = 3"),
        (Q[..., :8], K, V, {}, r"k.codes has shape \[5, 8, 16\]; it must be \[5, 8, 8\]"),
        (Q, K, V.take(torch.tensor([0])), {}, r"v.codes has shape \[1, 4, 16\]; it must be \[5, 4, 16\]"),
        (Q, K, K, {}, "v is packed per channel; values are packed per token"),
        (Q, with_corrections(K, 17, 0), V, {}, "k has rank 17; the kernel takes at most 16"),
        (Q, K, V, {"start": ROWS["start"].int()}, "start is int32; it must be int64"),
        (Q, K, V, {"length": ROWS["length"].long()}, "length is int64; it must be int32"),
        (Q, K, V, {"length": ROWS["length"] * 10}, "do not fit 5 blocks of 16 tokens"),
        (Q, K, V, {"longest": 16}, "longest=16 do not fit"),
        (Q, K, V, {"centre": torch.zeros(1, 16)}, r"centre has shape \[1, 16\]; it must be \[2, 16\]"),
        (Q, K, V, {"inv_freq": torch.zeros(2, 8)}, "inv_freq turn a centre .* pass centre and positions"),
        (Q, K, V, TURN | {"inv_freq": torch.zeros(2, 9)}, r"inv_freq has shape \[2, 9\]; the limit is D / 2 = 8 pairs"),
        (Q, K, V, TURN | {"inv_freq": torch.zeros(1, 8)}, r"inv_freq has shape \[1, 8\]; it must be \[2, R/2\]"),
        (Q, K, V, TURN | {"positions": torch.zeros(1, 2, 32)}, "positions is float32; it must be int32"),
        (Q, K, V, TURN | {"positions": torch.zeros(1, 2, 31).int()}, r"positions has shape \[1, 2, 31\].* n >= 32"),
        (Q, K, V, {"softcap": -1.0}, "softcap=-1.0 must be above 0"),
        (Q, K, V, {"valid": torch.ones(1, 2, 32)}, "valid is float32; it must be bool"),
        (Q, K, V, {"valid": torch.ones(1, 2, 31).bool()}, r"valid has shape \[1, 2, 31\].* \[1, 2 or 1, n >= 32\]"),
        (Q, K, V, {"valid": torch.ones(1, 3, 32).bool()}, r"valid has shape \[1, 3, 32\]; it must be \[1, 2 or 1"),
        (Q, K, V, THREE | {"positions": TURN["positions"]}, r"positions has shape \[1, 2, 32\]; it must be \[3, 1, "),
        (Q, K, V, THREE | {"positions": THREE["positions"][..., :9]}, r"it must be \[3, 1, 2 or 1, n >= 32\]"),
        (Q, K, V, THREE | {"axes": THREE["axes"][:7]}, r"axes has shape \[7\]; it must be \[8\]"),
        (Q, K, V, THREE | {"axes": THREE["axes"] + 1}, r"axes holds \[1, 2, 3\]; .* axis 0 \(t\), 1 \(h\) or 2 \(w\)"),
    ],
)
def test_errors_name_the_argument(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, scale=1.0, **(ROWS | options))
