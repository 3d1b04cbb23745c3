"""Quest, SentenceKV and RetrievalAttention: what they see, hold and refuse, on tiny models."""

from __future__ import annotations

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import kinds, tiny
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.segments.tiered import TieredSegment

SENTENCES = "sentence_kv(ends=(3,17,40,60,77))"
METHODS = ("quest(dense=0,page=4)", SENTENCES, "retrieval_attention(index='exact')")


def read(method: str, budget, ids: torch.Tensor, more: int = 0, kind: str = "dense"):
    model = kinds.model_of_kind(kind)
    cache = MethodCache(model, method, budget)
    kinds.logits(model, ids, cache)
    return model, cache, kinds.steps(model, kinds.ids(more, len(ids), seed=1), cache) if more else None


def tiers(cache: MethodCache) -> list[TieredSegment]:
    return [x for layer in cache.layers for x in layer.segments if isinstance(x, TieredSegment)]


@pytest.mark.parametrize(
    ("method", "budget"),
    [("knorm+" + SENTENCES, 0.4), (SENTENCES, "40t"), ("quest(dense=0,page=4)", "30t"), ("quest(dense=1)", 0.4)],
)
def test_they_conform(method, budget):
    assert all(check.outcome in ("passed", "not applicable") for check in check_method(method, budget))


@pytest.mark.parametrize("method", METHODS)
def test_a_token_sees_its_budget_and_no_more_at_every_step(method):
    model, cache, _ = read(method, "48t", kinds.ids(120, 2))
    for step in range(40):
        kinds.steps(model, kinds.ids(1, 2, seed=step), cache)
        for segment in tiers(cache):
            seen = segment.near() + segment.host.seen
            assert int(seen.max()) <= 48 and int(segment.host.seen.min()) > 0
    assert int(tiers(cache)[0].host.lengths().min()) > 100 - 48, "no decoded token has come to the host"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "sinks", "sliding"])
def test_with_a_full_budget_it_is_the_full_cache(method, kind):
    ids = kinds.ids(80, 2)
    (_, _, ours), (_, _, full) = (read(name, 1.0, ids, 12, kind) for name in (method, "full"))
    assert not mismatch(ours, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_in_one_place(method):
    """Tokens move from the recent ones to the host while the text grows, and none is lost or doubled."""
    _, cache, _ = read(method, "48t", kinds.ids(40), 60)
    for layer in cache.context.layers:
        for head in layer.held_positions()[0]:
            assert head[head >= 0].tolist() == list(range(100))


@pytest.mark.parametrize("budget", [0.5, "48t"])
@pytest.mark.parametrize("method", METHODS)
def test_a_short_first_turn_is_no_plan_for_a_long_one(method, budget):
    """What stays on the device is counted anew in every turn: first tokens come back, and sentences grow longer."""
    parts = [kinds.ids(n, seed=n) for n in (3, 150)]
    _, once, _ = read(method, budget, torch.cat(parts, 1), 40)
    model, turns, _ = read(method, budget, parts[0])
    kinds.logits(model, parts[1], turns)
    kinds.steps(model, kinds.ids(40, seed=1), turns)
    for ours, truth in zip(tiers(turns), tiers(once), strict=True):
        assert vars(ours.plan) == vars(truth.plan) and int(ours.plan.first) > 3
        kept = ours.segments[0].held_positions()[0, 0].tolist()
        assert kept == list(range(int(ours.plan.first))) == truth.segments[0].held_positions()[0, 0].tolist()
        assert 0 < int(ours.near() + ours.host.seen) <= int(ours.plan.seen)
        if method == SENTENCES:
            assert ours.host.retriever.longest.tolist() == truth.host.retriever.longest.tolist()
    for ours, truth in zip(turns.context.layers, once.context.layers, strict=True):
        for head, other in zip(ours.held_positions()[0], truth.held_positions()[0], strict=True):
            held = head[head >= 0].tolist()
            assert held == sorted(set(held)) and (len(held) == 193 or len(held) == int((other >= 0).sum()))


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_gets_nothing_in_a_turn_keeps_its_plan(method):
    """Its neighbour's turn counts the budget anew, 90 tokens after the prompt; alone this row would go on as it was."""
    model, cache, _ = read(method, 0.5, kinds.ids(60, 2), 30)
    held = [x.clone() for x in cache.context.layers[0].lengths()]
    before = [vars(segment.plan) for segment in tiers(cache)]
    mask = torch.ones(2, 130, dtype=torch.int64)
    mask[1, 90:] = 0
    kinds.logits(model, kinds.ids(40, 2, seed=3), cache, mask)
    for segment, plan in zip(tiers(cache), before, strict=True):
        now = vars(segment.plan)
        assert [int(now[name][1]) for name in now] == [int(plan[name][1]) for name in now]
        assert int(now["seen"][0]) > int(plan["seen"][0])
    assert torch.equal(cache.context.layers[0].lengths()[1], held[1])


@pytest.mark.parametrize("method", METHODS)
def test_first_tokens_that_are_decoded_stay_on_the_device(method):
    _, cache, _ = read(method, "48t", kinds.ids(1), 90)
    for segment in tiers(cache):
        first = int(segment.plan.first)
        assert segment.segments[0].held_positions()[0, 0].tolist() == list(range(first)) and first > 1


@pytest.mark.parametrize("method", METHODS)
def test_rows_move_before_anything_is_on_the_host(method):
    """Beams of a short prompt: what a retriever has noted of tokens that will move belongs to their rows too."""
    order = torch.tensor([1, 1, 0])
    model, ours, _ = read(method, "48t", kinds.ids(9, 2))
    _, other, _ = read(method, "48t", kinds.ids(9, 2)[order])
    assert all(segment.host.rows is None for segment in tiers(ours))
    ours.reorder_cache(order)
    assert ours.kv_bytes() == other.kv_bytes()
    new = kinds.ids(70, 3, seed=1)
    assert not mismatch(kinds.steps(model, new, ours), kinds.steps(model, new, other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_came_behind_a_forgotten_token_is_taken_back_in_every_row(method):
    """Rows of unequal length: holes of the shorter one must not stand where `crop` takes the newest tokens."""
    model, cache, _ = read(method, "200t", kinds.ids(2, 2))
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 2:50] = 0
    kinds.logits(model, kinds.ids(62, 2, seed=3), cache, mask)
    kinds.steps(model, kinds.ids(5, 2, seed=4), cache, mask)
    cache.forget([[(3, 4)], [(3, 4)]])
    cache.crop(-4)
    for layer in cache.context.layers:
        for row, last in zip(layer.held_positions(), (64, 16), strict=True):
            assert row.amax(-1).tolist() == [last] * 2


@pytest.mark.parametrize("method", METHODS)
def test_bytes_on_each_side(method):
    _, cache, _ = read(method, "48t", kinds.ids(120))
    report = cache.report()
    assert report.host_bytes == cache.host_bytes() == cache.at_rest.host_bytes > 0
    assert "on the host" in str(report) and report.scanned is None
    if method == SENTENCES:
        long, longer = (read(method, "48t", kinds.ids(n))[1] for n in (450, 900))
        assert longer.host_bytes() <= 1.1 * long.host_bytes()
        # What is seen, and a mean key for each token of the pool at most: bounded by the budget, however long the text.
        token = longer.full_bytes() / 900
        assert longer.kv_bytes() <= (48 + 3 * 48) * token


def test_a_share_of_the_tokens_is_compared():
    _, cache, _ = read("quest(dense=0,page=8)", "32t", kinds.ids(160), 4)
    # Two bounds a page, for every query head.
    assert cache.report().scanned == pytest.approx(2 / 8, rel=0.1)
    _, cache, _ = read("retrieval_attention(index='exact')", "32t", kinds.ids(160), 4)
    assert cache.report().scanned == pytest.approx(1.0)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], "retrieval_attention(few=8)"])
def test_save_and_fork(tmp_path, method):
    if "few" in method:
        pytest.importorskip("faiss", reason="faiss is not installed")
    model, cache, _ = read(method, "48t", kinds.ids(90, 2), 3)
    cache.save(tmp_path)
    loaded, more = MethodCache.load(tmp_path, model), kinds.ids(12, 2, seed=2)
    other = cache.fork()
    assert loaded.kv_bytes() == cache.kv_bytes()
    expected = kinds.steps(model, more, cache)
    assert not mismatch(kinds.steps(model, more, other), expected, atol=1e-5, rtol=0)
    assert not mismatch(kinds.steps(model, more, loaded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("index", ["graph", "hnsw", "ivf"])
def test_an_index_that_has_grown_comes_back_as_it_was(tmp_path, index):
    """From a file and in a fork, also after some of it was forgotten; looked at so closely that it may miss keys."""
    pytest.importorskip("faiss", reason="faiss is not installed")
    method = f"retrieval_attention(index='{index}',few=8,effort=2,degree=4)"
    model, cache, _ = read(method, "32t", kinds.ids(150, 2), 3)
    kinds.steps(model, kinds.ids(40, 2, seed=1), cache)
    for turn in range(2):
        cache.save(tmp_path / str(turn))
        loaded, other = MethodCache.load(tmp_path / str(turn), model), cache.fork()
        more = kinds.ids(40, 2, seed=2 + turn)
        expected = kinds.steps(model, more, cache)
        assert torch.equal(kinds.steps(model, more, other), expected)
        assert torch.equal(kinds.steps(model, more, loaded), expected)
        cache.forget([[(20, 30)], [(25, 27)]])


def test_the_host_has_a_limit():
    model = kinds.model_of_kind("dense")
    cache = MethodCache(model, "quest(dense=0,host_gib=1e-5)", "32t")
    with pytest.raises(ValueError, match="host memory: .* bytes for .* the limit is 3,579; raise"):
        kinds.logits(model, kinds.ids(120), cache)
    kinds.logits(model, kinds.ids(20), MethodCache(model, "quest(dense=0,host_gib=1e-5)", "32t"))


def test_no_token_is_lost_when_the_host_is_full_in_the_middle_of_a_text():
    free, bound = "quest(dense=0,page=4)", "quest(dense=0,page=4,host_gib=1e-4)"
    model, cache, _ = read(bound, "32t", kinds.ids(80))
    _, other, _ = read(free, "32t", kinds.ids(80))
    new = kinds.ids(200, seed=1)
    with pytest.raises(ValueError, match="host memory: .* raise the limit, or evict"):
        for step in range(200):
            kinds.logits(model, new[:, step : step + 1], cache)
            kinds.logits(model, new[:, step : step + 1], other)
    assert 0 < step < 199
    for layer in cache.context.layers:
        for head in layer.held_positions()[0]:
            assert set(range(80 + step)) <= set(head[head >= 0].tolist())
    # What the host held is as it was, index and all.
    for segment in tiers(cache):
        assert segment.host.retriever.length == segment.host.rows.used


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("quest+adakv", "gives none|host memory"), ("quest+kivi(4)", "keeps its tokens in host memory"),
        ("snapkv+quest", "wraps no other"), ("quest(page=0)", "page=0"), ("quest(recent=0)", "recent=0"),
        ("sentence_kv(factor=0.5)", "factor=0.5"), ("sentence_kv(longest=0)", "longest=0"),
        ("retrieval_attention(index='flat')", "index='flat'"), ("retrieval_attention(sample=0)", "sample=0"),
        ("quest(host_gib=-1)", "host_gib=-1"), ("full+sentence_kv", "needs importance scores"),
    ],
)  # fmt: skip
def test_refused_when_built(method, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(method, 0.5)


def test_sentences_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="sentence_kv.*tokenizer='FOLDER'"):
        MethodCache(kinds.model_of_kind("dense"), "sentence_kv", 0.5)
    with pytest.raises(ValueError, match="no tokenizer in '/nowhere'"):
        MethodCache(kinds.model_of_kind("dense"), "sentence_kv(tokenizer='/nowhere')", 0.5)


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_sentences_around_pictures(model_of, family):
    """Such a model embeds tokens before its decoder is called; their ids are known all the same."""
    model, (inputs, _) = model_of(family), tiny.screens(2, text=30)
    outputs = []
    for method in (SENTENCES, "full"):
        model.model.rope_deltas = None
        cache = MethodCache(model, method, 1.0)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            new = kinds.ids(1, seed=1)
            outputs.append(model(new, past_key_values=cache).logits)
        if method == SENTENCES:
            noted = tiers(cache)[0].host.retriever
            ids = torch.cat([inputs["input_ids"], new], 1)[0]
            for at, ends in zip(noted.log_at[0].tolist(), noted.log_ends[0].tolist(), strict=True):
                assert ends == (int(ids[at]) in (3, 17, 40, 60, 77))
    assert not mismatch(*outputs, atol=1e-5, rtol=1e-5)


def test_sentences_need_ids():
    model = kinds.model_of_kind("dense")
    ids = kinds.ids(30)
    with pytest.raises(ValueError, match="reads token ids"), torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=MethodCache(model, SENTENCES, 0.5))


def test_faiss_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    model = kinds.model_of_kind("dense")
    with pytest.raises(ValueError, match=r"agentkv\[retrieval\].*index='exact'"):
        MethodCache(model, "retrieval_attention", 0.5)
    MethodCache(model, "retrieval_attention(index='exact')", 0.5)


def test_an_index_of_another_length_is_refused(tmp_path):
    model, cache, _ = read("quest(dense=0)", "32t", kinds.ids(90))
    tiers(cache)[0].host.retriever.length -= 1
    with pytest.raises(ValueError, match="built for .* tokens and .* are stored"):
        kinds.steps(model, kinds.ids(1), cache.fork())
    cache.save(tmp_path)
    with pytest.raises(ValueError, match="built for .* tokens and .* are stored"):
        MethodCache.load(tmp_path, model)
