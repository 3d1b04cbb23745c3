"""The trigger: zero as printed, two readings that are not, and the gate."""

import math

import pytest
import torch

from textkv.rag.trigger import Trigger, outgoing, received


def causal(layers=4, heads=3, n=7, seed=0):
    """Random attention rows [layers, heads, n, n] under a causal mask."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, heads, n, n, generator=draw)
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_formula_is_zero_and_its_readings_are_not(seed):
    rows = causal(seed=seed)
    printed = received(rows, "earlier")
    assert printed.change.abs().max() == 0 and printed.focus.abs().max() == 0
    for signal in (received(rows), outgoing(rows)):
        assert (signal.change[1:-1] * signal.focus[1:-1] > 0).all()


def test_what_later_tokens_give_by_hand():
    rows = torch.zeros(3, 1, 3, 3)
    rows[0, 0] = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]])
    rows[1, 0] = torch.tensor([[1.0, 0, 0], [0.0, 1.0, 0], [0.0, 0.5, 0.5]])
    rows[2, 0] = torch.tensor([[1.0, 0, 0], [1.0, 0.0, 0], [0.5, 0.0, 0.5]])
    signal = received(rows)
    # Given by later tokens: (1, .25, 0), (0, .5, 0), (1.5, 0, 0); over the largest: (1, .25, 0), (0, 1, 0), (1, 0, 0).
    assert signal.change.tolist() == pytest.approx([0.5 * 1 + 1 * 1, 0.5 * 0.75 + 1 * 1, 0])
    assert signal.focus.tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_the_own_row_by_hand():
    rows = torch.tensor([[[[0.5, 0.5]]], [[[1.0, 0.0]]], [[[0.25, 0.75]]]])
    signal = outgoing(rows)
    assert signal.change.tolist() == pytest.approx([0.5 * 0.5 + 1 * 0.75])
    assert signal.focus.tolist() == pytest.approx([0.75])
    assert outgoing(causal(layers=6)).change.max() <= 3


def test_the_last_of_a_draft_is_given_nothing():
    signal = received(causal())
    assert signal.change[-1] == 0 and signal.focus[-1] == 0


def test_a_fuller_memory_triggers_less():
    trigger = Trigger(mode="outgoing", theta=0.1, capacity=100)
    weights = [trigger.weight(held) for held in (0, 25, 50, 75, 100)]
    assert weights == pytest.approx([0.80, 0.294, 0.108, 0.040, 0.0147], abs=1e-3)
    assert Trigger(mode="outgoing", theta=0.1).weight(10**12) == 0.8


@pytest.mark.parametrize(
    "wrong", [{"mode": "printed"}, {"theta": math.nan}, {"tau": 0.0}, {"capacity": 0}, {"alpha": -1.0}, {"decay": -1.0}]
)
def test_refusals_name_the_value(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Trigger(**({"mode": "received", "theta": 1.0} | wrong))
