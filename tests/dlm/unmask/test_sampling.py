"""Drawing tokens: frequencies, filters, what probability a drawn token has, and what may never be drawn."""

from __future__ import annotations

import pytest
import torch

from dlm.unmask.noise import Noise
from dlm.unmask.sampling import Sampler, Sampling

CPU = torch.device("cpu")
Z = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0, 9.0])  # the last is the mask
MASK = 5


def sampler(suppressed=(MASK,), seed=0, **options) -> Sampler:
    return Sampler(Sampling(**options), tuple(suppressed), Noise(torch.Generator().manual_seed(seed), 1, CPU))


def frequencies(n=20_000, **options) -> torch.Tensor:
    tokens = sampler(**options).draw(Z.expand(1, n, -1)).tokens
    return torch.bincount(tokens[0], minlength=6) / n


def plain(temperature=1.0) -> torch.Tensor:
    return (Z[:5] / temperature).softmax(0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("noise", ["float32", "float64"])
def test_frequencies_are_those_of_softmax(temperature, noise):
    n, expected = 20_000, plain(temperature)
    seen = frequencies(n, temperature=temperature, noise=noise)
    assert seen[MASK] == 0
    chi_square = n * ((seen[:5] - expected).square() / expected)[expected * n > 5].sum()
    assert chi_square < 18.5  # 0.1 % of draws from the right distribution lie beyond it (4 degrees of freedom)


def test_no_temperature_is_the_argmax_whatever_the_filters():
    z = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"top_p": 0.1}, {"top_k": 2}):
        assert torch.equal(sampler((3,), **options).draw(z).tokens, z.index_fill(2, torch.tensor([3]), -9).argmax(2))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_p": 0.5}, [1]),  # 0.55 alone is over the limit, and stays
        ({"top_p": 0.6}, [1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.9, "top_k": 1}, [1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
    ],
)
def test_filters_keep_the_right_tokens_in_proportion(options, kept):
    seen = frequencies(temperature=1.0, **options)
    expected = torch.zeros(6).scatter(0, torch.tensor(kept), plain()[kept])
    assert torch.allclose(seen, expected / expected.sum(), atol=0.015)


def test_confidence_is_clean_or_warped():
    z = Z.expand(1, 200, -1)
    clean = sampler(temperature=0.5, top_k=3).draw(z)
    assert torch.allclose(clean.probability, plain()[clean.tokens])
    warped = sampler(temperature=0.5, top_k=3).draw(z, warped=True)
    p = (Z[:3] / 0.5).softmax(0)
    assert torch.equal(warped.tokens, clean.tokens) and len(warped.tokens.unique()) == 3
    assert torch.allclose(warped.probability, p[warped.tokens])
    best, second = p.sort(descending=True).values[:2]
    assert torch.allclose(warped.best, best.expand(1, 200)) and torch.allclose(warped.second, second.expand(1, 200))
    assert torch.allclose(warped.entropy, -(p * p.log()).sum().expand(1, 200))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_excluded_tokens_may_be_drawn_but_have_no_probability(temperature):
    draw = sampler(temperature=temperature).draw(Z.expand(1, 300, -1), excluded=torch.tensor([1, 0]))
    rest = Z[2:5].softmax(0)
    expected = torch.zeros(6).scatter(0, torch.tensor([2, 3, 4]), rest)
    assert 1 in draw.tokens and torch.allclose(draw.probability, expected[draw.tokens])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 2}])
def test_nothing_but_the_mask_still_never_gives_the_mask(options):
    z = torch.full((1, 3, 4), -torch.inf)
    z[..., 0] = 5.0
    draw = sampler((0, 1), **options).draw(z, warped=True, excluded=torch.tensor([3]))
    assert draw.tokens.tolist() == [[2, 2, 2]] and (draw.probability == 0).all()


def test_logits_stay_as_they_are_and_may_be_bf16():
    z = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = z.clone()
    draw = sampler(temperature=0.7, top_p=0.9, top_k=4).draw(z, warped=True)
    assert torch.equal(z, before) and draw.probability.dtype == torch.float32


@pytest.mark.parametrize("noise", ["float32", "float64"])
def test_gumbel_noise_is_finite_at_both_ends(noise, monkeypatch):
    which = sampler(noise=noise)
    which.there = torch.ones(2, 2, dtype=torch.bool)
    for u in (0.0, 1.0):
        made = torch.full((2, 2), u, dtype=getattr(torch, noise))
        monkeypatch.setattr(which.noise, "uniform", lambda *given, made=made: made.clone())
        assert which.gumbel().isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature=-1 is no number >= 0; use 0 for the most probable token"),
        ({"temperature": float("nan")}, "temperature=nan is no number"),
        ({"top_p": 0}, r"top_p=0 is not in \(0, 1\]; use None"),
        ({"top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 is no number of tokens >= 1; use None"),
        ({"top_k": 2.0}, "top_k=2.0 is no number of tokens"),
        ({"noise": "bfloat16"}, "noise='bfloat16': use 'float32' or 'float64'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
