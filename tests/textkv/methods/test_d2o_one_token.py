"""D2O's short way at a decoded token, on which nothing is asked of the device, against its general way."""

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache
from textkv.methods.d2o import D2O, THRESHOLD


@pytest.mark.parametrize("method", ["d2o", "d2o-official", "d2o(merge_keys='pre')", "d2o(merge_keys='none')"])
def test_one_token_out_is_what_the_general_way_does(method, monkeypatch):
    model, caches = tiny.build("llama"), []
    ids = tiny.text_ids(40, batch=2)
    for general in (False, True):
        if general:
            monkeypatch.setattr(D2O, "_drop_one", lambda *_: False)
        cache = MethodCache(model, method, 0.5)
        with torch.no_grad():
            model(ids[:, :28], past_key_values=cache)
            for token in ids[:, 28:].split(1, 1):
                model(token, past_key_values=cache)
        caches.append(cache)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.held_positions(), other.held_positions())
        torch.testing.assert_close(one.statistics[THRESHOLD], other.statistics[THRESHOLD])
        torch.testing.assert_close(vars(one.stored()), vars(other.stored()))
