"""Budget: shares and tokens, and the messages for everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textkv import Budget


@pytest.mark.parametrize(
    ("value", "seen", "count"),
    [(0.4, 10, 4), ("0.4", 11, 4), (1.0, 7, 7), ("512t", 100, 100), ("512t", 1000, 512), (0.29, 100, 29), (0.01, 5, 1)],
)
def test_counts(value, seen, count):
    assert Budget.parse(value).count(seen) == count


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (40, 'budget=40 is not a fraction; use 0.4 for 40 %, or "40t" for 40 tokens'),
        ("40", "budget=40 is not a fraction; use 0.4"),
        (0, "budget=0 is not a fraction"),
        (-0.5, "budget=-0.5 is not a fraction"),
        (4096, 'budget=4096 is not a fraction; use "4096t" for 4096 tokens'),
        ("0t", "budget of 0 tokens"),
        ("many", "budget='many' is neither a share like 0.4 nor tokens like 512t"),
        (True, "budget=True is neither"),
        (float("nan"), "budget=nan is not a fraction"),
    ],
)
def test_messages(value, message):
    with pytest.raises(ValueError) as caught:
        Budget.parse(value)
    assert message in str(caught.value)


def test_needs_exactly_one():
    with pytest.raises(ValueError, match="either fraction or tokens"):
        Budget()
    with pytest.raises(ValueError, match="either fraction or tokens"):
        Budget(fraction=0.5, tokens=3)


@given(st.floats(0.001, 1.0), st.integers(1, 100_000))
def test_never_more_than_seen_nor_less_than_one(share, seen):
    assert 1 <= Budget(fraction=share).count(seen) <= seen


@given(st.floats(0.001, 1.0), st.integers(1, 1000))
def test_text_round_trip(share, tokens):
    assert Budget.parse(str(Budget(tokens=tokens))).tokens == tokens
    assert Budget.parse(str(Budget(fraction=share))).fraction == pytest.approx(share, rel=1e-4)
