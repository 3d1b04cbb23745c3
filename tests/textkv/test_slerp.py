"""One direction for two vectors, and which pairs keep both: against brute force, and at the ends of every range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import mismatch
from textkv.kernels import rotate
from textkv.slerp import Extent, Retention, slerp


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(shared):
    return [shared.direction * size[..., None] for size in shared.sizes]


def nothing(distance):
    low = torch.full(distance.shape[:2], torch.inf)
    return Extent(low, -low)


@pytest.mark.parametrize(("t", "which"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_the_arc_are_the_vectors_themselves(t, which):
    pair = vectors(2, 3, 5, 16), 4 * vectors(2, 3, 5, 16, seed=1)
    assert not mismatch(restored(slerp(*pair, t))[which], pair[which])


@settings(deadline=None, max_examples=40)
@given(t=st.floats(0, 1), seed=st.integers(0, 99), size=st.floats(0.01, 100))
def test_parallel_vectors_are_restored_and_lengths_always(t, seed, size):
    x, y = vectors(4, 8, seed=seed), vectors(4, 8, seed=seed + 100)
    first, second = restored(slerp(x, size * x, t))
    assert not mismatch(first, x, rtol=1e-5, atol=1e-6)
    assert not mismatch(second, size * x, rtol=1e-5, atol=1e-6 * size)
    for ours, true in zip(restored(slerp(x, size * y, t)), (x, size * y), strict=True):
        assert not mismatch(ours.norm(dim=-1), true.norm(dim=-1), rtol=1e-5, atol=0)


def test_a_right_angle_by_hand():
    shared = slerp(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), 0.6)
    turn = 0.6 * math.pi / 2
    assert not mismatch(shared.direction, torch.tensor([math.cos(turn), math.sin(turn)]))
    assert shared.distance == pytest.approx(0.5)
    assert [float(size) for size in shared.sizes] == [3, 2]


def test_small_angles_are_not_lost_to_rounding():
    angle = torch.tensor([1e-6, 1e-4, 1e-2])
    turned = torch.stack([angle.cos(), angle.sin()], -1)
    found = slerp(torch.tensor([1.0, 0.0]).expand(3, 2), turned, 0.5).distance * math.pi
    assert not mismatch(found, angle, rtol=1e-3, atol=0)


def test_a_zero_vector_gives_its_direction_to_the_other_and_no_nan():
    x, zero = vectors(1, 8), torch.zeros(1, 8)
    for t in (0.0, 0.6, 1.0):
        for pair in ((x, zero), (zero, x), (zero, zero)):
            shared = slerp(*pair, t)
            assert float(shared.distance) == 0
            for ours, true in zip(restored(shared), pair, strict=True):
                assert not mismatch(ours, true)


def test_keys_may_be_merged_after_the_rotary_embedding():
    x, y, at = vectors(1, 2, 7, 16), vectors(1, 2, 7, 16, seed=1), torch.arange(7)[None]
    inv_freq = 10000.0 ** (-torch.arange(8) / 8)
    before, after = slerp(x, y, 0.6), slerp(rotate(x, at, inv_freq), rotate(y, at, inv_freq), 0.6)
    assert not mismatch(after.direction, rotate(before.direction, at, inv_freq), rtol=0, atol=1e-5)
    assert not mismatch(after.distance, before.distance, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 50), gamma=st.floats(0, 1), rule=st.sampled_from(["range", "topk"]))
def test_kept_tokens_are_those_of_brute_force(seed, gamma, rule):
    generator = torch.Generator().manual_seed(seed)
    distance = torch.rand(2, 2, 9, generator=generator)
    decide = torch.rand(2, 2, 9, generator=generator) < 0.8
    kept = Retention(rule, gamma).dissimilar(distance, decide, nothing(distance).widened(distance, decide))
    for b in range(2):
        for g in range(2):
            mine = {i: float(distance[b, g, i]) for i in range(9) if decide[b, g, i]}
            found = set(kept[b, g].nonzero()[:, 0].tolist())
            if gamma == 1 or not mine:
                assert found == set(mine)
            elif rule == "topk":
                count = math.floor(gamma * len(mine) + 0.5 + 1e-9)
                assert found == set(sorted(mine, key=lambda i: -mine[i])[:count])
            else:
                low, high = distance[b, g][list(mine)].aminmax()
                expected = {i for i in mine if bool(high - distance[b, g, i] < gamma * (high - low))}
                assert found == expected


def test_the_unlike_are_kept_and_not_the_like():
    distance = torch.tensor([[[0.1, 0.12, 0.9, 0.11]]])
    everywhere = torch.ones_like(distance, dtype=torch.bool)
    kept = Retention("range", 0.05).dissimilar(distance, everywhere, nothing(distance).widened(distance, everywhere))
    assert kept.tolist() == [[[False, False, True, False]]]


@pytest.mark.parametrize("rule", ["range", "topk"])
def test_opposite_vectors_are_always_kept(rule):
    x = vectors(1, 1, 3, 8)
    distance = slerp(x, x * torch.tensor([1.0, -2.0, 1.0])[:, None], 0.6).distance
    everywhere = torch.ones_like(distance, dtype=torch.bool)
    kept = Retention(rule, 0.0).dissimilar(distance, everywhere, nothing(distance).widened(distance, everywhere))
    assert kept.tolist() == [[[False, True, False]]]


def test_the_range_grows_upwards_only():
    first, later = torch.tensor([[[0.2, 0.4]]]), torch.tensor([[[0.1, 0.6]]])
    everywhere = torch.ones_like(first, dtype=torch.bool)
    extent = nothing(first).widened(first, ~everywhere)
    assert extent.low.isinf().all() and extent.high.isinf().all()
    extent = extent.widened(first, everywhere).widened(later, everywhere)
    assert (float(extent.low), float(extent.high)) == pytest.approx((0.2, 0.6))


@pytest.mark.parametrize(
    ("arguments", "message"), [(("most", 0.1), "retention='most': use"), (("range", 1.5), "gamma=1.5: a share lies")]
)
def test_bad_retention_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Retention(*arguments)
