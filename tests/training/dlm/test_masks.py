"""What a training row hides: mixtures as documented, weights bounded, the tail on its own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dlm.masks import SHARES, TAIL_WEIGHT, hide, show_all


def drawn(rows: int, slots: int, answer: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    content = torch.rand(rows, slots, generator=generator) < 0.6
    return content, *hide(content, answer, generator)


@settings(max_examples=50, deadline=None)
@given(answer=st.integers(1, 30), tail=st.integers(0, 40), seed=st.integers(0, 1000))
def test_weights_are_bounded_and_only_where_hidden(answer, tail, seed):
    _, hidden, weights = drawn(16, answer + tail, answer, seed)
    assert hidden.dtype == torch.bool and hidden.shape == weights.shape == (16, answer + tail)
    assert torch.equal(weights > 0, hidden)
    assert (weights[:, :answer].sum(1) <= 1 + 1e-5).all()
    assert (weights[:, answer:].sum(1) <= TAIL_WEIGHT + 1e-5).all()


def test_the_shares_of_the_three_kinds():
    answer = 24
    content, hidden, weights = drawn(4000, answer, answer)
    first = hidden.int().argmax(1)
    place = torch.arange(answer)
    suffix = (hidden == (place >= first[:, None])).all(1)
    falling = suffix & (hidden.sum(1) > 3) & (weights.max(1).values > 1.5 * weights[:, -1])
    assert abs(falling.float().mean() - SHARES[1] * 20 / 24) < 0.03
    behind = place >= first[:, None]
    digits = (hidden == (behind & content)).all(1) & (hidden.sum(1) > 2)
    assert digits.float().mean() > SHARES[2] * 0.7
    counts = hidden.sum(1)
    assert (counts == answer).any() and (counts == 1).any()


def test_few_hidden_tokens_weigh_at_most_eight_times_the_mean():
    _, hidden, weights = drawn(4000, 29, 29)
    single = hidden.sum(1) == 1
    assert single.any()
    torch.testing.assert_close(weights[single].sum(1), torch.full((int(single.sum()),), 8 / 29))
    half = hidden.sum(1) >= 4
    torch.testing.assert_close(weights[half].sum(1), torch.ones(int(half.sum())))


def test_the_tail_is_hidden_wholly_partly_or_not_at_all():
    _, hidden, _ = drawn(3000, 48, 16)
    share = hidden[:, 16:].float().mean(1)
    assert abs((share == 0).float().mean() - 1 / 3) < 0.06 and abs((share == 1).float().mean() - 1 / 3) < 0.06
    assert ((share > 0) & (share < 1)).float().mean() > 0.25


def test_the_guider_reads_everything():
    weights = show_all(3, 20, 15)
    torch.testing.assert_close(weights[:, :15].sum(1), torch.ones(3))
    torch.testing.assert_close(weights[:, 15:].sum(1), torch.full((3,), TAIL_WEIGHT))
    assert show_all(2, 15, 15).shape == (2, 15)
