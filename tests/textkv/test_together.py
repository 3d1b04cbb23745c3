"""Several conversations in one forward: each cache holds, and each row says, what it does alone."""

from __future__ import annotations

import pytest
import torch

from agentkv.eval import tiny as families
from tests.textkv import kinds, tiny
from textkv import MethodCache, list_methods
from textkv.method import REGISTRY
from textkv.together import forward, packs

OURS = [name for name in list_methods() if REGISTRY[name].__module__.startswith("textkv.")]
SPELLED = {"sentence_kv": "sentence_kv(ends=(3,17,40))"}  # the small model has no tokenizer
LENGTHS = (23, 40, 19)
FAMILIES = (
    "llama", "qwen2", "qwen3_moe", "mistral", "phi3", "olmo2", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss",
    "cohere2", "llama4_text", "opt", "gpt2", "falcon", "moshi", "granite", "glm4", "lfm2", "jamba", "qwen3_5_text",
)  # fmt: skip


def compared(model, method, budget, lengths=LENGTHS, decoded=6):
    """Asserts that rows say and hold together what they do alone; returns how often several were read at once. Row n
    joins n steps later, and its second prompt comes in the middle of the others' decoding."""
    close = dict(atol=1e-4, rtol=1e-3)
    rows = []
    for number, length in enumerate(lengths):
        new = list(kinds.ids(length + decoded, seed=number).split([length] + [1] * decoded, 1))
        new.insert(3 + number, kinds.ids(11, seed=50 + number))
        rows.append(new)
    alone = [MethodCache(model, method, budget) for _ in rows]
    beside = [MethodCache(model, method, budget) for _ in rows]
    together = 0
    for step in range(len(rows[0]) + len(rows)):
        # A row comes late, and another has left.
        here = [n for n in range(len(rows)) if 0 <= step - n < len(rows[n])]
        if not here:
            continue
        expected = torch.cat([forward(model, [(alone[n], rows[n][step - n])]) for n in here])
        found = forward(model, [(beside[n], rows[n][step - n]) for n in here])
        together += len(here) > 1
        torch.testing.assert_close(found, expected, **close)
    for one, other in zip(alone, beside, strict=True):
        assert one.tokens_seen == other.tokens_seen and one.kv_bytes() == other.kv_bytes()
        for layer in one.context.layers:
            number = layer.kind.number
            assert torch.equal(one.kept_positions(number), other.kept_positions(number))
    return together


@pytest.mark.parametrize("method", OURS)
def test_every_method_keeps_what_it_keeps_alone(method):
    assert compared(tiny.build("llama"), SPELLED.get(method, method), None if method == "full" else 0.5) > 6


def test_a_single_row_is_an_ordinary_forward():
    model = tiny.build("llama")
    ids, cache = kinds.ids(12), MethodCache(model, "snapkv", 0.5)
    with torch.no_grad():
        expected = [model(x, past_key_values=cache, logits_to_keep=1).logits[:, -1] for x in (ids, ids[:, :1])]
    cache = MethodCache(model, "snapkv", 0.5)
    assert all(
        torch.equal(forward(model, [(cache, x)]), told) for x, told in zip((ids, ids[:, :1]), expected, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_said_to_read_several_does_so_beyond_its_windows(family):
    model = families.build(family)
    try:
        MethodCache(model)
    except ValueError:
        pytest.skip("no cache of ours")
    if not packs(model, lambda: MethodCache(model)):
        pytest.skip("answers in turn")
    assert compared(model, "full", None) > 6 and compared(model, "snapkv", 0.5) > 6


def test_states_are_not_read_together():
    model = kinds.model_of_kind("hybrid")
    assert not packs(model, lambda: MethodCache(model))
    for model in (*map(kinds.model_of_kind, ("dense", "sliding", "sinks")), tiny.build("qwen2_5_vl")):
        assert packs(model, lambda model=model: MethodCache(model)), type(model)


def test_a_model_that_counts_by_itself_is_found_out(monkeypatch):
    """One that takes no positions would give all rows those of a single text."""
    model = tiny.build("qwen2")
    real = model.forward

    def counts(input_ids, position_ids=None, past_key_values=None, **more):
        return real(input_ids, past_key_values=past_key_values, **more)

    monkeypatch.setattr(model, "forward", counts)
    assert not packs(model, lambda: MethodCache(model))
