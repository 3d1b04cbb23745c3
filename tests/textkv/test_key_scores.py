"""Knorm and KeyDiff: scores from keys alone."""

from types import SimpleNamespace

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.test_eviction import case
from tests.textkv.test_layer_budgets import kept, prompt
from textkv.methods.keydiff import KeyDiff
from textkv.methods.knorm import Knorm

LAYER = SimpleNamespace(index=0)
NOBODY = torch.zeros(1, 1, 0, 2)


def scores(method, keys, keep=3):
    return method.score(LAYER, *case(torch.tensor(keys)[None, None], NOBODY), keep)[0, 0]


def test_small_norms_stay():
    keys = [[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]
    assert scores(Knorm(), keys).tolist() == [-5.0, -1.0, -2.0, 0.0]
    assert scores(Knorm(recent=2), keys)[2:].tolist() == [float("inf")] * 2


def test_the_key_that_differs_stays():
    """Three keys of any length along x and one along y: the anchor is (3/4, 1/4)."""
    found = scores(KeyDiff(), [[1.0, 0.0], [5.0, 0.0], [0.1, 0.0], [0.0, 2.0]])
    along, across = -3 / 10**0.5, -1 / 10**0.5
    assert torch.allclose(found, torch.tensor([along, along, along, across]), atol=1e-6)


def test_equal_keys_and_zero_keys_have_equal_scores():
    assert scores(KeyDiff(), [[1.0, 1.0]] * 4).unique().numel() == 1
    assert scores(KeyDiff(), [[0.0, 0.0]] * 4).tolist() == [0.0] * 4


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
@pytest.mark.parametrize("method", ["knorm", "keydiff"])
def test_every_family_keeps_the_budget(model_of, family, method):
    _, positions = kept(model_of(family), method, 0.25, prompt())
    assert [p.shape[-1] for p in positions] == [16] * 3
    assert all((p.diff(dim=-1) > 0).all() for p in positions)


def test_skipped_layers_keep_everything(model_of):
    _, positions = kept(model_of("llama"), "knorm(skip_layers=2)", 0.25, prompt())
    assert [p.shape[-1] for p in positions] == [64, 64, 16]


def test_recent_tokens_stay(model_of):
    for method in ("knorm(recent=4)", "keydiff(recent=4)"):
        _, positions = kept(model_of("llama"), method, 0.25, prompt())
        assert all((p[..., -4:] == torch.arange(60, 64)).all() for p in positions)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="recent=-1"):
        Knorm(recent=-1)
    with pytest.raises(ValueError, match="recent=-1"):
        KeyDiff(recent=-1)
