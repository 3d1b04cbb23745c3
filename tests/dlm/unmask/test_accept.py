"""The six acceptance rules against slow definitions, and ends of text as one event."""

from __future__ import annotations

import pytest
import torch

from dlm.unmask.accept import Acceptance, DraftScores

V = 12
NO_ENDS = torch.empty(0, dtype=torch.int64)


def logits(n=200, seed=0):
    return 2 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def drafts(n=200, seed=1, size=V):
    return torch.randint(0, size, (n,), generator=torch.Generator().manual_seed(seed))


def slow(rule, z, token):
    """One draft: place in the guider's order, probability, mass of what is before it."""
    p = z.double().softmax(0).tolist()
    order = sorted(range(V), key=lambda i: (-p[i], i))
    place = order.index(token)
    return {
        "exact": place == 0,
        "topk": place < 3,
        "relative": place < 3 and p[token] >= 0.4 * p[order[0]],
        "threshold": p[token] > 0.15,
        "aggressive": place < 2 or p[token] > 0.2 or sum(p[i] for i in order[:place]) < 0.6,
    }[rule.rule]


@pytest.mark.parametrize(
    "rule",
    [
        Acceptance("exact"),
        Acceptance("topk", k=3),
        Acceptance("relative", k=3, ratio=0.4),
        Acceptance("threshold", tau=0.15),
        Acceptance("aggressive", k=2, tau=0.2, mass=0.6),
    ],
    ids=lambda rule: rule.rule,
)
def test_equals_the_definition(rule):
    z, d = logits(), drafts()
    got = rule(DraftScores(z.clone(), d, NO_ENDS), None)
    assert got.tolist() == [slow(rule, row, token) for row, token in zip(z, d.tolist(), strict=True)]
    assert 0 < got.sum() < len(got)


def test_sample_accepts_as_often_as_the_guider_would_draw_it():
    z = logits(1).expand(20_000, -1)
    token = int(z[0].argmax())
    generator = torch.Generator().manual_seed(0)
    seen = DraftScores(z.clone(), torch.full((20_000,), token), NO_ENDS)
    got = Acceptance("sample")(seen, lambda: torch.rand(20_000, generator=generator))
    assert abs(got.float().mean() - z[0].softmax(0)[token]) < 0.015


def test_defaults_of_the_rules():
    assert Acceptance("topk").k == 2 and Acceptance("aggressive").k == 5
    assert (Acceptance("relative").ratio, Acceptance("threshold").tau) == (0.5, 0.1)
    assert (Acceptance("aggressive").tau, Acceptance("aggressive").mass) == (0.05, 0.95)


def test_every_way_to_end_is_the_same_event():
    z = torch.full((1, V), -10.0)
    z[0, [3, 7, 5]] = torch.tensor([1.0, 1.2, 1.5])  # 3 and 7 end the text; together they lead before 5
    ends = torch.tensor([3, 7])
    p = z[0].softmax(0)
    for token, expected in ((3, True), (7, True), (5, False), (0, False)):
        assert bool(Acceptance("exact")(DraftScores(z.clone(), torch.tensor([token]), ends), None)) == expected
    seen = DraftScores(z.clone(), torch.tensor([7]), ends)
    assert torch.allclose(seen.probability, p[3] + p[7]) and int(seen.rank) == 0
    assert torch.allclose(DraftScores(z.clone(), torch.tensor([5]), ends).ahead, p[3] + p[7])


@pytest.mark.parametrize("rule", ["exact", "topk", "relative", "threshold", "aggressive", "sample"])
def test_a_token_that_the_guider_does_not_have_is_never_accepted(rule):
    z = torch.full((1, V), -50.0)
    z[0, V - 1] = 50.0
    assert not Acceptance(rule)(DraftScores(z.clone(), torch.tensor([V + 3]), NO_ENDS), lambda: torch.zeros(1))
    assert Acceptance(rule)(DraftScores(z.clone(), torch.tensor([V - 1]), NO_ENDS), lambda: torch.zeros(1))


@pytest.mark.parametrize("rule", ["exact", "topk"])
def test_equals_go_to_the_lowest_id(rule):
    z, order = torch.zeros(3, V), torch.tensor([0, 1, 2])
    expected = {"exact": [True, False, False], "topk": [True, True, False]}[rule]
    assert Acceptance(rule)(DraftScores(z, order, NO_ENDS), None).tolist() == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "greedy"}, "accept='greedy' is not known; use one of exact, topk, relative"),
        ({"rule": "exact", "k": 3}, "k=3: accept='exact' takes no parameter"),
        ({"rule": "topk", "tau": 0.1}, "tau=0.1: accept='topk' takes k"),
        ({"rule": "topk", "k": 0}, "k=0 is no number of tokens >= 1; topk has 2 by default"),
        ({"rule": "relative", "ratio": 2}, r"ratio=2 is not in \[0, 1\]; relative has 0.5 by default"),
        ({"rule": "aggressive", "mass": -1}, r"mass=-1 is not in \[0, 1\]"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Acceptance(**options)
