"""Intervals against known values, rows against sums made by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkv.stats import summarise
from textkv.intervals import wilson


@pytest.mark.parametrize(
    ("won", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2553, 0.3662),
        (0, 0, 0, 1),
    ],
)
def test_wilson_known_values(won, n, low, high):
    assert wilson(won, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(pair):
    won, n = pair
    low, high = wilson(won, n)
    assert 0 <= low <= high <= 1
    assert n == 0 or low <= won / n <= high
    assert wilson(n - won, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"successes=3 is outside 0\.\.2"):
        wilson(3, 2)


def step(**figures):
    return {
        "prefill_tokens": 100,
        "kv_bytes": 40,
        "kv_bytes_full": 100,
        "kv_bytes_peak": 70,
        "parse_error": "",
        **figures,
    }


def episode(method="gui-kv", task="a", success=True, steps=(), stop="done", crashes=0):
    given = {"method": method, "budget": 0.4, "task": task, "success": success, "stop": stop, "crashes": crashes}
    return given | {"steps": list(steps)}


def test_rows_per_task_and_all():
    rows = summarise(
        [
            episode(steps=[step(seconds_prefill=1.0), step(kv_bytes_peak=90, parse_error="x")]),
            episode(
                task="b", success=False, steps=[step(seconds_browser=3.0, kv_bytes=10)], stop="step limit", crashes=1
            ),
            episode(method="full", steps=[step(kv_bytes=100)]),
        ]
    )
    assert [(r["method"], r["task"]) for r in rows] == [
        ("gui-kv", "a"),
        ("gui-kv", "b"),
        ("gui-kv", "all"),
        ("full", "a"),
        ("full", "all"),
    ]
    both = rows[2]
    assert (both["n"], both["success"], both["steps"]) == (2, 0.5, 1.5)
    assert (both["low"], both["high"]) == wilson(1, 2)
    assert both["kv_bytes"] == 30 and both["kv_share"] == pytest.approx(0.3) and both["kv_bytes_peak"] == 90
    assert both["seconds"] == pytest.approx(1 / 3 + 1.0)
    assert (both["parse_failures"], both["crashes"], both["stop_done"], both["stop_step_limit"]) == (1, 1, 1, 1)


def test_a_policy_without_a_model_has_no_figures():
    row = summarise([episode(steps=[{"parse_error": ""}])])[-1]
    assert row["kv_bytes"] == row["kv_share"] == row["seconds"] == 0


def test_nothing_played_gives_no_rows():
    assert summarise([]) == []
