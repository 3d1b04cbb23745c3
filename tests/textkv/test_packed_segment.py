"""The packed segment: attention over codes, blocks that stay where they are, rows, saving; and the stack around it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.compare import mismatch
from textkv.kernels import decode_attention
from textkv.methods.gear import Gear
from textkv.segments.base import Step, storage_bytes
from textkv.segments.block_pool import blocks_of
from textkv.segments.dense import DenseSegment
from textkv.segments.packed import PackedSegment
from textkv.segments.stack import StackSegment

D = 24
PACKER = Gear(4, group=16, residual=16, prompt_rank=3, rank=2, outliers=0.25)
UNIFORM, RAGGED = [[48, 48], [48, 48]], [[48, 0], [16, 32]]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def grow(segment: PackedSegment, counts: list[list[int]], prompt: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs random tokens; returns the exact keys and values [batch, heads, n, D], 0 where a run has none."""
    counts = torch.tensor(counts)
    n, before = int(counts.max()), segment.lengths() if segment.pools else torch.zeros_like(counts)
    real = torch.arange(n) < counts[..., None]
    k, v = (torch.randn(*counts.shape, n, D) * real[..., None] for _ in range(2))
    positions = (before[..., None] + torch.arange(n)).masked_fill(~real, -1).int()
    if bool((positions == positions[:, :1]).all()):
        positions = positions[:, :1]
    # three rotary positions that no index tells, in rows of one origin each
    places = None if segment.axes is None else torch.stack([positions // 5, positions % 5, positions * 3]).int()
    centred = (k - segment.centres(positions if places is None else places)) * real[..., None]
    packed = PACKER.encode(centred.flatten(0, 1), v.flatten(0, 1), counts.view(-1), prompt)
    segment.take(*packed, counts, positions, places)
    return k, v


def make(counts, flushes: int = 0, centre: str = "turned") -> PackedSegment:
    inv_freq = 10000.0 ** -(torch.arange(9) / 9) * torch.ones(2, 2, 1)  # 18 of 24 dims turn
    inv_freq[0, 1] = 0
    segment = PackedSegment(torch.float32, 3 * torch.randn(2, 2, D) if centre != "none" else None)
    segment.inv_freq = inv_freq if centre in ("turned", "three axes") else None
    segment.axes = torch.arange(9, dtype=torch.int32) % 3 if centre == "three axes" else None
    grow(segment, counts, prompt=True)
    for _ in range(flushes):
        grow(segment, [[16, 16], [16, 16]], prompt=False)
    return segment


def attention_over_what_is_stored(segment, q):
    held = segment.stored()
    return decode_attention(q, held.keys, held.values, scale=0.3, valid=held.positions >= 0)


@pytest.mark.parametrize("counts", [UNIFORM, RAGGED])
@pytest.mark.parametrize("flushes", [0, 1, 5])
@pytest.mark.parametrize("centre", ["three axes", "turned", "fixed", "none"])
def test_attends_as_over_what_the_codes_stand_for(counts, flushes, centre):
    segment, q = make(counts, flushes, centre), torch.randn(2, 6, 3, D)
    for ours, true in zip(segment.attend(q, 0.3), attention_over_what_is_stored(segment, q), strict=True):
        assert not mismatch(ours, true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("counts", [UNIFORM, RAGGED])
def test_stores_each_token_near_what_it_was(counts):
    segment = PackedSegment(torch.float32, torch.full((2, 2, D), 40.0))
    parts = [grow(segment, counts, True), *(grow(segment, [[16, 16], [16, 16]], False) for _ in range(3))]
    held = segment.stored()
    assert torch.equal((held.positions >= 0).sum(-1), segment.lengths())
    for exact, ours in zip((torch.cat(x, 2) for x in zip(*parts, strict=True)), (held.keys, held.values), strict=True):
        real = held.positions >= 0
        # a row's tokens come in the order in which they were packed, its missing slots between the packings
        assert float((ours - exact)[real].abs().max()) < 0.25
    for row in held.positions.flatten(0, 1):
        assert row[row >= 0].tolist() == list(range(int((row >= 0).sum())))


def test_a_head_that_comes_late_gets_a_centre_of_its_own_and_leaves_the_others_theirs():
    """What lies in the others was packed around centres that stand still; the new one turns, by three positions."""
    segment, q = make([[32, 0], [16, 16]], centre="fixed"), torch.randn(2, 6, 3, D)
    before, late = segment.stored(), torch.tensor([[False, True], [False, False]])
    axes, inv_freq = torch.arange(9, dtype=torch.int32) % 3, torch.full((2, 2, 9), 0.3)
    segment.set_centre(late, torch.randn(2, 2, D), inv_freq, axes, lambda at: torch.stack([at // 5, at % 5, at * 3]))
    held = segment.stored()
    real = before.positions >= 0
    assert torch.equal(held.keys[real], before.keys[real])
    k, _ = grow(segment, [[0, 16], [0, 16]], prompt=False)
    held = segment.stored()
    assert float((held.keys[0, 1][held.positions[0, 1] >= 0] - k[0, 1]).abs().max()) < 0.25
    for ours, true in zip(segment.attend(q, 0.3), attention_over_what_is_stored(segment, q), strict=True):
        assert not mismatch(ours, true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_packed_stays_bit_for_bit_in_one_pool_where_it_can(rank, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKER", replace(PACKER, prompt_rank=rank, rank=min(rank, 2)))
    segment = make([[256, 256], [256, 256]])
    held, moved = [], 0
    for _ in range(12):
        where = segment.pools[-1].k.codes.data_ptr()
        grow(segment, [[16, 16], [16, 16]], prompt=False)
        moved += where != segment.pools[-1].k.codes.data_ptr()
        at = segment.stored()
        if held:
            n = held[-1].keys.shape[2]
            assert torch.equal(at.keys[:, :, :n], held[-1].keys) and torch.equal(at.values[:, :, :n], held[-1].values)
        held.append(at)
    # 16 tokens at a time, room for an eighth of what is there; other ranks need another pool
    assert len(segment.pools) == (2 if rank else 1)
    assert moved <= 6
    used = sum(int(pool.counts.sum()) for pool in segment.pools)
    room = sum(len(pool.k.codes) * 16 for pool in segment.pools)
    assert used <= room <= 1.13 * used


def test_heads_of_other_lengths_leave_the_prompt_s_blocks_where_they_are():
    segment = make([[256, 16], [64, 128]])
    first = {name: (x.data_ptr(), x.clone()) for name, x in segment.tensors().items() if name.startswith("0.")}
    for _ in range(6):
        grow(segment, [[16, 16], [16, 16]], prompt=False)
        now = segment.tensors()
        assert all(now[name].data_ptr() == where and torch.equal(now[name], x) for name, (where, x) in first.items())
    assert len(segment.pools) == 2  # what came since is of one length


def test_room_that_heads_fill_at_their_own_pace():
    segment = make([[256, 256], [256, 256]], centre="none")
    for flush in ([[16, 0], [0, 0]], [[0, 16], [16, 16]], [[16, 16], [0, 16]], [[16, 16], [16, 0]], [[16, 0], [0, 0]]):
        grow(segment, flush, prompt=False)
        q = torch.randn(2, 2, 1, D)
        for ours, true in zip(segment.attend(q, 0.3), attention_over_what_is_stored(segment, q), strict=True):
            assert not mismatch(ours, true, rtol=2e-5, atol=2e-5)
    assert segment.lengths().tolist() == [[320, 304], [288, 288]]
    assert len(segment.pools) < 5


@pytest.mark.parametrize("counts", [UNIFORM, RAGGED])
@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1]])
@pytest.mark.parametrize("centre", ["three axes", "turned"])
def test_rows_move_and_leave_with_all_that_is_theirs(counts, rows, centre):
    segment, rows = make(counts, 3, centre), torch.tensor(rows)
    before, weight = segment.stored(), storage_bytes(list(segment.tensors().values()))
    segment.take_rows(rows)
    after = segment.stored()
    width = after.keys.shape[2]
    for row, old in enumerate(rows.tolist()):
        for head in range(2):
            real, was = after.positions[row, head] >= 0, before.positions[old, head] >= 0
            assert torch.equal(after.keys[row, head][real], before.keys[old, head][was])
            assert torch.equal(after.values[row, head][real], before.values[old, head][was])
            assert torch.equal(after.positions[row, head][real], before.positions[old, head][was])
    assert width == int(sum(pool.counts.amax() for pool in segment.pools))
    if len(rows) == 1:
        assert storage_bytes(list(segment.tensors().values())) < 0.75 * weight
    grow(segment, [[16, 16]] * len(rows), prompt=False)  # goes on from there
    assert segment.lengths().tolist() == [[n + 64 for n in counts[row]] for row in rows.tolist()]


@pytest.mark.parametrize("centre", ["three axes", "turned"])
def test_a_copy_and_a_saved_one_hold_the_same(centre):
    segment = make(RAGGED, 4, centre)
    assert ("0.rope" in segment.tensors()) == (centre == "three axes")
    for other in (copy.deepcopy(segment), PackedSegment.from_state(segment.state())):
        assert all(torch.equal(a, b) for a, b in zip(other.tensors().values(), segment.tensors().values(), strict=True))
        grow(other, [[16, 16], [16, 16]], prompt=False)
        q = torch.randn(2, 2, 1, D)
        for ours, true in zip(other.attend(q, 0.3), attention_over_what_is_stored(other, q), strict=True):
            assert not mismatch(ours, true, rtol=2e-5, atol=2e-5)


def test_single_tokens_are_refused():
    segment = make(UNIFORM)
    x = torch.zeros(2, 2, 1, D)
    with pytest.raises(RuntimeError, match="whole blocks; single tokens go to the segment behind it"):
        segment.extend(Step(x, x, x, torch.zeros(2, 1).int(), 1.0), need_lse=True)
    segment.crop(0)
    with pytest.raises(ValueError, match="cannot be taken back one by one"):
        segment.crop(1)


def test_cutting_into_blocks():
    x = torch.arange(2 * 32.0).view(2, 32, 1)
    assert torch.equal(blocks_of(x, torch.tensor([32, 32]), 16), x.view(4, 16, 1))
    assert torch.equal(blocks_of(x, torch.tensor([0, 32]), 16), x[1:].view(2, 16, 1))


def stack() -> StackSegment:
    buffer = DenseSegment()
    x = torch.randn(2, 2, 5, D)
    buffer.extend(Step(x, x, x, torch.arange(48, 53).expand(2, 5).int(), 0.3), need_lse=True)
    return StackSegment([make(UNIFORM), buffer])


def test_a_stack_is_its_segments_one_behind_the_other():
    segment = stack()
    assert segment.lengths().tolist() == [[53, 53], [53, 53]]
    q, x = torch.randn(2, 4, 1, D), torch.randn(2, 2, 1, D)
    out, lse = segment.extend(Step(q, x, x, torch.full((2, 1), 53).int(), 0.3), need_lse=False)
    for ours, true in zip((out, lse), attention_over_what_is_stored(segment, q), strict=True):
        assert not mismatch(ours, true, rtol=2e-5, atol=2e-5)
    again = StackSegment.from_state(segment.state())
    for ours, true in zip(again.attend(q, 0.3), (out, lse), strict=True):
        assert not mismatch(ours, true)
    segment.crop(1)
    segment.take_rows(torch.tensor([1]))
    assert segment.lengths().tolist() == [[53, 53]]
    assert set(segment.tensors()) >= {"0.centre", "0.0.k.codes", "1.k", "1.positions"}
