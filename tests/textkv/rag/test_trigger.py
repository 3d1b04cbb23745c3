"""ATLAS: the printed score is zero under a causal mask, both working readings are not."""

import pytest
import torch

from textkv.rag import trigger


def causal(layers=4, heads=3, n=8):
    torch.manual_seed(0)
    scores = 3 * torch.randn(layers, heads, n, n)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("token", range(8))
def test_the_printed_score_is_zero_for_every_token(token):
    assert trigger.printed(causal(), token, 0.1) == 0.0


def test_both_readings_are_above_zero_and_fall_with_the_probability():
    for reading in (trigger.received, trigger.outgoing):
        assert reading(causal(), 4, 0.1) > reading(causal(), 4, 0.4) > 0
        assert reading(causal(), 4, 1.0) == 0


def test_layers_that_agree_score_nothing():
    same = causal(layers=1).expand(4, -1, -1, -1)
    assert trigger.received(same, 4, 0.1) == trigger.outgoing(same, 4, 0.1) == 0


def test_outgoing_by_hand():
    # One head, two layers, token 1: rows (1, 0) and (0, 1) differ by a total variation of 1; phi = 1, a = 1.
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    last = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    attention = torch.stack([first, last])[:, None]
    assert trigger.outgoing(attention, 1, 0.2) == pytest.approx(0.75 * 0.8 * 0.75)


def test_gate_and_load():
    assert trigger.gated(0.4, True) and not trigger.gated(0.5, True) and not trigger.gated(0.1, False)
    loads = [trigger.load_factor(used, 100) for used in (0, 25, 50, 75, 100)]
    assert loads == pytest.approx([0.80, 0.29, 0.11, 0.04, 0.015], abs=0.006)
    with pytest.raises(ValueError, match="capacity=0"):
        trigger.load_factor(1, 0)


def test_refusals():
    with pytest.raises(ValueError, match="is the last"):
        trigger.received(causal(), 7, 0.1)
    with pytest.raises(ValueError, match="2 layers"):
        trigger.outgoing(causal(layers=1), 3, 0.1)
