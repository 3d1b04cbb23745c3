"""The coded segment: tokens stay as they are when others go, padding is nothing, outliers do without the centre."""

from __future__ import annotations

import copy

import pytest
import torch

from textkv.kernels import decode_attention
from textkv.segments.base import Step, Stored
from textkv.segments.coded import CodedSegment, Coding
from textkv.segments.ragged import RaggedSegment


def segment_of(keys, values, bits=(4, 4), fit="norm", signs=None, centre=None, positions=None, ragged=False):
    """A coded segment of keys and values [batch, heads, n, head_dim]."""
    signs = torch.ones(2, keys.shape[-1], dtype=torch.int8) if signs is None else signs
    segment = CodedSegment(torch.float32, Coding(signs, bits, fit), centre)
    at = torch.arange(keys.shape[2]).expand(keys.shape[:3]).int() if positions is None else positions
    segment.take(Stored(keys, values, at), ragged)
    return segment


@pytest.mark.parametrize("ragged", [False, True])
def test_what_stays_is_not_touched_when_others_go(ragged):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    segment = segment_of(keys, values, (3, 2), ragged=ragged)
    before, index = segment.stored(), torch.rand(2, 3, 40).argsort(-1)[..., :17].sort(-1).values
    segment.keep(index)
    after, pick = segment.stored(), index[..., None].expand(2, 3, 17, 16)
    assert torch.equal(after.keys, before.keys.gather(2, pick))
    assert torch.equal(after.values, before.values.gather(2, pick))
    assert torch.equal(after.positions, before.positions.gather(2, index))
    mask = torch.rand(2, 3, 17) > 0.4  # from now on each head its own number
    segment.keep_mask(mask)
    assert isinstance(segment.rows, RaggedSegment) and torch.equal(segment.lengths(), mask.sum(-1))
    left = segment.stored()
    assert torch.equal(left.keys[left.positions >= 0], after.keys[mask])


def test_a_padded_batch_codes_padding_as_nothing():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 16)
    positions = torch.arange(10).expand(2, 2, 10).int().clone()
    positions[1, :, :4], positions[1, :, 4:] = -1, torch.arange(6).int()
    keys[1, :, :4] = torch.nan
    segment = segment_of(keys, values, centre=torch.randn(2, 2, 16), positions=positions)
    assert torch.equal(segment.stored().values[1, :, :4], torch.zeros(2, 4, 16))
    q, held = torch.randn(2, 4, 1, 16), segment.stored()
    true = decode_attention(q, held.keys, held.values, scale=0.25, valid=positions >= 0)
    for ours, expected in zip(segment.attend(q, 0.25), true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert segment.lengths().tolist() == [[10, 10], [6, 6]]


def test_a_key_that_is_unlike_all_others_is_coded_without_the_centre():
    torch.manual_seed(0)
    keys = 30 + torch.randn(1, 1, 64, 32)
    keys[:, :, 0] = torch.randn(32)  # a first token's
    segment = segment_of(keys, keys, centre=keys.mean(2))
    gap = (segment.stored().keys - keys)[0, 0].norm(dim=-1)
    far = segment_of(keys[:, :, :1], keys[:, :, :1], centre=keys.mean(2) * 0).stored().keys - keys[:, :, :1]
    assert float(gap[0]) == pytest.approx(float(far.norm()), rel=1e-3) and float(gap.max()) < 2
    q = torch.randn(1, 2, 1, 32)
    held = segment.stored()
    for ours, true in zip(segment.attend(q, 0.2), decode_attention(q, held.keys, held.values, scale=0.2), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


def grown(ragged: bool) -> CodedSegment:
    """A segment with a centre that took tokens one by one, half-way through a batch that decodes."""
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    at = torch.arange(12).expand(2, 2, 12).int().clone()
    at[0, 1, 9:] = -1  # one head holds less
    segment = segment_of(keys, values, (2, 3), centre=torch.randn(2, 2, 16), positions=at, ragged=ragged)
    for i in range(12, 20):
        q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        segment.extend(Step(q, k, v, torch.full((2, 1), i).int(), 0.25), need_lse=False)
    return segment


@pytest.mark.parametrize("ragged", [False, True])
def test_copies_saved_ones_and_moved_rows_hold_the_same(ragged):
    segment = grown(ragged)
    held = segment.stored()
    assert segment.lengths().tolist() == [[20, 17], [20, 20]]
    for other in (copy.deepcopy(segment), CodedSegment.from_state(segment.state())):
        assert all(torch.equal(x, segment.tensors()[name]) for name, x in other.tensors().items())
        other.take_rows(torch.tensor([1, 0, 1]))
        moved = other.stored()
        for new, old in enumerate((1, 0, 1)):
            now, was = moved.positions[new] >= 0, held.positions[old] >= 0
            assert torch.equal(moved.keys[new][now], held.keys[old][was])
            assert torch.equal(moved.values[new][now], held.values[old][was])
    segment.crop(5)
    left = segment.stored()
    assert segment.lengths().tolist() == [[15, 12], [15, 15]]
    assert torch.equal(left.keys[1], held.keys[1, :, :15])


@pytest.mark.parametrize("ragged", [False, True])
def test_hidden_tokens_are_not_seen(ragged):
    segment, q = grown(ragged), torch.randn(2, 4, 3, 16)
    held, hidden = segment.stored(), torch.zeros(2, 20, dtype=torch.bool)
    hidden[0, 3:9] = True
    real = (held.positions >= 0) & ~((held.positions >= 3) & (held.positions < 9) & hidden[:, None, 3:4])
    true = decode_attention(q, held.keys, held.values, scale=0.25, valid=real)
    for ours, expected in zip(segment.attend(q, 0.25, hidden=hidden), true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_heads_that_are_stored_several_times_are_coded_several_times():
    keys, x = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 1, 16)
    segment = segment_of(keys, keys, centre=torch.randn(1, 4, 16))
    segment.head_repeat = 2
    segment.append(Step(torch.randn(1, 4, 1, 16), x, x, torch.full((1, 1), 10).int(), 0.25))
    held = segment.stored()
    assert segment.lengths().tolist() == [[11] * 4] and held.keys.shape == (1, 4, 11, 16)
    assert torch.equal(held.values[:, ::2, -1], held.values[:, 1::2, -1])
