"""FreeCache with its frozen slots in the hands of a textkv method."""

from __future__ import annotations

import pytest
import torch

from dlm.cache import resolve_cache
from dlm.cache.frozen import FrozenCache
from dlm.decode import decode
from tests.dlm.cache.test_identities import gap
from tests.dlm.toys import Rule, dream, llada, prompts, traced


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("delay", [0, 1])
def test_keeping_everything_is_freecache(make, delay):
    model, (ids, _) = make(), prompts(9)
    truth, wanted = traced(model, ids, f"freecache({delay})")
    for method in ("full", "snapkv(1.0)", "knorm(1.0)", "kivi(4)"):  # kivi has too few to pack
        got, seen = traced(model, ids, f"freecache({delay})+{method}")
        assert torch.equal(got.ids, truth.ids) and gap(seen, wanted) < 1e-5, method
        assert got.stats.query_tokens == truth.stats.query_tokens


def test_keeping_everything_is_freecache_in_a_ragged_batch_at_different_speeds():
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    options = dict(gen_length=16, block_length=4, eos="none")
    for rule in (dict(run=3), dict(threshold=0.35)):
        truth = decode(model, ids, mask, cache="freecache", unmask=Rule(**rule), **options)
        got = decode(model, ids, mask, cache="freecache+full", unmask=Rule(**rule), **options)
        assert torch.equal(got.ids, truth.ids)


def test_bytes_are_really_gone():
    """Half of the frozen slots, and the live ones: no buffer of the whole canvas is left."""
    model, (ids, _) = llada(), prompts(40)
    plain = decode(model, ids, gen_length=8, block_length=4, cache="freecache", unmask=Rule(), eos="none").stats
    small = decode(model, ids, gen_length=8, block_length=4, cache="freecache+snapkv(0.5)", unmask=Rule(), eos="none")
    per_slot = 2 * 2 * 32 * 4
    assert plain.cache_bytes == 48 * per_slot == small.stats.cache_bytes_peak
    # The second block was running at the end: 44 slots are frozen, of which 22 are kept, and 4 are live.
    positions = 2 * 4 * 22 * 4  # layers, heads, tokens, bytes
    assert small.stats.cache_bytes == 26 * per_slot + positions


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_slots_leave_once_and_in_order(cfg_scale, monkeypatch):
    model, (ids, mask) = llada(), prompts(3, 9)
    caches = []
    monkeypatch.setattr(
        FrozenCache, "kv_bytes", lambda self: caches.append(self) or 0,
    )  # fmt: skip
    decode(
        model, ids, mask, gen_length=12, block_length=4, cache="freecache+full", unmask=Rule(run=2), eos="none",
        cfg_scale=cfg_scale,
    )  # fmt: skip
    held = caches[-1].store.layers[1].stored().positions[:, 0]
    # Rows that were finished before the last forward have left.
    numbers = caches[-1].canvas.rows.tolist()
    for row, (number, frozen) in enumerate(zip(numbers, caches[-1].frozen.tolist(), strict=True)):
        real = frozen - (6 if number == 0 else 0)
        for half in (row, row + len(numbers)) if cfg_scale else (row,):
            assert held[half][held[half] >= 0].tolist() == list(range(real))


@pytest.mark.parametrize("method", ["snapkv(0.5)", "snapkv(0.5,window=3)+adakv", "adakv(0.5)", "knorm(0.5)+kvcrush"])
@pytest.mark.parametrize("delay", [0, 1])
def test_what_a_method_keeps_of_a_row_does_not_depend_on_its_neighbours(method, delay):
    """Rows whose blocks end at different forwards, and a last block that is shorter: a row that nothing leaves keeps
    what it has, and as many queries choose as when it is alone."""
    model, lengths = llada(), (4, 33, 11)
    ids, mask = prompts(*lengths)
    for rule in (dict(run=4), dict(threshold=0.35)):
        options = dict(gen_length=13, block_length=5, cache=f"freecache({delay})+{method}", eos="none")
        together = decode(model, ids, mask, unmask=Rule(**rule), **options)
        alone = [decode(model, ids[i : i + 1, 33 - n :], unmask=Rule(**rule), **options) for i, n in enumerate(lengths)]
        assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
        assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)


def test_compositions_of_methods_and_budgets():
    policy = resolve_cache("freecache(delay=0)+snapkv(0.3,window=8)+adakv")
    assert policy.method.budget.fraction == 0.3 and policy.method.inner.window == 8
    assert policy.expression == "freecache(delay=0)+snapkv(window=8)+adakv"
    assert resolve_cache("freecache+snapkv('512t')").method.budget.tokens == 512
    assert resolve_cache("freecache+knorm(budget=0.5)").method.budget.fraction == 0.5
    model, (ids, _) = llada(), prompts(20)
    got = decode(model, ids, gen_length=8, block_length=4, cache="freecache+snapkv(0.3)+adakv", unmask=Rule())
    assert (got.ids != model.decoding_spec.mask_id).all()


def test_frozen_slots_are_packed_once():
    """kivi packs 64 at a time: of the 96 slots of the prompt 64, what is behind waits exactly."""
    model, (ids, _) = llada(), prompts(96)
    options = dict(gen_length=8, block_length=4, unmask=Rule(), eos="none")
    plain = decode(model, ids, cache="freecache", **options).stats
    sizes = {}
    for bits in (8, 4):
        stats = decode(model, ids, cache=f"freecache+kivi({bits})", **options).stats
        assert stats.query_tokens == plain.query_tokens
        sizes[bits] = stats.cache_bytes
    # 64 tokens less at 4 bytes, and at bits / 8 instead; scales, offsets, centres and positions come on top.
    packed = 2 * 2 * 32 * 64
    assert plain.cache_bytes - packed * 4 < sizes[4] < sizes[8] < 0.7 * plain.cache_bytes
    assert sizes[8] - sizes[4] == packed // 2


def test_eight_bits_stay_near_the_exact_logits():
    model, (ids, _) = llada(), prompts(96)
    wanted = traced(model, ids, "freecache", gen_length=4)[1]
    first = traced(model, ids, "freecache+kivi(8)", gen_length=4)[1]
    assert torch.allclose(first[0][1], wanted[0][1], atol=1e-5)  # nothing is frozen in the first forward
    assert 0 < float((first[1][1] - wanted[1][1]).masked_fill(first[1][1] == wanted[1][1], 0).abs().max()) < 0.2


@pytest.mark.parametrize(
    "cache, message",
    [
        ("freecache+h2o(0.5)", "h2o.* needs evidence of the whole prompt"),
        ("freecache+quest(0.5)", "quest fetches tokens for each that is decoded, and a canvas reads all of them"),
        ("freecache+retrieval_attention(index='exact')", "retrieval_attention.* fetches tokens for each"),
        ("freecache+retrieval_attention", r"retrieval_attention needs evidence .*\(token ids, hidden states"),
        ("freecache+sentence_kv(ends=(1,))", "sentence_kv.* needs evidence of the whole prompt"),
        ("freecache+kivi(channels=5)", "a group of 5 channels does not divide head_dim 8"),
        ("freecache+minicache(start=5)", "start=5: minicache governs 2 layers of this model and a pair needs two"),
        ("freecache+window(0.5)", "window.* drops tokens while single tokens are decoded"),
        ("dual+snapkv(0.3)", r"only freecache and block freeze slots for good; write freecache\+snapkv\(0.3\)"),
        ("freecache(refresh=4)+snapkv(0.3)", "refresh=4 with snapkv: slots that were handed to a method"),
        ("freecache+snapkw(0.3)", "unknown method 'snapkw'; did you mean snapkv"),
        ("freecache+snapkv(40.0)", "budget=40"),
    ],
)
def test_what_cannot_be(cache, message):
    with pytest.raises(ValueError, match=message):
        decode(llada(), prompts(5)[0], gen_length=8, block_length=4, cache=cache, unmask=Rule())
