"""Two layers' tokens in one store: what each layer gets back, how much it holds, and that it moves as a whole."""

import pytest
import torch

from tests.compare import mismatch
from textkv.kernels import decode_attention
from textkv.segments import paired
from textkv.segments.base import Step, storage_bytes
from textkv.segments.dense import DenseSegment
from textkv.segments.paired import Merging, Pair, PairedSegment
from textkv.slerp import Retention

BATCH, HEADS, DIM = 2, 2, 16


def layer_pair(n, seed=0, noise=0.3, dtype=torch.float32):
    """Two dense layers of n tokens whose vectors are alike, but for noise."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, BATCH, HEADS, n, DIM, generator=g)
    layers = []
    for scale in (1.0, 2.0):
        k, v = (scale * (shared + noise * torch.randn(shared.shape, generator=g))).to(dtype)
        segment = DenseSegment()
        at = torch.arange(n, dtype=torch.int32).expand(BATCH, n)
        segment.extend(Step(k[:, :, :, :], k, v, at, 1.0), need_lse=True)
        layers.append(segment)
    return tuple(layers)


def how(t=0.6, gamma=0.05, rule="range", sinks=0, **packing):
    return Merging(t, Retention(rule, gamma), sinks, **packing)


def absorbed(layers, merging, *cuts):
    """Both sides of a pair that took the tokens in one go, or in pieces that end at `cuts`."""
    pair = Pair((1, 2), layers[0].k)
    ends = (0, *cuts, layers[0].used)
    for start, stop in zip(ends, ends[1:], strict=False):
        pair.absorb(layers, torch.arange(start, stop).expand(BATCH, 1, -1), merging)
    return PairedSegment(pair, 0), PairedSegment(pair, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_at_the_end_of_the_arc_gets_its_own_vectors_back(dtype):
    layers = layer_pair(40, dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for side in (0, 1):
        ours, true = absorbed(layers, how(t=side, gamma=0))[side].stored(), layers[side].stored()
        assert ours.keys.dtype == dtype
        assert not mismatch(ours.keys, true.keys, rtol=tolerance, atol=tolerance)
        assert not mismatch(ours.values, true.values, rtol=tolerance, atol=tolerance)
        assert torch.equal(ours.positions, true.positions)


@pytest.mark.parametrize("rule", ["range", "topk"])
@pytest.mark.parametrize("bits", [16, 4])
def test_all_kept_is_the_full_cache_bit_for_bit(rule, bits):
    layers = layer_pair(64)
    for side, segment in enumerate(absorbed(layers, how(gamma=1.0, rule=rule, bits=bits))):
        assert torch.equal(segment.stored().keys, layers[side].stored().keys)
        assert torch.equal(segment.stored().values, layers[side].stored().values)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_lengths_are_kept_whatever_the_bits(bits):
    layers = layer_pair(64)
    for side, segment in enumerate(absorbed(layers, how(bits=bits))):
        ours, true = segment.stored(), layers[side].stored()
        assert not mismatch(ours.keys.norm(dim=-1), true.keys.norm(dim=-1))
        assert not mismatch(ours.values.norm(dim=-1), true.values.norm(dim=-1))


def test_more_bits_are_nearer_to_the_unpacked_pair():
    layers = layer_pair(64)
    plain = absorbed(layers, how())[0].stored().keys
    gaps = [float((absorbed(layers, how(bits=bits))[0].stored().keys - plain).norm()) for bits in (2, 4, 8)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]


def test_first_tokens_and_the_most_unlike_stay_exact():
    layers = layer_pair(50)
    layers[1].k[:, :, 20] *= -1
    pair = absorbed(layers, how(sinks=3))
    for side, segment in enumerate(pair):
        same = (segment.stored().keys == layers[side].stored().keys).all(-1)
        assert same[:, :, :3].all() and same[:, :, 20].all() and same.float().mean() < 0.25


@pytest.mark.parametrize("bits", [16, 4])
def test_attention_is_that_over_the_restored_tokens(monkeypatch, bits):
    monkeypatch.setattr(paired, "BLOCK", 32)
    sides = absorbed(layer_pair(96), how(bits=bits, group=16))
    q = torch.randn(BATCH, 2 * HEADS, 3, DIM, generator=torch.Generator().manual_seed(1))
    for segment in sides:
        assert len(segment.pair.blocks) == 3
        held = segment.stored()
        expected = decode_attention(q, held.keys, held.values, scale=0.25)
        for ours, true in zip(segment.attend(q, 0.25), expected, strict=True):
            assert not mismatch(ours, true)


@pytest.mark.parametrize("bits", [16, 4])
def test_blocks_added_one_by_one_are_the_tokens_taken_at_once(bits):
    """With the range of the whole set frozen, and whatever is put together on the way."""
    layers = layer_pair(96)
    merging = how(bits=bits, group=16, gamma=0.3)
    whole = absorbed(layers, merging)
    pair = Pair((1, 2), layers[0].k)
    pair.extents = whole[0].pair.extents
    for start in range(0, 96, 16):
        pair.absorb(layers, torch.arange(start, start + 16).expand(BATCH, 1, -1), merging)
    assert len(pair.blocks) == 1
    for side in (0, 1):
        ours, true = PairedSegment(pair, side).stored(), whole[side].stored()
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(ours, name), getattr(true, name))


def test_what_was_merged_is_never_touched_again(monkeypatch):
    monkeypatch.setattr(paired, "BLOCK", 32)
    layers = layer_pair(96)
    pair = absorbed(layers, how(), 32, 64)[0].pair
    first = pair.blocks[0]
    addresses = [x.data_ptr() for x in (first.keys.unit, first.values.unit)]
    before = first.keys.restored(0).clone()
    pair.absorb(layers, torch.arange(80, 96).expand(BATCH, 1, -1), how())
    assert pair.blocks[0] is first and addresses == [first.keys.unit.data_ptr(), first.values.unit.data_ptr()]
    assert torch.equal(first.keys.restored(0), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype):
    """Per pair, tensor, token and head: D + 2 numbers, and per kept token 2 D more and an index."""
    n, size = 256, dtype.itemsize
    sides = absorbed(layer_pair(n, dtype=dtype), how(gamma=0.1))
    block = sides[0].pair.blocks[0]
    kept = len(block.keys.slots) + len(block.values.slots)
    held = storage_bytes([x for side in sides for x in side.tensors().values()])
    vectors = 2 * BATCH * HEADS * n * (DIM + 2) * size + kept * (2 * DIM * size + 4)
    assert kept and held == vectors + BATCH * n * 4 + 4 * BATCH * HEADS * 4
    assert held < 0.72 * storage_bytes([x for layer in layer_pair(n, dtype=dtype) for x in (layer.k, layer.v)])


def test_four_bits_hold_a_third_of_the_bytes_of_sixteen():
    layers = layer_pair(1024, dtype=torch.float16)
    sizes = [
        storage_bytes([x for side in absorbed(layers, how(gamma=0, bits=bits)) for x in side.tensors().values()])
        for bits in (16, 4)
    ]
    # 16 channels of 4 bits, 2 lengths, a key's share of a scale and minimum, a value's own, half a position
    assert sizes[1] / sizes[0] == pytest.approx((16 * 4.0 + 32 + (16 + 32) / 2 + 8) / (16 * 16 + 32 + 8), rel=0.02)


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_move_together(bits):
    sides = absorbed(layer_pair(64), how(bits=bits, gamma=0.2))
    before = [segment.stored() for segment in sides]
    rows = torch.tensor([1, 0, 1])
    for segment in sides:
        segment.take_rows(rows)
    for segment, old in zip(sides, before, strict=True):
        now = segment.stored()
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(now, name), getattr(old, name)[rows])
    assert sides[0].pair.extents["keys"].high.shape == (3, HEADS)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_state_of_both_sides_makes_the_pair_again(bits):
    sides = absorbed(layer_pair(64), how(bits=bits))
    first, second = (PairedSegment.from_state(side.state()) for side in sides)
    second.rejoin([first, DenseSegment()])
    assert second.pair is first.pair
    for ours, true in zip((first, second), sides, strict=True):
        assert torch.equal(ours.stored().keys, true.stored().keys)
        assert torch.equal(ours.lengths(), true.lengths())
    with pytest.raises(ValueError, match="the one before it holds dense; load both layers"):
        PairedSegment.from_state(sides[1].state()).rejoin([DenseSegment()])


def test_what_is_not_finite_is_told_with_layer_and_head():
    layers = layer_pair(8)
    layers[1].k[0, 1, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="layer 2, KV head 1: the keys hold NaN"):
        absorbed(layers, how())
    layers = layer_pair(8)
    layers[0].v[1, 0, 3, 2] = torch.inf
    with pytest.raises(ValueError, match="layer 1, KV head 0: the values hold NaN, inf"):
        absorbed(layers, how())


def test_merged_tokens_cannot_be_cropped():
    segment = absorbed(layer_pair(8), how())[0]
    segment.crop(0)
    with pytest.raises(ValueError, match="3 merged tokens cannot be taken back"):
        segment.crop(3)
