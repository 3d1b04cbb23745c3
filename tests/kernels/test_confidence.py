from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import mismatch, randn
from textkv.kernels import confidence
from textkv.kernels.confidence import _launch

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def naive(logits, suppress=()):
    """Softmax and sort in float64."""
    z = logits.double()
    z[:, list(suppress)] = -torch.inf
    p = z.softmax(1)
    order = p.sort(dim=1, descending=True, stable=True)
    second = order.values[:, 1] if p.shape[1] > 1 else torch.zeros(len(p))
    return order.indices[:, 0], order.values[:, 0], second, torch.special.entr(p).sum(1), z.logsumexp(1)


def wrong(ours, logits, suppress=()):
    """What differs from softmax and sort in float64, "" = nothing."""
    truth = naive(logits, suppress)
    if not torch.equal(ours.token, truth[0]):
        return f"tokens {ours.token.tolist()} are not {truth[0].tolist()}"
    found, true = (*ours[1:], ours.margin), (*truth[1:], truth[1] - truth[2])
    return mismatch(found, [x.float() for x in true], 2e-5)


@pytest.mark.parametrize("n, V", [(1, 1), (1, 2), (3, 33), (2, 4096), (5, 4097), (2, 12_345)])
@BACKENDS
def test_equals_softmax_and_sort(n, V, backend, dtype, interpreted):
    logits = 3 * randn(n, V, dtype=dtype)
    before = logits.clone()
    assert not wrong(confidence(logits, _backend=backend), logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("split", [4096, 8192, 32])
def test_pieces_fold_into_the_whole(split, interpreted):
    logits = 3 * randn(3, 9000 if split > 32 else 150)
    assert not wrong(_launch(logits, split=split), logits)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=70, max_size=70), min_size=1, max_size=3))
def test_equals_have_the_lowest_id(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    assert not wrong(confidence(logits), logits)


@pytest.mark.parametrize("split", [16, 32, 128])
def test_kernel_gives_equals_the_lowest_id_across_pieces(split, interpreted):
    logits = torch.randint(-2, 3, (6, 100)).float()
    assert not wrong(_launch(logits, split=split), logits)


@pytest.mark.parametrize("V", [1024, 1100, 4095])
def test_long_rows_give_equals_the_lowest_id(V):
    # Long enough to be searched by pieces, with the largest in many of them and behind the last whole one.
    logits = torch.randint(-2, 3, (6, V)).float()
    logits[0], logits[1, V - 1], logits[2, [5, V - 1]] = -3.0, 9.0, 9.0
    suppress = torch.tensor([5])
    assert not wrong(confidence(logits), logits)
    assert not wrong(confidence(logits, suppress=suppress), logits, (5,))
    short = confidence(logits, suppress=suppress, spread=False)
    assert short.second is None and not mismatch(short.probability, naive(logits, (5,))[1].float(), 2e-5)


@pytest.mark.parametrize("spread", [True, False])
def test_suppressed_mass_is_not_counted(spread):
    logits = torch.zeros(3, 40)
    logits[1, [3, 7]], logits[2, 9] = 20.0, 20.0
    suppress = torch.tensor([7, 8])
    ours, truth = confidence(logits, suppress=suppress, spread=spread), naive(logits, (7, 8))
    assert torch.equal(ours.token, truth[0])
    assert not mismatch([ours.probability, ours.lse], [truth[1].float(), truth[4].float()], 2e-5)


@BACKENDS
def test_suppressed_ids_are_never_the_token(backend, dtype, interpreted):
    logits = randn(4, 5000, dtype=dtype)
    logits[:, [7, 4500]] = 50.0  # the whole mass
    suppress = torch.tensor([7, 4500])
    ours = confidence(logits, suppress=suppress, _backend=backend)
    assert not wrong(ours, logits, (7, 4500))
    assert not mismatch(ours.lse, logits.float().scatter(1, suppress.expand(4, 2), -torch.inf).logsumexp(1), 2e-5)


@BACKENDS
def test_minus_infinity_weighs_nothing(backend, interpreted):
    logits = torch.full((3, 5000), -torch.inf)
    logits[0, 4999], logits[1, [3, 4200]] = -1e4, 2.0
    ours = confidence(logits, suppress=torch.tensor([0, 1]), _backend=backend)
    assert ours.token.tolist() == [4999, 3, 2]
    assert not mismatch(ours.probability, torch.tensor([1.0, 0.5, 0.0]))
    assert not mismatch(ours.second, torch.tensor([0.0, 0.5, 0.0]))
    assert not mismatch(ours.entropy, torch.tensor([0.0, 0.6931472, 0.0]))
    assert not mismatch(ours.lse, torch.tensor([-1e4, 2.6931472, -torch.inf]))


@BACKENDS
def test_strides_large_logits_and_no_rows(backend, interpreted):
    wide = 100 * randn(3, 600)
    assert not wrong(confidence(wide[:, 1:400], _backend=backend), wide[:, 1:400])
    assert not wrong(confidence(wide[:, :4].mT, _backend=backend), wide[:, :4].mT)
    assert not wrong(confidence(wide + 1e4, _backend=backend), wide + 1e4)
    assert confidence(wide[:0], _backend=backend).token.shape == (0,)


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    "logits, suppress, message",
    [
        (LOGITS[0], None, r"logits has shape \[5\]; it must be \[n, V\]"),
        (LOGITS[:, :0], None, r"logits has shape \[2, 0\]; V must be at least 1"),
        (LOGITS.long(), None, "logits is int64; it must be float16 or bfloat16 or float32"),
        (LOGITS, [3], "suppress is list; it must be a tensor"),
        (LOGITS, torch.tensor([3.0]), "suppress is float32; it must be int64"),
    ],
)
def test_errors_name_the_argument(logits, suppress, message):
    with pytest.raises(ValueError, match=message):
        confidence(logits, suppress=suppress)
