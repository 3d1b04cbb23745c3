from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.helpers import mismatch, poisoned, randn
from textkv.kernels import decode_attention, window_mass

module = importlib.import_module("textkv.kernels.window_mass")


def naive(q, k, scale, valid, softcap=None, sinks=None):
    """The w x n matrix in float64, query head by query head; `valid` bool [B, G, n] -> sum P, sum P^2."""
    (B, H, w, _), (G, n) = q.shape, k.shape[1:3]
    mass, squares = torch.zeros(2, B, H, n, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            scores = q[b, h].double() @ k[b, g].double().T * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            for i in range(w):
                slot = n - w + i
                seen = valid[b, g] & (torch.arange(n) <= slot)
                if valid[b, g, slot] and seen.any():
                    row = scores[i].masked_fill(~seen, -torch.inf)
                    p = row.softmax(-1) if sinks is None else torch.cat([row, sinks[h, None]]).softmax(-1)[:-1]
                    mass[b, h] += p
                    squares[b, h] += p * p
    return mass.float(), squares.float()


def sample(B, G, group, w, n, D, mask, dtype=torch.float32):
    """q, k with NaN at invalid slots, valid as the function takes it, valid as [B, G, n]."""
    q, k = randn(B, G * group, w, D, dtype=dtype), randn(B, G, n, D, dtype=dtype)
    valid = {None: torch.ones(B, 1, n), "row": torch.rand(B, 1, n), "head": torch.rand(B, G, n)}[mask] > 0.4
    per_head = valid.expand(B, G, n)
    q = poisoned(q, per_head[..., n - w :].repeat_interleave(group, 1))
    return q, poisoned(k, per_head), {None: None, "row": valid[:, 0], "head": valid}[mask], per_head


@pytest.mark.parametrize("B, G, group, w, n, D", [(1, 1, 1, 1, 1, 64), (2, 2, 4, 5, 40, 80), (1, 1, 7, 12, 12, 128)])
@pytest.mark.parametrize("mask", [None, "row", "head"])
def test_reference_equals_the_formula(B, G, group, w, n, D, mask, poison):
    q, k, valid, per_head = sample(B, G, group, w, n, D, mask)
    truth = naive(q.nan_to_num(0), k.nan_to_num(0), D**-0.5, per_head)
    assert not mismatch(window_mass(q, k, scale=D**-0.5, valid=valid, squares=True), truth)


@pytest.mark.parametrize(
    "B, G, group, w, n, D", [(1, 1, 1, 1, 2, 64), (2, 1, 4, 5, 65, 80), (1, 2, 7, 8, 70, 64), (1, 1, 8, 20, 70, 128)]
)
@pytest.mark.parametrize("mask", [None, "row", "head"])
def test_kernel_equals_reference(B, G, group, w, n, D, mask, interpreted):
    q, k, valid, _ = sample(B, G, group, w, n, D, mask)
    truth = window_mass(q, k, scale=D**-0.5, valid=valid, squares=True)
    ours = window_mass(q, k, scale=D**-0.5, valid=valid, squares=True, _backend="triton")
    assert not mismatch(ours, truth)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_soft_cap(softcap, backend, interpreted):
    q, k, valid, per_head = sample(1, 2, 3, 6, 70, 64, "head")
    truth = naive(q.nan_to_num(0), k.nan_to_num(0), 2.0, per_head, softcap)
    ours = window_mass(q, k, scale=2.0, valid=valid, squares=True, softcap=softcap, _backend=backend)
    assert not mismatch(ours, truth, 5e-5)


@pytest.mark.parametrize("backend", ["reference", "triton", "fused"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mask", [None, "head"])
def test_a_sink_takes_its_share_of_each_query(mask, softcap, backend, interpreted):
    """Of every head another one; a query that sees no key gives none, whatever its sink."""
    if backend == "fused" and (mask or softcap):
        pytest.skip("the fused path is for neither")
    w = 80 if backend == "fused" else 6
    q, k, valid, per_head = sample(2, 2, 3, w, 90, 32, mask)
    sinks = torch.linspace(-2, 4, 6)
    truth = naive(q.nan_to_num(0), k.nan_to_num(0), 0.4, per_head, softcap, sinks.double())
    how = {"scale": 0.4, "valid": valid, "squares": True, "softcap": softcap, "sinks": sinks, "_backend": backend}
    assert not mismatch(window_mass(q, k, **how), truth, 5e-5)


def test_a_sink_beside_what_attention_told():
    q, k, _, per_head = sample(1, 2, 2, 70, 90, 32, None)
    _, lse = decode_attention(q, k, k, scale=0.4, causal=True)
    sinks = torch.tensor([1.0, -1.0, 2.0, 0.0])
    truth = naive(q, k, 0.4, per_head, None, sinks.double())[0]
    assert not mismatch(window_mass(q, k, scale=0.4, lse=lse, sinks=sinks), truth, 5e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_heads_of_512_channels(backend, interpreted):
    q, k, _, per_head = sample(1, 1, 2, 5, 40, 512, None)
    assert not mismatch(window_mass(q, k, scale=0.04, _backend=backend), naive(q, k, 0.04, per_head)[0])


def test_kernel_in_bf16(interpreted):
    q, k, valid, _ = sample(1, 2, 4, 6, 100, 64, "row", torch.bfloat16)
    ours = window_mass(q, k, scale=0.2, valid=valid, _backend="triton")
    assert not mismatch(ours, window_mass(q, k, scale=0.2, valid=valid))


@pytest.mark.parametrize("split", [30, 64, 1000])
def test_result_does_not_depend_on_the_split(split, interpreted):
    q, k, _, per_head = sample(1, 1, 2, 10, 150, 64, "row")
    arguments = {"scale": 0.2, "valid": per_head, "squares": True}
    assert not mismatch(module._launch(q, k, **arguments, split=split), module.reference(q, k, **arguments))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_query_spends_exactly_one(backend, interpreted):
    q, k, valid, per_head = sample(2, 2, 2, 9, 66, 64, "head")
    mass = window_mass(q, k, scale=0.5, valid=valid, _backend=backend)
    queries = per_head[..., -9:].sum(-1).repeat_interleave(2, 1)
    assert not mismatch(mass.sum(-1), queries.float())
    assert (mass[~per_head.repeat_interleave(2, 1)] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_all_queries_as_h2o_asks(backend, interpreted):
    q, k, _, per_head = sample(1, 1, 2, 80, 80, 64, None)
    mass = window_mass(q, k, scale=0.2, _backend=backend)
    assert not mismatch(mass, naive(q, k, 0.2, per_head)[0], 1e-4)
    equal = window_mass(
        torch.zeros_like(q), k, scale=0.2, _backend=backend
    )  # harmonic sums: sum over i >= j of 1 / (i + 1)
    true = (1 / torch.arange(1.0, 81)).flip(0).cumsum(0).flip(0)
    assert not mismatch(equal, true.expand(1, 2, 80), 1e-4)


def test_reference_never_holds_the_matrix(monkeypatch):
    q, k = randn(1, 2, 200, 16), randn(1, 1, 200, 16)
    whole = window_mass(q, k, scale=0.3, squares=True)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 200 * 7)
    largest = []
    inner = module._probabilities
    monkeypatch.setattr(module, "_probabilities", lambda *a: (largest.append(a[0].shape[-2]), inner(*a))[1])
    assert not mismatch(window_mass(q, k, scale=0.3, squares=True, _backend="reference"), whole)
    assert max(largest) == 7 and sum(largest) == 200


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_inputs(backend, interpreted):
    q, k = randn(1, 6, 4, 64).transpose(1, 2), randn(1, 2, 64, 50).mT
    truth = window_mass(q.contiguous(), k.contiguous(), scale=0.2)
    assert not mismatch(window_mass(q, k, scale=0.2, _backend=backend), truth)


Q, K = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 5, 16)


@pytest.mark.parametrize(
    "q, k, options, message",
    [
        (Q[0], K, {}, r"q has shape \[4, 3, 16\]; it must be \[B, H, w, D\]"),
        (Q, K[..., :8], {}, r"k has shape \[1, 2, 5, 8\]; it must be \[1, G, n, 16\]"),
        (Q, K.bfloat16(), {}, "k is bfloat16; it must be float32"),
        (Q, K[:, :, :2], {}, "q has shape .* a window of 3 queries; the limit is n = 2"),
        (Q, K, {"softcap": 0}, "softcap=0 must be above 0"),
        (Q, K, {"sinks": torch.zeros(1)}, r"sinks has shape \[1\]; it must be"),
        (Q[:, :3], K, {}, "q has 3 heads and k has 2"),
        (
            Q,
            K,
            {"valid": torch.ones(1, 3, 5, dtype=torch.bool)},
            r"valid has shape \[1, 3, 5\]; it must be \[1, 2, 5\]",
        ),
    ],
)
def test_errors_name_the_argument(q, k, options, message):
    with pytest.raises(ValueError, match=message):
        window_mass(q, k, scale=1.0, **options)


@pytest.mark.parametrize(
    "B, G, group, w, n, D", [(1, 1, 3, 300, 300, 32), (2, 2, 2, 130, 1300, 20), (1, 2, 1, 65, 1100, 64)]
)
@pytest.mark.parametrize("told", [False, True])
def test_many_queries_on_a_cpu(B, G, group, w, n, D, told, dtype):
    q, k, _, _ = sample(B, G, group, w, n, D, None, dtype)
    q = 3 * q  # some rows of the softmax are sharp
    lse = decode_attention(q, k, k, scale=0.3, causal=True)[1] if told else None
    ours = window_mass(q, k, scale=0.3, squares=True, lse=lse, _backend="fused")
    assert not mismatch(ours, window_mass(q, k, scale=0.3, squares=True, _backend="reference"), 1e-4)


def test_kernel_with_the_log_sum_exp_at_hand(interpreted):
    q, k, _, _ = sample(1, 2, 2, 9, 66, 64, None)
    lse = decode_attention(q, k, k, scale=0.3, causal=True)[1]
    ours = window_mass(q, k, scale=0.3, squares=True, lse=lse, _backend="triton")
    assert not mismatch(ours, window_mass(q, k, scale=0.3, squares=True), 1e-5)
    with pytest.raises(ValueError, match="lse and valid come together"):
        window_mass(q, k, scale=0.3, lse=lse, valid=torch.ones(1, 66, dtype=torch.bool))
