"""Calls that contradict the cache they bring: each is refused in one line, and leaves the cache as it was."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import kinds
from textkv import MethodCache

GREEDY = dict(do_sample=False, max_new_tokens=4)
EACH = list(kinds.KINDS)


def filled(kind: str, batch: int = 1):
    """A model and a cache that has seen 20 columns."""
    model = kinds.model_of_kind(kind)
    cache = MethodCache(model, "snapkv", 0.4)
    kinds.logits(model, kinds.ids(20, batch), cache)
    return model, cache


def goes_on(model, cache, batch: int = 1) -> bool:
    """Whether a further turn gives what it gives on a cache that met no refused call."""
    expected = kinds.logits(model, kinds.ids(5, batch, seed=1), filled_again(model, batch))
    return not mismatch(kinds.logits(model, kinds.ids(5, batch, seed=1), cache), expected, atol=1e-5, rtol=0)


def filled_again(model, batch: int):
    cache = MethodCache(model, "snapkv", 0.4)
    kinds.logits(model, kinds.ids(20, batch), cache)
    return cache


def refuses(line: str, call) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=line) as found:
        call()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", EACH)
def test_generate_with_the_new_ids_alone(kind):
    """It takes the whole conversation, and cuts what was seen off the front: nothing is left of fewer ids."""
    model, cache = filled(kind)
    refuses(
        "no token to a cache that has seen 20: generate.. takes the ids of the whole conversation",
        lambda: model.generate(kinds.ids(5), past_key_values=cache, **GREEDY),
    )
    assert goes_on(model, cache)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("seen", [False, True])
def test_no_token_at_all(kind, seen):
    model, cache = filled(kind)
    if not seen:
        cache.reset()
    refuses("no token to a cache that has seen", lambda: model(kinds.ids(5)[:, :0], past_key_values=cache))
    empty = model.get_input_embeddings()(kinds.ids(5))[:, :0]
    refuses("no token to a cache that has seen", lambda: model(inputs_embeds=empty, past_key_values=cache))
    assert cache.get_seq_length() == (20 if seen else 0)
    assert not seen or goes_on(model, cache)


@pytest.mark.parametrize("kind", EACH)
def test_use_cache_false_beside_a_cache(kind):
    """`generate` would feed the whole text at every step, behind what it fed before: 12 tokens, then 13, then 14."""
    model, cache = filled(kind)
    refuses("use_cache=False and past_key_values", lambda: model(kinds.ids(5), past_key_values=cache, use_cache=False))
    refuses(
        "use_cache=False and past_key_values",
        lambda: model.generate(kinds.ids(25), past_key_values=cache, use_cache=False, **GREEDY),
    )
    assert goes_on(model, cache)


@pytest.mark.parametrize("kind", EACH)
def test_gradient_checkpointing_takes_the_cache_away(kind):
    model = deepcopy(kinds.model_of_kind(kind)).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    cache = MethodCache(model, "snapkv", 0.4)
    refuses("gradient checkpointing.*model.eval", lambda: model(kinds.ids(20), past_key_values=cache))
    refuses(
        "gradient checkpointing.*model.eval", lambda: model.generate(kinds.ids(20), past_key_values=cache, **GREEDY)
    )
    model.eval()
    assert kinds.logits(model, kinds.ids(20), cache).isfinite().all() and cache.get_seq_length() == 20


@pytest.mark.parametrize("kind", ["dense", "sliding", "sinks"])
@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_another_number_of_rows(kind, before, now):
    model, cache = filled(kind, before)
    refuses(f"{now} rows come to a cache of {before}", lambda: kinds.logits(model, kinds.ids(5, now), cache))
    assert goes_on(model, cache, before)


@pytest.mark.parametrize("kind", ["dense", "sliding", "sinks"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_other_rows(kind, rows):
    """One row's padding was taken for that of all; of three rows the last was not looked at."""
    model = kinds.model_of_kind(kind)
    mask = torch.ones(rows, 10, dtype=torch.int64)
    mask[:, :4] = 0
    cache = MethodCache(model, "full")
    call = partial(model, kinds.ids(10, 2), attention_mask=mask, past_key_values=cache)
    refuses(rf"attention_mask of shape \({rows}, 10\) for 2 rows", call)
    assert cache.get_seq_length() == 0


def test_a_graph_that_is_exported_or_traced():
    model = deepcopy(kinds.model_of_kind("dense"))
    cache = MethodCache(model, "full")

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, past_key_values=cache).logits

    refuses("cannot be exported or traced", lambda: torch.export.export(Reader(), (kinds.ids(8),), strict=False))
    refuses("cannot be exported or traced", lambda: torch.jit.trace(Reader(), (kinds.ids(8),)))
    assert cache.get_seq_length() == 0
    # and the model alone is exported as before
    torch.export.export(model, (kinds.ids(8),), {"use_cache": False}, strict=False)


@pytest.mark.parametrize("given", [None, "llama", type(kinds.model_of_kind("dense")), torch.nn.Linear(2, 2)])
def test_what_is_no_model(given):
    with pytest.raises(ValueError, match="no transformers model"):
        MethodCache(given, "full")
