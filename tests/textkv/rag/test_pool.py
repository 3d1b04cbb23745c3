"""The words a query is made of: a planted token comes first, and the text's order is kept."""

import pytest
import torch

from textkv.rag.pool import layer_weights, pooled, relevant


def planted(place, layers=6, n=12):
    torch.manual_seed(0)
    hidden = torch.randn(layers, n, 8)
    hidden[:, place] = hidden[:, -1]
    attention = torch.zeros(layers, 2, n)
    attention[:, :, place] = 1.0
    return attention, hidden


@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_a_planted_token_ranks_first(normalize):
    assert relevant(*planted(4), candidates=range(11), k=1, normalize=normalize) == [4]


def test_text_order_and_fewer_candidates_than_k():
    found = relevant(*planted(4), candidates=[9, 4, 1], k=6)
    assert found == [1, 4, 9]
    assert relevant(*planted(4), candidates=[]) == []


def test_weights_by_hand():
    assert layer_weights(6).tolist() == pytest.approx([0.1, 0.0, 0.25, 0.3, 0.15, 0.0])
    share = torch.tensor([0.5, 1.0]).softmax(0)
    assert torch.allclose(pooled(torch.tensor([[[1.0]], [[0.0]]])), share[:1, None])


def test_refusals():
    with pytest.raises(ValueError, match="candidate 11 is not before"):
        relevant(*planted(4), candidates=[11])
    with pytest.raises(ValueError, match="k=0"):
        relevant(*planted(4), candidates=[1], k=0)
