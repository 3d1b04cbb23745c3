"""The renumbered segment: how often a key is turned, what a screenshot's tokens are as wide as, and its refusal."""

import pytest
import torch

from tests.textkv.methods.test_lacache_ladder import Stream
from textkv.kernels import rotate
from textkv.methods.lacache import Ladder
from textkv.positions import RotarySpec
from textkv.segments.base import Step
from textkv.segments.renumbered import RenumberedSegment

FREQ = 10000 ** -(torch.arange(4) / 4)


def filled(keys, rope=None):
    """A segment that holds keys [1, 1, n, 8], turned to their rotary positions."""
    n = keys.shape[2]
    rope = torch.arange(n)[None] if rope is None else rope
    segment = RenumberedSegment(RotarySpec.halves(FREQ))
    segment.extend(tokens(rotate(keys, rope, FREQ), rope), need_lse=False)
    return segment


def tokens(k, rope, first=0):
    positions = torch.arange(first, first + k.shape[2], dtype=torch.int32)[None]
    return Step(k, k, k, positions, 1.0, rope_positions=rope)


def test_keys_are_turned_to_their_places_at_most_twice_a_pass(monkeypatch):
    """Rounding does not pile up: a key moves to the front once, and back behind it once when a pass begins anew."""
    turns = torch.zeros(200, dtype=torch.int64)
    renumber = RenumberedSegment._renumber

    def counted(self, index):
        turn = renumber(self, index)
        turns[self.positions[0, 0, index[0]].long()] += turn[0] != 0
        return turn

    monkeypatch.setattr(RenumberedSegment, "_renumber", counted)
    ladder, keys = Ladder(8, 2, 0), torch.randn(1, 1, 200, 8, generator=torch.Generator().manual_seed(0))
    naive = Stream(ladder, 30, 2, 8, [1])
    segment, cursor = filled(keys[:, :, :30]), 2
    naive.feed(*range(30))
    for token in range(30, 200):
        rope = torch.tensor([[token]])
        segment.extend(tokens(rotate(keys[:, :, token : token + 1], rope, FREQ), rope, token), need_lse=False)
        slots, cursor = ladder.compact(segment.used, 30, cursor, layer=2, sinks=2, recent=8)
        if len(slots) < segment.used:
            segment.keep(slots[None, None])
        naive.feed(token)
    held = segment.positions[0, 0, : segment.used].tolist()
    assert held == naive.held[1] and naive.passes > 2
    assert int(turns.max()) <= 2 * naive.passes
    back = segment.cache_positions() - segment.rope[:, : segment.used]
    exact = rotate(keys[:, :, held], torch.arange(len(held)), FREQ)
    torch.testing.assert_close(rotate(segment._k(), back, FREQ), exact, atol=1e-5, rtol=0)


def test_a_screenshot_is_as_wide_as_its_last_token():
    """M-RoPE: image tokens share one temporal position; what is dropped takes its own width along, and no more."""
    rope = torch.tensor([[0, 1, 2, 2, 2, 5, 6]])
    keys = torch.randn(1, 1, 7, 8)
    inside = filled(keys, rope)
    inside.keep(torch.tensor([[[0, 1, 2, 4, 5, 6]]]))
    assert inside.cache_positions().tolist() == [[0, 1, 2, 2, 5, 6]] and inside.gap.tolist() == [0]
    to_the_end = filled(keys, rope)
    to_the_end.keep(torch.tensor([[[0, 1, 2, 5, 6]]]))
    assert to_the_end.cache_positions().tolist() == [[0, 1, 2, 2, 3]] and to_the_end.gap.tolist() == [3]
    assert to_the_end.front == [3] and to_the_end.rope.tolist() == [[0, 1, 2, 5, 6]]


def test_heads_share_what_is_kept():
    with pytest.raises(ValueError, match="heads of a renumbered layer keep the same tokens"):
        filled(torch.randn(1, 1, 4, 8)).keep(torch.zeros(1, 2, 1, dtype=torch.int64))
