"""Conversations that are played through: small cases by hand, and what must hold whatever the order."""

from __future__ import annotations

import pytest

from textkv.crowd import Rates, Turns, order_of, play

TURNS = Turns(seen=[10, 20, 30], bytes=[1, 2, 3])


def test_with_room_for_all_only_new_tokens_are_read():
    played = play(TURNS, order_of(4, 3), memory=12)
    assert (played.new, played.memory, played.disk, played.lost) == (4, 8, 0, 0)
    assert (played.prefill_tokens, played.prefill_tokens_full, played.peak_bytes) == (120, 240, 12)


def test_without_any_room_all_is_read_again():
    played = play(TURNS, order_of(4, 3), memory=0)
    assert played.lost == 8 and played.prefill_tokens == played.prefill_tokens_full and not played.peak_bytes


def test_who_was_used_longest_ago_goes_first():
    # 0 and 1 fit; 2 pushes 0 out, which then finds nothing.
    played = play(Turns([10, 20], [1, 1]), [0, 1, 2, 1, 0], memory=2)
    assert (played.memory, played.lost) == (1, 1)
    assert play(Turns([10, 20], [1, 1]), [0, 1, 2, 1, 0], memory=2, disk=2).disk == 1


def test_tiers_add_up_and_more_room_never_hurts():
    last = 1.1
    for memory in (0, 5, 10, 20, 40):
        played = play(TURNS, order_of(20, 3, seed=1), memory, disk=10)
        row = played.row()
        assert played.new + played.memory + played.disk + played.lost == played.steps == 60
        assert played.peak_bytes <= memory and row["read_again"] <= last
        last = row["read_again"]


def test_seconds_follow_from_rates():
    played = play(TURNS, order_of(2, 3), memory=0, disk=100)
    assert played.seconds(Rates(10, 1, 1), answer=2) == pytest.approx(60 / 10 + 6 * 2 + played.bytes_loaded)
    assert played.seconds(Rates(10, 1, 1), answer=2, full=True) == pytest.approx(120 / 10 + 12)
    with pytest.raises(ValueError, match="rate of load"):
        Rates(1, 1, 0)
