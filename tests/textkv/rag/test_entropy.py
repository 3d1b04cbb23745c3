"""Entropy-guided decoding: its figures by hand, its limits, and that temperature 0 is greedy decoding."""

import math

import pytest
import torch

from textkv.models.loading import load
from textkv.rag import Reader
from textkv.rag.entropy import HOTTEST, Drawing, GuidedPrefix, Unsure
from textkv.rag.sampling import Prefix

PROMPT = "[1] the code of falcon is amber 47 .\nQuestion: what is the code of falcon ?"


def test_figures_by_hand():
    # p = 1/2, 1/4, 1/4: 1.5 bits, and (0.5^2) of varentropy. One head sees one token, the other both alike.
    found = Unsure.of(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert found.entropy == pytest.approx(1.5) and found.varentropy == pytest.approx(0.25)
    assert found.attention_entropy == pytest.approx(0.5) and found.attention_varentropy == pytest.approx(0.25)
    assert found.agreement == pytest.approx(0.25)
    assert found.interaction == pytest.approx((0 + math.log(1e10) + 2 * math.log(2)) / 4)
    drawn = Drawing(top_k=10).at(found)
    assert drawn.temperature == pytest.approx(0.666 * (1 + 0.3 * 1.75 + 0.2 * 0.75 - 0.2 * 0.25))
    assert drawn.top_p == pytest.approx(0.9 * 1.025) and drawn.min_p == pytest.approx(0.01)
    assert drawn.top_k == round(10 * (1 + 0.3 * found.interaction - 0.2 * 0.25))


def test_no_doubt_however_large_leaves_the_limits():
    wild = Unsure(20.0, 40.0, 10.0, 30.0, 0.0, 900.0)
    assert Drawing().at(wild) == Drawing(temperature=HOTTEST, top_p=1.0, top_k=100, min_p=0.01)
    sure = Drawing().at(Unsure(0.0, 0.0, 0.0, 0.0, 9.0, 0.0))
    assert sure.temperature == 0 and sure.top_k == 1


def test_what_is_cut_off_is_never_drawn():
    logits, generator = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.Generator().manual_seed(0)
    for kind, allowed in (({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0, 1}), ({"min_p": 0.6}, {0, 1})):
        drawing = Drawing(**({"temperature": 1.0, "top_p": 1.0, "top_k": 9, "min_p": 0.0} | kind))
        assert {drawing.draw(logits, generator, 1) for _ in range(60)} == allowed
    many = Drawing(temperature=1.0, top_p=1.0, min_p=0.0)
    often = sum(many.draw(logits, generator, 5) == 0 for _ in range(100))
    assert often > sum(many.draw(logits, generator, 1) == 0 for _ in range(100))


@pytest.mark.parametrize("cache, budget", [("full", None), ("critic", 0.5)])
def test_temperature_0_is_greedy_and_one_prefix_serves_all(cache, budget):
    reader = Reader(*load("mini"), cache, budget)
    prefix = GuidedPrefix(reader, PROMPT)
    drawn = prefix.sample(most=5, seed=3)
    greedy = prefix.sample(Drawing(temperature=0), most=5)
    assert prefix.sample(most=5, seed=3) == drawn
    if cache == "full":
        assert greedy == Prefix(reader, PROMPT).sample(0, most=5)


def test_refusals():
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"min_p": 1}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="no way to draw"):
            Drawing(**wrong)
