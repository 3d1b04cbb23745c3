"""A row of a batch is what it is alone: rows of unequal lengths, padded on the left, over two turns and decoding."""

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache

LENGTHS = (60, 37, 18)
CUTS = (max(LENGTHS), *[1] * 8, 9, *[1] * 4)
METHODS = (
    "h2o",
    "tova",
    "snapkv",
    "snapkv+adakv",
    "cake(window=8)",
    "critic",
    "d2o",
    "expected",
    "rkv",
    "vatp",
    "keydiff",
)
RETRIEVING = (
    "quest(dense=0,page=4)",
    "sentence_kv(ends=(3,17,40,60,77))",
    "retrieval_attention(index='exact')",
    "retrieval_attention(index='ivf',few=16)",
    "retrieval_attention(few=16)",
)
DEMOTING = ("mikv(16,2)", "mikv(16,4)", "snapkv+adakv+mikv(16,2)", "tova+mikv(16,2)", "cake(window=8)+mikv(16,2)")


def needs_faiss(method: str) -> None:
    if "few" in method:
        pytest.importorskip("faiss", reason="faiss is not installed")


def answers(model, method, budget, ids, real, cuts):
    """Logits after each forward, [batch, forwards, vocabulary]."""
    cache, out, at = MethodCache(model, method, budget), [], 0
    places = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for cut in cuts:
            part = slice(at, at + cut)
            told = {"attention_mask": real[:, : at + cut], "position_ids": places[:, part]}
            out.append(model(ids[:, part], past_key_values=cache, **told).logits[:, -1])
            at += cut
    return torch.stack(out, 1)


@pytest.mark.parametrize("budget", [0.4, "20t"])
@pytest.mark.parametrize("method", METHODS + DEMOTING + RETRIEVING)
def test_a_row_equals_that_row_alone(model_of, method, budget):
    needs_faiss(method)
    model, n = model_of("llama"), CUTS[0]
    ids, real = tiny.text_ids(sum(CUTS), batch=len(LENGTHS)), torch.ones(len(LENGTHS), sum(CUTS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        real[row, : n - length] = 0
    together = answers(model, method, budget, ids, real, CUTS)
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1), slice(n - length, None)
        alone = answers(model, method, budget, ids[part], real[part], (length, *CUTS[1:]))
        assert not mismatch(together[row], alone[0], atol=1e-4, rtol=0), f"the row of {length} tokens"


@pytest.mark.parametrize("budget", [0.4, "20t"])
@pytest.mark.parametrize("method", ["snapkv", "snapkv+adakv", "expected", "vatp", "keydiff", "kvcrush", *RETRIEVING])
def test_one_token_beside_a_longer_turn_is_a_decoded_one(model_of, method, budget):
    """It sees what it would see alone, and decides nothing anew for its row."""
    needs_faiss(method)
    model, cuts = model_of("llama"), (60, *[1] * 3, 9, *[1] * 4)
    ids, real = tiny.text_ids(sum(cuts), batch=2), torch.ones(2, sum(cuts), dtype=torch.long)
    real[1, 63:71] = 0
    together = answers(model, method, budget, ids, real, cuts)[1, -5:]
    shown = ids[1:, real[1].bool()]
    alone = answers(model, method, budget, shown, torch.ones_like(shown), (60, *[1] * 8))[0, -5:]
    assert not mismatch(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["h2o", "mikv(16,2)", "mikv(16,4)", "cake+mikv(16,2)", "critic", *RETRIEVING])
def test_a_row_that_gets_padding_while_it_waits_loses_nothing(model_of, method):
    """A row that has ended is filled with padding for three steps, and then goes on."""
    needs_faiss(method)
    model, cuts = model_of("llama"), (40, *[1] * 3, 5, 1)
    ids, real = tiny.text_ids(sum(cuts), batch=2), torch.ones(2, sum(cuts), dtype=torch.long)
    real[1, 40:43] = 0
    together = answers(model, method, 0.5, ids, real, cuts)[1, -2:]
    shown = ids[1:, real[1].bool()]
    alone = answers(model, method, 0.5, shown, torch.ones_like(shown), (40, 5, 1))[0, -2:]
    assert not mismatch(together, alone, atol=1e-4, rtol=0)
