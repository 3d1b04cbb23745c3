"""Keys that are turned to another place are those that are read there."""

from __future__ import annotations

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache, resolve_method
from textkv.segments.dense import DenseSegment
from textkv.segments.ragged import RaggedSegment
from textkv.turning import check_turns, turn

BUDGET = {"full": 1.0, "snapkv": 0.5, "adakv(floor=0.1)": 0.5}
PROMPT = 160


def read(model, method: str, shift: int) -> MethodCache:
    """Two rows of PROMPT tokens that begin `shift` positions further on, and two decoded tokens."""
    torch.manual_seed(1)
    ids, cache = torch.randint(5, 60, (2, PROMPT + 2)), MethodCache(model, method, BUDGET[method])
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
        places = torch.arange(start, end)[None].expand(2, -1) + shift
        with torch.no_grad():
            model(ids[:, start:end], past_key_values=cache, position_ids=places)
    return cache


@pytest.mark.parametrize(
    ("method", "form"), [("full", DenseSegment), ("snapkv", DenseSegment), ("adakv(floor=0.1)", RaggedSegment)]
)
def test_turned_keys_are_those_read_there(method: str, form: type) -> None:
    model = tiny.build("llama")
    here, there = read(model, method, 0), read(model, method, 7)
    turn(here, model, torch.full((2, PROMPT + 2), 7, dtype=torch.int32))
    for mine, other in zip(here.layers, there.layers, strict=True):
        assert isinstance(mine.segments[-1], form)
        held, expected = mine.stored(), other.stored()
        assert torch.equal(held.positions, expected.positions), "where a token lies in its text stays"
        real = held.positions >= 0
        assert torch.allclose(held.keys[real], expected.keys[real], atol=1e-5)


def test_each_row_and_token_its_own_way_and_back() -> None:
    model = tiny.build("llama")
    cache, before = (
        read(model, "adakv(floor=0.1)", 0),
        [layer.stored() for layer in read(model, "adakv(floor=0.1)", 0).layers],
    )
    delta = torch.randint(-9, 9, (2, PROMPT - 6), dtype=torch.int32)  # the last stay
    turn(cache, model, delta)
    moved = [layer.stored().keys for layer in cache.layers]
    turn(cache, model, -delta)
    for layer, turned, was in zip(cache.layers, moved, before, strict=True):
        assert torch.allclose(layer.stored().keys[was.positions >= 0], was.keys[was.positions >= 0], atol=1e-5)
        stays = was.positions >= PROMPT - 6
        assert torch.equal(turned[stays], was.keys[stays]) and not torch.allclose(turned, was.keys)


@pytest.mark.parametrize("method", ["kivi(4)", "snapkv+turboquant(4)", "d2o", "streaming_llm", "quest", "minicache"])
def test_what_holds_no_keys_as_they_were_read_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="cannot be turned to another place"):
        check_turns(tiny.build("llama"), resolve_method(method, 0.5))
