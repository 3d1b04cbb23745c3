"""Forgotten passages leave every layer: the methods for which the whole check holds."""

import pytest

from textkv.conformance import Bench, NotApplicable, _small_llama, forgotten_tokens_are_gone


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "tova", "cake", "critic", "kvcrush", "kivi(4)", "gear(2)"])
def test_forgotten_tokens_are_gone(method):
    try:
        forgotten_tokens_are_gone(Bench(method, 0.4, _small_llama()))
    except NotApplicable as reason:
        assert "mask" in str(reason)
