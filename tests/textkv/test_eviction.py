"""SnapKV and Ada-KV: hand cases, identities between methods, ties, holes, and bytes that heads really give back."""

from types import SimpleNamespace

import pytest
import torch

from tests.textkv import tiny
from textkv import Budget, MethodCache
from textkv.eviction import HIDDEN, NEVER, PROTECTED, keep_best
from textkv.evidence import Evidence
from textkv.methods.adakv import AdaKV
from textkv.methods.snapkv import SnapKV
from textkv.scores import group_mean, pool
from textkv.segments.base import Stored

LAYER = SimpleNamespace(index=0)


def case(keys, queries):
    batch, heads, n, dim = keys.shape
    positions = torch.arange(n, dtype=torch.int32).expand(batch, heads, n)
    return Stored(keys, keys, positions), Evidence(queries, dim**-0.5, torch.full((batch,), n))


def test_average_pooling_scales_the_borders_down():
    assert torch.allclose(pool(torch.ones(1, 6), 5)[0], torch.tensor([0.6, 0.8, 1.0, 1.0, 0.8, 0.6]))
    assert pool(torch.ones(1, 6), 5, "max")[0].tolist() == [1.0] * 6


def test_hand_case_without_pooling():
    """One head, six keys, window 2: the second query's row is known exactly, the first's is uniform."""
    keys = torch.zeros(1, 1, 6, 2)
    keys[0, 0, 1, 0] = 1.0
    queries = torch.zeros(1, 1, 2, 2)
    queries[0, 0, 1, 0] = 2**0.5 * torch.log(torch.tensor(3.0))
    scores = SnapKV(window=2, kernel=1).score(LAYER, *case(keys, queries), keep=4)[0, 0]
    uniform, row = 1 / 5, 1 / 8
    expected = [uniform + row, uniform + 3 * row, uniform + row, uniform + row]
    assert torch.allclose(scores[:4], torch.tensor(expected), atol=1e-6)
    assert scores[4:].tolist() == [PROTECTED, PROTECTED]


def test_group_mean_equals_explicit_repetition_and_heads_may_be_permuted():
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 3, 20, 8, generator=g), torch.randn(1, 6, 4, 8, generator=g)
    scores = SnapKV(window=4).score(LAYER, *case(keys, queries), keep=10)
    repeated = SnapKV(window=4).score(LAYER, *case(keys.repeat_interleave(2, 1), queries), keep=10)
    past = slice(0, 16)
    assert torch.allclose(scores[..., past], group_mean(repeated[..., past], 3), atol=1e-6)
    order = [2, 0, 1]
    shuffled = queries.unflatten(1, (3, 2))[:, order].flatten(1, 2)
    assert torch.allclose(SnapKV(window=4).score(LAYER, *case(keys[:, order], shuffled), keep=10), scores[:, order])


def test_a_window_that_does_not_fit_shrinks():
    keys, queries = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 16, 8)
    scores = SnapKV(window=16).score(LAYER, *case(keys, queries), keep=5)[0, 0]
    assert (scores == PROTECTED).nonzero()[:, 0].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("safeguard", ["mix", "protect"])
def test_adakv_spends_what_uniform_would(safeguard):
    g = torch.Generator().manual_seed(1)
    past = torch.rand(1, 4, 40, generator=g) * torch.tensor([1.0, 5.0, 0.2, 2.0])[None, :, None]
    scores = torch.nn.functional.pad(past, (0, 4), value=PROTECTED)
    seen = Evidence(torch.zeros(1, 4, 4, 8), 1.0, torch.tensor([44]))
    method = AdaKV(floor=0.25, safeguard=safeguard, budget=Budget(0.5))
    counts = method.counts(LAYER, scores, seen)[0]
    assert int(counts.sum()) == 4 * 22 and counts.argmax() == 1 and int(counts.min()) >= 4 + int(0.25 * 18)


def test_adakv_with_floor_one_or_one_head_is_its_scorer():
    scores = torch.nn.functional.pad(torch.rand(1, 3, 30), (0, 2), value=PROTECTED)
    seen = Evidence(torch.zeros(1, 3, 2, 8), 1.0, torch.tensor([32]))
    for safeguard in ("mix", "protect"):
        method = AdaKV(floor=1.0, safeguard=safeguard, budget=Budget(0.5))
        assert method.counts(LAYER, scores, seen).tolist() == [[16, 16, 16]]
        assert AdaKV(floor=0.2, safeguard=safeguard, budget=Budget(0.5)).counts(
            LAYER, scores[:, :1], seen
        ).tolist() == [[16]]


def test_a_strong_head_keeps_more_and_the_bytes_follow(model_of):
    model = model_of("llama")
    cache, uniform = MethodCache(model, "adakv(floor=0.1)", 0.4), MethodCache(model, "snapkv", 0.4)
    ids = tiny.text_ids(80)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=uniform)
    rows = [row["stored"] for row in cache.report().rows]
    assert any(len(set(stored)) > 1 for stored in rows) and all(sum(stored) == 2 * 32 for stored in rows)
    assert abs(cache.at_rest.kv_bytes - uniform.at_rest.kv_bytes) < 0.02 * uniform.at_rest.kv_bytes


def test_ties_go_to_the_lower_index(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "snapkv(kernel=1)", "6t")
    with torch.no_grad():
        model(torch.full((1, 30), 7), past_key_values=cache)
    # Equal tokens have equal values, so layer 0 sees nearly equal scores; what it keeps must be sorted and unique.
    kept = cache.kept_positions(0)[0, 0].tolist()
    assert kept == sorted(set(kept)) and kept[-1] == 29


@pytest.mark.parametrize("method", ["snapkv", "snapkv(window=8)+kvcrush"])
def test_nan_scores_name_the_layer(model_of, method):
    model = model_of("llama")
    cache = MethodCache(model, method, 0.4)
    layer = cache.layers[1]
    layer.lazy_initialization(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    q = torch.randn(1, 4, 30, 16)
    q[0, 0, -1] = float("nan")
    with pytest.raises(ValueError, match="layer 1: the importance scores contain NaN"):
        layer.feed(q, torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), 0.25)


def test_a_short_prompt_is_left_alone_to_the_pointer(model_of):
    model = model_of("llama")
    cache = MethodCache(model, "snapkv", "100t")
    with torch.no_grad():
        model(tiny.text_ids(30), past_key_values=cache)
    before = [layer.segments[0].k.data_ptr() for layer in cache.layers]
    cache.method.on_prefill_end(cache.layers[0], Evidence(torch.zeros(1, 4, 1, 16), 0.25, torch.tensor([30])))
    assert [layer.segments[0].k.data_ptr() for layer in cache.layers] == before
    assert cache.at_rest.tokens_stored == 30


def test_holes_never_win():
    from textkv.eviction import keep_best

    class Recorder:
        index = 0

        def lengths(self):
            return torch.tensor([[4], [2]])

        def resting(self, counts):
            return counts  # something came to every row

        def keep(self, index):
            self.index_kept = index

    layer = Recorder()
    scores = torch.tensor([[[3.0, 1.0, 2.0, 5.0]], [[NEVER, NEVER, 2.0, 1.0]]])
    keep_best(layer, scores, torch.tensor([[3], [3]]))
    assert layer.index_kept.tolist() == [[[0, 2, 3]], [[2, 3, -1]]]


@pytest.mark.parametrize("method", ["snapkv", "cake", "h2o"])
def test_rows_of_unequal_prompts_hold_what_they_would_alone(model_of, method):
    """A rectangle of the longest row's width would hold a third more."""
    model, lengths = model_of("llama"), (120, 60, 48)
    ids, mask = torch.ones(3, 120, dtype=torch.long), torch.ones(3, 120, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, :-n] = tiny.text_ids(n)[0], 0
    together, alone = MethodCache(model, method, 0.5), 0
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=together)
        for row, n in enumerate(lengths):
            cache = MethodCache(model, method, 0.5)
            model(ids[row : row + 1, -n:], past_key_values=cache)
            alone += cache.kv_bytes()
    assert together.kv_bytes() <= 1.05 * alone


def test_a_hidden_token_goes_before_one_that_was_guarded():
    kept = []
    layer = SimpleNamespace(
        index=0, resting=lambda counts: counts, lengths=lambda: torch.tensor([[5]]), keep=kept.append
    )
    scores = torch.tensor([[[HIDDEN, HIDDEN, PROTECTED, PROTECTED, PROTECTED]]])
    keep_best(layer, scores, torch.tensor([[2]]))
    assert kept[0].tolist() == [[[3, 4]]]
