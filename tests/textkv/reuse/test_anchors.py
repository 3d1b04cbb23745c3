"""Anchors: who is estimated, from whom, with which weights, and who leaves a full pool."""

from __future__ import annotations

import math

import pytest
import torch

from textkv.reuse.kvcomm.anchors import AnchorPool, Criteria, Offset, nucleus
from textkv.reuse.kvcomm.blend import blended
from textkv.reuse.kvcomm.template import Segment
from textkv.reuse.spans import Span

AGENT = "ann"


def span(tokens: int, seed: int, scale: float = 1.0) -> Span:
    made = torch.randn(2, 3, 2, tokens, 4, generator=torch.Generator().manual_seed(seed)) * scale
    return Span(made[0], made[1])


def text(tokens: int, seed: int) -> Segment:
    return Segment(tuple(range(seed, seed + tokens)), span(tokens, seed))


def offset(tokens: int, seed: int = 0, scale: float = 1.0) -> Offset:
    return Offset(span(tokens, 100 + seed, scale), span(2, 200 + seed, scale))


def pool_of(*texts: Segment, agent: str = AGENT, **how) -> AnchorPool:
    pool = AnchorPool(**how)
    for number, known in enumerate(texts):
        assert pool.add(agent, known, offset(len(known.ids), number))
    return pool


def same(keys: torch.Tensor, by: int) -> torch.Tensor:
    return keys


# ---- the decision --------------------------------------------------------------------------------------------------


def test_a_pool_of_none_or_one_estimates_nothing() -> None:
    new = text(4, 50)
    assert not AnchorPool().judge(AGENT, new).share
    verdict = pool_of(text(6, 0)).judge(AGENT, new)
    assert not verdict.share and "1 anchors of at least 4 tokens, 2 are needed" in verdict.why


def test_a_text_longer_than_all_anchors_becomes_one() -> None:
    always = Criteria(gamma=1)
    assert not pool_of(text(4, 0), text(5, 10), criteria=always).judge(AGENT, text(6, 50)).share
    assert pool_of(text(6, 0), text(7, 10), criteria=always).judge(AGENT, text(6, 50)).share


@pytest.mark.parametrize("distance", ["rms", "paper"])
def test_equidistant_anchors_say_nothing(distance) -> None:
    base, equal = span(4, 0), [Segment((n, n, n, n), span(4, 9)) for n in range(4)]
    for gamma, share in ((0.3, False), (0.99, False), (1.0, True)):
        pool = pool_of(*equal, criteria=Criteria(gamma, distance))
        verdict = pool.judge(AGENT, Segment((7, 7, 7, 7), base))
        assert verdict.share is share
        assert "2.00" in verdict.why  # log2 of four


def test_one_anchor_near_and_the_others_far_is_enough() -> None:
    base = span(4, 0)
    near = Segment((1, 1, 1, 1), Span(base.keys + 0.01, base.values + 0.01))
    pool = pool_of(near, text(4, 5), text(4, 6))
    verdict = pool.judge(AGENT, Segment((7, 7, 7, 7), base))
    assert verdict.share and int(verdict.weights.argmax()) == 0
    # The gate looks at the distance itself.
    gated = pool_of(near, text(4, 5), text(4, 6), criteria=Criteria(gate=1e-3))
    assert "gate" in gated.judge(AGENT, Segment((7, 7, 7, 7), base)).why


def test_the_entropy_does_not_depend_on_the_length() -> None:
    # By the released formula long texts have one nearest anchor, although all are as far; relative distances have not.
    for tokens in (4, 4000):
        texts, new = [text(tokens, n) for n in (1, 2)], text(tokens, 9)
        paper = pool_of(*texts, criteria=Criteria(0.9, "paper")).judge(AGENT, new)
        ours = pool_of(*texts, criteria=Criteria(0.9, "rms", temperature=0.5)).judge(AGENT, new)
        assert paper.share is (tokens == 4000) and not ours.share


def test_the_same_text_is_always_taken_and_alone() -> None:
    pool = pool_of(text(4, 0), text(4, 10), criteria=Criteria(gamma=0))
    verdict = pool.judge(AGENT, text(4, 10))
    assert verdict.share and [a.ids for a in verdict.anchors] == [text(4, 10).ids]


def test_anchors_without_the_agents_offsets_do_not_count() -> None:
    pool = pool_of(text(4, 0), text(4, 10), criteria=Criteria(gamma=1))
    assert not pool.judge("bob", text(4, 50)).share
    pool.add("bob", text(4, 0), offset(4))
    assert not pool.judge("bob", text(4, 50)).share and len(pool.anchors) == 2
    assert pool.judge("bob", text(4, 0)).share


def test_an_empty_text_is_its_own_anchor() -> None:
    """What stands behind it was moved by what stood before: another text's offsets say nothing of that."""
    empty, pool = Segment((), span(0, 0)), pool_of(text(4, 0), text(5, 10), criteria=Criteria(gamma=1))
    verdict = pool.judge(AGENT, empty)
    assert not verdict.share and "empty text" in verdict.why
    moved = offset(0, 3)
    assert pool.add(AGENT, empty, moved)
    verdict = pool.judge(AGENT, empty)
    assert verdict.share and len(verdict.anchors) == 1
    for distance in ("rms", "paper"):
        behind = span(2, 40)
        own, after = blended(empty.base, behind, verdict.anchors, AGENT, Criteria(distance=distance), same)
        assert own.tokens == 0
        torch.testing.assert_close(after.values[1:], (behind + moved.behind).values[1:])


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_the_least_used_of_the_oldest_leaves() -> None:
    pool = pool_of(*(text(4, 10 * n) for n in range(4)), capacity=4, oldest=3)
    for anchor, uses in zip(pool.anchors, (3, 1, 2, 0), strict=True):
        anchor.uses = uses
    pool.add(AGENT, text(4, 90), offset(4))
    # The fourth was never used, but is not among the three oldest.
    assert [anchor.ids[0] for anchor in pool.anchors] == [0, 20, 30, 90]


def test_no_pool_ever_holds_more_than_it_may() -> None:
    one = pool_of(text(4, 0)).nbytes
    for how in ({"capacity": 2}, {"most_bytes": 2 * one + 10}, {"capacity": 0}, {"most_bytes": one - 1}):
        pool = AnchorPool(**how)
        for n in range(5):
            pool.add(AGENT, text(4, 10 * n), offset(4, n))
            assert len(pool.anchors) <= 2 and pool.nbytes <= how.get("most_bytes", 2 * one)
        assert bool(pool.anchors) is (how not in ({"capacity": 0}, {"most_bytes": one - 1}))


def test_another_agents_offsets_count_too() -> None:
    pool = pool_of(text(4, 0), text(4, 10))
    pool.most_bytes = pool.nbytes + 10
    assert pool.add("bob", text(4, 10), offset(4))
    assert [set(anchor.offsets) for anchor in pool.anchors] == [{AGENT, "bob"}] and pool.nbytes <= pool.most_bytes


def test_the_nucleus_has_the_entry_that_crosses_its_mass() -> None:
    assert nucleus(torch.tensor([0.95, 0.03, 0.02]), 0.9) == [0]
    assert nucleus(torch.tensor([0.2, 0.5, 0.3]), 0.6) == [1, 2]
    assert sorted(nucleus(torch.tensor([0.25] * 4), 1.0)) == [0, 1, 2, 3]


def test_impossible_criteria_are_refused() -> None:
    nan, inf = float("nan"), float("inf")
    refused = [{"gamma": -1}, {"gamma": nan}, {"distance": "cosine"}, {"temperature": 0}, {"temperature": nan},
               {"temperature": inf}, {"nucleus": 0}, {"nucleus": nan}, {"gate": -1}, {"gate": nan}]  # fmt: skip
    for how in refused:
        with pytest.raises(ValueError, match=next(iter(how))):
            Criteria(**how)
    with pytest.raises(ValueError, match="capacity=-1"):
        AnchorPool(capacity=-1)


# ---- the blend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["rms", "paper"])
def test_weights_sum_to_one_and_a_copy_changes_nothing(distance) -> None:
    criteria, new, behind = Criteria(distance=distance), span(4, 50), span(2, 51)
    weights = criteria.weights(torch.rand(3, 5))
    torch.testing.assert_close(weights.sum(0), torch.ones(5))
    pool = pool_of(text(6, 0))
    alone = blended(new, behind, pool.anchors, AGENT, criteria, same)
    twice = blended(new, behind, [*pool.anchors, *pool.anchors], AGENT, criteria, same)
    for a, b in zip(alone, twice, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)


def test_one_anchor_gives_its_offset_but_to_the_first_layer() -> None:
    new, behind, anchor = span(4, 50), span(2, 51), pool_of(text(6, 0)).anchors[0]
    own, after = blended(new, behind, [anchor], AGENT, Criteria(), same)
    given = anchor.offsets[AGENT]
    torch.testing.assert_close(own.keys[1:], new.keys[1:] + given.own.keys[1:, :, :4])
    torch.testing.assert_close(after.values[1:], behind.values[1:] + given.behind.values[1:])
    assert torch.equal(own.keys[0], new.keys[0]) and torch.equal(after.values[0], behind.values[0])


def test_offsets_of_zero_leave_the_base() -> None:
    pool = AnchorPool()
    for n in range(3):
        pool.add(AGENT, text(6, 10 * n), offset(6, n, scale=0.0))
    new, behind = span(4, 50), span(2, 51)
    own, after = blended(new, behind, pool.anchors, AGENT, Criteria(), same)
    assert torch.equal(own.keys, new.keys) and torch.equal(after.values, behind.values)
    assert blended(new, None, pool.anchors, AGENT, Criteria(), same)[1] is None


def test_a_colder_blend_is_the_nearest_anchor() -> None:
    base = span(4, 0)
    near = Segment((1, 1, 1, 1), Span(base.keys + 0.01, base.values + 0.01))
    pool = pool_of(text(4, 5), near)
    own, _ = blended(base, span(2, 51), pool.anchors, AGENT, Criteria(temperature=1e-4), same)
    torch.testing.assert_close(own.keys[1:], base.keys[1:] + pool.anchors[1].offsets[AGENT].own.keys[1:])
    assert math.isfinite(float(own.values.sum()))
