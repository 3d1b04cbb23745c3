"""MiKV at the ends of its settings, token by token, against brute-force codes, and in bytes."""

from dataclasses import replace

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.methods.fed import DIM, GROUP, HEADS, feed, one_layer_model, tokens
from tests.textkv.watch import Largest
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.kernels.codebook import encode
from textkv.kernels.pack import unpack
from textkv.methods.mikv import MiKV
from textkv.methods.snapkv import SnapKV


def run(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def exact_at(layer):
    """Positions in the exact tier: [batch, kv_heads, n]."""
    return layer.segments[-1].held_positions()


@pytest.mark.parametrize(
    ("method", "budget"),
    [("snapkv+adakv+mikv(16,4)", 0.4), ("cake+mikv", 0.4), ("mikv(16,2,grow=True)", 0.4),
     ("snapkv+adakv+mikv", 0.4), ("mikv(16,2,codes='scaled')", 0.4)],
)  # fmt: skip
def test_it_conforms_with_other_scorers(method, budget):
    skipped = {check.name for check in check_method(method, budget) if check.outcome != "passed"}
    declared = {
        "full_budget_equals_full_cache",  # demoted tokens are codes (where all are exact: the test below)
        "equals_masked_full_attention",  # nothing is dropped that could be masked, and codes are not exact
        "forgotten_tokens_are_gone",  # its oracle reads exact numbers
    }
    if not resolve_method(method, budget).capabilities.crop:
        declared.add("crop_or_refusal")  # these scorers demote while decoding, and what is demoted stays so
    assert skipped == declared


@pytest.mark.parametrize("method", ["mikv(16,2)", "snapkv+mikv(16,2)"])
def test_all_important_is_the_full_cache(model_of, method):
    model, ids = model_of("llama"), tiny.text_ids(80, batch=2)
    ours, full = MethodCache(model, method, 1.0), MethodCache(model, "full")
    for step in ids.split((50, 1, 1, 1, 20, 1, 6), 1):
        assert not mismatch(run(model, ours, step), run(model, full, step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scorer", ["h2o", "snapkv", "cake", "snapkv+adakv"])
def test_with_no_bits_for_the_rest_it_is_the_scorer(model_of, scorer):
    model, ids = model_of("llama"), tiny.text_ids(70, batch=2)
    ours, alone = MethodCache(model, f"{scorer}+mikv(16,0)", 0.4), MethodCache(model, scorer, 0.4)
    for step in ids.split((50, 1, 1, 1, 15, 1, 1), 1):
        assert torch.equal(run(model, ours, step), run(model, alone, step))
        for index in range(3):
            assert torch.equal(ours.kept_positions(index), alone.kept_positions(index))


@pytest.mark.parametrize("scorer", ["h2o", "snapkv", "pyramidkv", "cake", "vl-cache"])
def test_after_the_prompt_the_exact_tokens_are_those_that_the_scorer_keeps(model_of, scorer):
    model, ids = model_of("llama"), tiny.text_ids(90, batch=2)
    ours, alone = MethodCache(model, f"{scorer}+mikv", 0.4), MethodCache(model, scorer, 0.4)
    run(model, ours, ids)
    run(model, alone, ids)
    for mine, true in zip(ours.layers, alone.layers, strict=True):
        assert torch.equal(exact_at(mine), true.held_positions())


def test_nothing_important_is_plain_rounding_once_per_token():
    """One exact token (the newest) and no balancer: every other key and value has the codes of brute force."""
    qkv = tokens(49)
    *_, (layer, _) = feed("mikv(16,2,balance=False,group=8)", "1t", qkv, 33)
    low = layer.segments[0]
    assert exact_at(layer).tolist() == [[[48]] * HEADS]
    assert [x.lengths().tolist() for x in layer.segments] == [[[48] * HEADS], [[1] * HEADS]]
    held, at = low.stored(), low.held_positions()[0, 0].long()
    assert sorted(at.tolist()) == list(range(48))
    centre = qkv[1][:, :, :33].mean(2, keepdim=True)
    for ours, true in ((held.keys, (qkv[1] - centre)[:, :, at]), (held.values, qkv[2][:, :, at])):
        groups = true.unflatten(-1, (2, 8))
        zero = groups.amin(-1, keepdim=True).half().float()
        scale = ((groups.amax(-1, keepdim=True) - zero) / 3).half().float()
        rounded = (((groups - zero) / scale).round().clamp(0, 3) * scale + zero).flatten(-2)
        expected = rounded + centre if ours is held.keys else rounded
        assert not mismatch(ours, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("method", "budget"),
    [("mikv(16,2)", "20t"), ("mikv(16,2,codes='scaled')", "20t"), ("mikv(16,4)", 0.4), ("tova+mikv(16,4)", 0.3)],
)
def test_tokens_are_conserved_and_demotion_is_final(method, budget):
    qkv = tokens(100, batch=2)
    demoted, codes = None, None
    for layer, _ in feed(method, budget, qkv, 40):
        at = layer.held_positions()
        everything = torch.arange(layer.seen).expand_as(at).int()
        assert torch.equal(at.sort(-1).values, everything)
        exact, low = exact_at(layer), layer.segments[0]
        if "tova" not in method:
            newest = max(1, exact.shape[-1] // 2)
            assert torch.equal(exact[..., -newest:], everything[..., -newest:])
        if demoted is not None:
            gone = torch.zeros(2, HEADS, layer.seen, dtype=torch.bool).scatter_(-1, demoted.long(), True)
            assert not bool(gone.gather(-1, exact.long()).any())
            n = codes.shape[2]
            assert torch.equal(low.stored().keys[:, :, :n], codes)
        demoted = torch.cat([x.held_positions() for x in layer.segments[:-1]], -1)
        codes = low.stored().keys
    assert codes.shape[2] >= 48


def test_the_exact_share_is_fixed_or_grows():
    qkv, sizes = tokens(100), {}
    for method in ("mikv(16,2)", "mikv(16,2,grow=True)"):
        sizes[method] = [exact_at(layer).shape[-1] for layer, _ in feed(method, 0.3, qkv, 50)]
    assert sizes["mikv(16,2)"] == [15] * 51
    assert sizes["mikv(16,2,grow=True)"] == [int(0.3 * n + 1e-9) for n in range(50, 101)]


def test_demoted_tokens_wait_exactly_until_they_fill_a_block():
    qkv, seen = tokens(60), []
    for layer, _ in feed("mikv(16,2,codes='scaled')", "20t", qkv, 40):
        lengths = [int(segment.lengths()[0, 0]) for segment in layer.segments]
        seen.append((lengths[0], sum(lengths[1:-1]), lengths[-1]))
        if len(lengths) == 3:
            held = layer.segments[1].stored()
            for head in range(HEADS):
                at = held.positions[0, head].long()
                assert torch.equal(held.keys[0, head], qkv[1][0, head, at])
                assert torch.equal(held.values[0, head], qkv[2][0, head, at])
    assert seen == [(20 + i - (20 + i) % 16, (20 + i) % 16, 20) for i in range(21)]


def test_scores_are_those_of_attention_over_all_tokens():
    """At 8 bits codes are all but exact: what the exact tokens have gathered is what a full cache would count."""
    qkv = tokens(60)
    q, k = qkv[0][0].double().unflatten(0, (HEADS, GROUP)), qkv[1][0].double()
    for layer, _ in feed("mikv(16,8)", "24t", qkv, 40):
        n = layer.seen
        scores = (q[:, :, :n] @ k[:, None, :n].mT * DIM**-0.5).masked_fill(
            torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf
        )
        true = scores.softmax(-1).mean(1).sum(1)
        at = exact_at(layer)[0].long()
        assert not mismatch(layer.statistics["h2o"][0], true.gather(-1, at).float(), rtol=5e-3, atol=5e-3)


def test_outputs_are_nearer_to_the_full_cache_than_those_of_dropping():
    qkv = tokens(120)
    outs = {}
    for method in ("full", "h2o", "mikv(16,2)", "mikv(16,4)", "mikv(16,8)"):
        outs[method] = torch.cat([out for _, out in feed(method, 0.2, qkv, 100)][1:], 2)
    gap = {name: float((out - outs["full"]).norm()) for name, out in outs.items()}
    assert gap["h2o"] > 2 * gap["mikv(16,2)"] > 4 * gap["mikv(16,4)"] > 8 * gap["mikv(16,8)"]


# ---- bytes, memory, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "share"), [(2, 0.2), (4, 0.2), (2, 0.5)])
def test_bytes_are_those_of_the_formula(low, share):
    """(r 16 + (1 - r) (b + 32 / g)) / 16 of a half-precision cache; positions, scores and the balancer beside it."""
    n, dim = 2560, 64
    qkv = tuple(x.half() for x in tokens(n, dim=dim))
    ((layer, _),) = feed(f"mikv(16,{low},group=32)", share, qkv, n)
    vectors = sum(
        x.untyped_storage().nbytes()
        for name, x in layer.tensors().items()
        if x.is_floating_point() or x.dtype == torch.uint8
        if not name.startswith("statistic") and name.split(".")[1] not in ("centre", "balance")
    )
    formula = (share * 16 + (1 - share) * (low + 1)) / 16
    assert vectors / (2 * HEADS * n * dim * 2) == pytest.approx(formula, rel=0.01)
    # Position and score of a token and head are 4 bytes each, scores only of the exact ones.
    beside = HEADS * n * (4 + 4 * share) + 2 * HEADS * dim * 4
    assert layer.kv_bytes() == pytest.approx(vectors + beside, rel=0.01)


def test_decoding_never_rebuilds_a_layer(small_tiles):
    qkv = tokens(1100)
    steps = feed("mikv(16,4)", 0.2, qkv, 1060)
    next(steps)
    watch = Largest()
    with watch:
        for _ in steps:
            pass
    assert 0 < watch.numbers < 1060 * HEADS * DIM / 2


def test_later_turns_demote_on(model_of):
    model, ids = model_of("llama"), tiny.text_ids(160, batch=2)
    cache = MethodCache(model, "snapkv+mikv(16,4)", "40t")
    run(model, cache, ids[:, :80])
    before = cache.layers[1].segments[0].stored().keys.clone()
    for i in range(80, 84):
        run(model, cache, ids[:, i : i + 1])
    run(model, cache, ids[:, 84:150])
    layer = cache.layers[1]
    assert before.shape[2] == 32 and layer.segments[0].lengths().tolist() == [[96, 96]] * 2
    assert torch.equal(layer.segments[0].stored().keys[:, :, :32], before)
    assert torch.equal(layer.held_positions().sort(-1).values, torch.arange(150).expand(2, 2, -1).int())
    assert layer.segments[-1].lengths().tolist() == [[40, 40]] * 2


def test_a_prompt_of_one_token_works(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "mikv", "8t")
    for i in range(40):
        assert bool(run(model, cache, ids[:, i : i + 1]).isfinite().all())
    assert [int(x.lengths()[0, 0]) for x in cache.layers[0].segments] == [32, 8]


# ---- turned codes --------------------------------------------------------------------------------------------------


def test_turned_codes_come_one_by_one_and_are_those_of_turboquant():
    """Nothing waits, and what is demoted is what turboquant makes of it, less the prompt's mean key."""
    qkv, seen = tokens(60), []
    for layer, _ in feed("mikv(16,2)", "20t", qkv, 40):
        seen.append([int(segment.lengths()[0, 0]) for segment in layer.segments])
    assert seen == [[20 + i, 20] for i in range(21)]
    low, at = layer.segments[0], layer.segments[0].held_positions()[..., None].long()
    assert torch.equal(low.centre, qkv[1][:, :, :40].mean(2))
    keys = qkv[1].gather(2, at.expand(-1, -1, -1, DIM))
    moved = keys - low.centre[:, :, None]
    alone = keys.norm(dim=-1) < moved.norm(dim=-1)
    rows = encode(torch.where(alone[..., None], keys, moved), low.coding.signs[0], 2, "norm", alone)
    assert torch.equal(low.rows.stored().keys, rows)


def test_a_row_that_demotes_nothing_gets_no_token():
    """A row that has forgotten exact tokens has room, while the other one demotes at each step."""
    model, ids, answers = one_layer_model(), tiny.text_ids(50, batch=2), []
    for rows in (slice(0, 2), slice(1, 2)):
        cache, gone = MethodCache(model, "mikv(16,2)", "24t"), torch.zeros(2, 40, dtype=torch.bool)
        run(model, cache, ids[rows, :40])
        gone[1, 35:] = True
        cache.layers[0].forget(gone[rows])
        answers.append(torch.cat([run(model, cache, ids[rows, n : n + 1])[-1:] for n in range(40, 50)], 1))
    assert not mismatch(*answers, atol=1e-5, rtol=0)


def test_turned_codes_of_two_bits_are_nearer_than_scaled_ones():
    qkv = tokens(200, dim=64)
    outs = {}
    for method in ("full", "mikv(16,2)", "mikv(16,2,codes='scaled')"):
        outs[method] = torch.cat([out for _, out in feed(method, 0.2, qkv, 190)][1:], 2)
    turned, scaled = (float((out - outs["full"]).norm()) for name, out in outs.items() if name != "full")
    assert turned < 0.7 * scaled


@pytest.mark.parametrize("low", [1, 2, 3, 4])
def test_bytes_of_turned_codes_are_those_of_the_formula(low):
    """(r 16 + (1 - r) (b + 16 / D)) / 16 of a half-precision cache."""
    n, dim, share = 2560, 64, 0.2
    ((layer, _),) = feed(f"mikv(16,{low},codes='turned')", share, tuple(x.half() for x in tokens(n, dim=dim)), n)
    held, exact = layer.segments[0].rows.tensors(), layer.segments[1].tensors()
    vectors = sum(part[name].untyped_storage().nbytes() for part in (held, exact) for name in ("k", "v"))
    formula = (share * 16 + (1 - share) * (low + 16 / dim)) / 16
    assert vectors / (2 * HEADS * n * dim * 2) == pytest.approx(formula, rel=0.01)


def test_codes_are_small_integers():
    *_, (layer, _) = feed("mikv(16,2,codes='scaled')", "16t", tokens(48), 48)
    (pool,) = layer.segments[0].pools
    assert pool.k.codes.dtype == torch.uint8 and pool.k.bits == 2 and len(unpack(pool.v)) == 2 * HEADS


def test_what_is_not_finite_is_told_with_layer_row_and_head():
    qkv = tokens(60, batch=2)
    qkv[2][1, 1, 7, 3] = torch.inf
    for codes in ("turned", "scaled"):
        with pytest.raises(ValueError, match="layer 0, row 1, head 1: the values hold NaN"):
            list(feed(f"mikv(16,2,codes='{codes}')", "1t", qkv, 50))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("mikv(16,3,codes='scaled')", "bits=3 cannot be packed"),
        ("mikv(16,3,group=16)", "bits=3 cannot be packed"),
        ("mikv(16,9)", "bits=9 cannot be coded"),
        ("mikv(16,'x')", "low='x' is no number of bits; use 1 to 8, 'fp8', or 0 to drop"),
        ("mikv(16,0,group=8)", "low=0 drops what is unimportant"),
        ("mikv(16,'fp8',codes='turned')", "bits='fp8' cannot be coded"),
        ("mikv(16,2,codes='turned',block=32)", "block=32: turned codes have no scales to share; use codes='scaled'"),
        ("mikv(16,2,codes='packed')", "codes='packed' is not known; use 'turned' or 'scaled'"),
        ("mikv(8,2)", "high=8: important tokens are stored as they are; use 16"),
        ("mikv(16,2,block=20)", "a group of 20 tokens cannot be packed"),
        ("mikv(16,2,group=0)", "group=0: a group needs"),
        ("streaming_llm+mikv", "streaming_llm gives none"),
        ("mikv+snapkv", "snapkv cannot follow mikv"),
    ],
)
def test_bad_settings_are_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(expression, 0.5)


def test_a_scorer_with_a_copy_per_query_head_is_refused():
    copies = replace(SnapKV().capabilities, stores_query_heads=True)
    scorer = SnapKV()
    object.__setattr__(scorer, "capabilities", copies)
    with pytest.raises(ValueError, match="snapkv stores a copy per query head, of which nothing can be demoted"):
        MiKV(inner=scorer)


def test_a_group_that_does_not_fit_the_model_is_refused(model_of):
    with pytest.raises(ValueError, match="a group of 12 channels does not divide head_dim 16; use 16"):
        run(model_of("llama"), MethodCache(model_of("llama"), "mikv(16,2,group=12)"), tiny.text_ids(8))


def _scores(layer):
    """What the scorer has added up, by head and position."""
    (name,) = layer._of_tokens()
    at = layer.segments[-1].held_positions()[0].tolist()
    known = layer.statistic(name)[0].tolist()
    return [dict(zip(places, numbers, strict=True)) for places, numbers in zip(at, known, strict=True)]


def test_what_is_forgotten_leaves_the_others_their_scores():
    *_, (layer, _) = feed("mikv(16,4)", "24t", tokens(90), 60)
    before = _scores(layer)
    assert len(layer.segments) > 1 and before[0]
    gone = torch.zeros(1, 90, dtype=torch.bool)
    gone[0, 3:20] = gone[0, 50:56] = True
    layer.forget(gone)
    after = _scores(layer)
    assert [set(head) for head in after] == [{p for p in head if not gone[0, p]} for head in before]
    assert all(after[h][p] == before[h][p] for h in range(HEADS) for p in after[h])


def test_where_all_demoted_tokens_are_forgotten_it_demotes_on():
    cache = MethodCache(one_layer_model(), "mikv(16,4)", "24t")
    layer = cache.layers[0]
    ids = tiny.text_ids(60)
    model = one_layer_model()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        gone = torch.ones(1, 60, dtype=torch.bool)
        gone[0, layer.segments[-1].held_positions()[0].flatten().unique().long()] = False
        layer.forget(gone)
        held = int(layer.lengths().sum())
        for token in tiny.text_ids(40, seed=1)[0]:
            model(token.view(1, 1), past_key_values=cache)
    assert int(layer.lengths().sum()) == held + 40 * layer.lengths().shape[1], "nothing is dropped, all are demoted"
