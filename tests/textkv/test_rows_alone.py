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
ACTING = (
    "full",
    "window",
    "streaming_llm",
    "lacache",
    "pyramidkv",
    "knorm",
    "kvcrush",
    "vl-cache",
    "duo_attention",
    "duo_attention(ranking='last_queries')",
    "expected+adakv",
    "h2o+adakv",
    "d2o-official",
    "rkv(interval=4,window=4)",
    "rkv(interval=4,window=4)+mikv(16,2)",
    "tri_attention",
    "tri_attention(interval=4)",
    "tri_attention(interval=4,mode='union')",
    "minicache",
    "h2o+minicache",
    "kivi(4,residual=64)",
    "gear(4)",
    "snapkv+gear(4)",
    "turboquant(4)",
    "tova+turboquant(4)",
)
DEMOTING = ("mikv(16,2)", "mikv(16,4)", "snapkv+adakv+mikv(16,2)", "tova+mikv(16,2)", "cake(window=8)+mikv(16,2)")
EVERY = (*METHODS, *ACTING, *DEMOTING, *RETRIEVING)


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


@pytest.mark.parametrize("method", ["kivi(4,group=16,residual=32)", "gear(4,group=16,residual=32)"])
@pytest.mark.parametrize("centre", ["turned", "fixed"])
def test_the_centre_of_a_row_that_packs_later_is_its_own(model_of, method, centre):
    """The shorter row has too few tokens for a block when its neighbour packs its prompt."""
    model, cuts = model_of("llama"), (40, *[1] * 30)
    method = method.replace(")", f",centre='{centre}')")
    ids, real = tiny.text_ids(sum(cuts), batch=2), torch.ones(2, sum(cuts), dtype=torch.long)
    real[1, :25] = 0
    together = answers(model, method, 1.0, ids, real, cuts)[1]
    alone = answers(model, method, 1.0, ids[1:, 25:], real[1:, 25:], (15, *cuts[1:]))[0]
    assert not mismatch(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("tokens", "budget"), [(1, 0.4), (1, "20t"), (0, "20t")])
@pytest.mark.parametrize("method", EVERY)
def test_a_longer_turn_beside_it_changes_nothing_in_a_row(model_of, method, budget, tokens):
    """One token of its own is a decoded one, as it is alone; without any it waits, and loses nothing."""
    needs_faiss(method)
    model, cuts = model_of("llama"), (60, *[1] * 3, 9, *[1] * 4)
    ids, real = tiny.text_ids(sum(cuts), batch=2), torch.ones(2, sum(cuts), dtype=torch.long)
    real[1, 63 : 72 - tokens] = 0
    together = answers(model, method, budget, ids, real, cuts)[1, -4:]
    shown = ids[1:, real[1].bool()]
    alone = answers(model, method, budget, shown, torch.ones_like(shown), (60, *[1] * (7 + tokens)))[0, -4:]
    assert not mismatch(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", EVERY)
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


FIXED = ("mikv(", "turboquant", "window", "streaming_llm")
"""What a first prompt fixes for good: it was the neighbour's."""


@pytest.mark.parametrize("method", EVERY)
def test_a_row_may_begin_in_a_later_block(model_of, method):
    """All of its first block is padding, as where unequal prompts are read in chunks."""
    needs_faiss(method)
    model, cuts = model_of("llama"), (30, 20, *[1] * 4)
    ids, real = tiny.text_ids(sum(cuts), batch=2), torch.ones(2, sum(cuts), dtype=torch.long)
    real[1, :33] = 0
    together = answers(model, method, 0.4, ids, real, cuts)[1, 1:]
    alone = answers(model, method, 0.4, ids[1:, 33:], real[1:, 33:], (17, *[1] * 4))[0]
    fixed = any(name in method for name in FIXED)
    assert not mismatch(together, alone, atol=1.0 if fixed else 1e-4, rtol=0)
