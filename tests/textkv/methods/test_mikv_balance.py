"""MiKV's balancer: key channels of one size beside the queries that they meet."""

import pytest
import torch

from tests.compare import mismatch
from tests.textkv.methods.fed import DIM, GROUP, HEADS, feed, tokens
from textkv.segments.balanced import BalancedSegment
from textkv.segments.base import Stored


def test_scores_do_not_change_by_balancing():
    q, k, _ = tokens(30)
    k[:, :, :, 3] *= 40
    k[:, :, :, 5] = 0
    k[:, :, :, 7] += 25
    at = torch.arange(30, dtype=torch.int32).expand(1, HEADS, 30)
    low = BalancedSegment.for_prompt(Stored(k, k, at), q.abs().amax(2))
    assert low.balance.shape == (1, HEADS, DIM) and bool(low.balance.isfinite().all())
    assert torch.equal(low.balance.log2(), low.balance.log2().round())
    assert bool((low.balance[..., 3] < low.balance[..., 7]).all())
    packed = low.balanced(k) + low.centre[:, :, None]
    turned = q.unflatten(1, (HEADS, GROUP)) / low.balance[:, :, None, None]
    assert not mismatch(turned @ packed[:, :, None].mT, q.unflatten(1, (HEADS, GROUP)) @ k[:, :, None].mT)


def test_balance_is_the_root_of_the_ratio_and_padding_does_not_count():
    q, k, _ = tokens(8)
    k[:, :, 0] = 1e4
    at = torch.arange(-1, 7, dtype=torch.int32).expand(1, HEADS, 8)
    low = BalancedSegment.for_prompt(Stored(k, k, at), q.abs().amax(2))
    real = k[:, :, 1:]
    largest = (real - real.mean(2, keepdim=True)).abs().amax(2)
    exact = (q.abs().amax(2).unflatten(1, (HEADS, GROUP)).amax(2) / largest).sqrt()
    assert bool(((low.balance / exact).log2().abs() <= 0.5 + 1e-5).all())


def outlier_keys(kind, n=256, dim=64):
    q, k, v = tokens(n, dim=dim)
    if kind == "scaled":
        k[..., :4] *= 15
    else:
        k[..., 0] += 100
        k[..., 1] -= 80
    return q, k, v


@pytest.mark.parametrize("kind", ["scaled", "biased"])
def test_balancing_mends_keys_with_outlier_channels(kind):
    """Attention error with and without; the paper's balancer makes biased keys worse, centring mends that."""
    q, k, v = outlier_keys(kind)
    gap = {}
    for balance in (True, False):
        method = f"mikv(16,4,balance={balance})"
        *_, (_, out) = feed(method, "2t", (q, k, v), 255)
        *_, (_, true) = feed("full", None, (q, k, v), 255)
        gap[balance] = float((out - true).norm() / true.norm())
    assert gap[True] < 0.35
    assert gap[True] < 0.6 * gap[False] if kind == "scaled" else gap[True] < 1.5 * gap[False]
