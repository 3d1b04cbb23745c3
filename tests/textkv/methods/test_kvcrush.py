"""KVCrush: the small case, anchors and ranks by hand, what is kept under any scores, and compositions."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.textkv import tiny
from textkv import Budget, MethodCache, list_methods, resolve_method
from textkv.conformance import check_method
from textkv.eviction import NEVER, PROTECTED
from textkv.method import REGISTRY
from textkv.methods.knorm import Knorm
from textkv.methods.kvcrush import KVCrush, spaced
from textkv.segments.base import Stored

BASE = Knorm()


def choose(method, scores, count, positions=None):
    """Slots that each head keeps: scores [batch, heads, n] -> lists [batch][heads]."""
    batch, heads, n = scores.shape
    if positions is None:
        positions = torch.arange(n, dtype=torch.int32).expand(batch, heads, n)
    layer = SimpleNamespace(
        index=0, stored=lambda: Stored(None, None, positions), real_seen=positions.amax((1, 2)).long() + 1
    )
    refined, counts = method.refine(layer, scores, torch.full((batch, 1), count))
    counts = torch.minimum(counts, (positions >= 0).sum(-1))
    order = refined.sort(dim=-1, descending=True, stable=True).indices
    return [[sorted(order[b, h, : counts[b, h]].tolist()) for h in range(heads)] for b in range(batch)]


def crush(**options):
    return KVCrush(inner=BASE, **options)


def kept(model, method, budget, ids, **options):
    cache = MethodCache(model, method, budget)
    with torch.no_grad():
        model(ids, past_key_values=cache, **options)
    return [cache.kept_positions(i) for i in range(len(cache.layers))]


# ---- the algorithm by hand ----------------------------------------------------------------------------------------


def small_case():
    """Slots 0..4 are t0 = 0000, t1 = 0001, t2 = 0111, t3 = 1111, t4 = 0011 (heads left to right); slots 5..7 score best
    on average, in the first heads only, and give every head the four bits that half of eight tokens are."""
    bits = torch.tensor([
        [0, 0, 0, 1, 0, 1, 1, 1],
        [0, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
    ])  # fmt: skip
    scores = bits.float()
    scores[0, 5:] = 100.0
    return scores[None]


def test_the_small_case():
    assert choose(crush(anchor="zeros", ratio=0.5, heads="shared"), small_case(), 6) == [[[0, 3, 4, 5, 6, 7]] * 4]
    # From the far side the order is t3, t2, t4, t1, t0: the same three ranks.
    assert choose(crush(anchor="ones", ratio=0.5, heads="shared"), small_case(), 6) == [[[0, 3, 4, 5, 6, 7]] * 4]
    # From 0101: D = 2, 1, 1, 2, 2 -> t1, t2, t0, t3, t4 -> t1, t0, t4.
    assert choose(crush(anchor="alternate", ratio=0.5, heads="shared"), small_case(), 6) == [[[0, 1, 4, 5, 6, 7]] * 4]


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        ("zeros", [0, 1, 4]),
        ("ones", [4, 3, 0]),
        ("alternate", [2, 3, 2]),
        ("mean", [1, 0, 3]),
        ("inverse_mean", [3, 4, 1]),
    ],
)
def test_distances_to_each_anchor(anchor, expected):
    """Signatures 0000, 1000, 1111 over four heads: most have only the first bit, and 0101 is the alternating anchor."""
    bits = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]).bool()[None, :, :, None]
    method, full = crush(anchor=anchor), torch.ones(1, 4, 3, dtype=torch.bool)
    distance = (bits != method._anchor(bits, full, 0)[:, :, None]).sum((1, 3))
    assert distance[0].tolist() == expected


def test_exactly_half_is_not_a_majority():
    bits = torch.tensor([[1, 0], [1, 1]]).bool()[None, :, :, None]
    full = torch.ones(1, 2, 2, dtype=torch.bool)
    assert crush(anchor="mean")._anchor(bits, full, 0).flatten().tolist() == [False, True]
    assert crush(anchor="inverse_mean")._anchor(bits, full, 0).flatten().tolist() == [True, False]


def test_the_heads_of_one_token_stand_together_in_a_page():
    bits = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    anchor = crush(anchor="alternate", page=2)._anchor(bits, bits[..., 0], 0)
    assert anchor[0].T.flatten().tolist() == [False, True, False, True, False, True]


def test_a_random_anchor_is_the_seeds_and_the_layers():
    bits, full = torch.zeros(1, 64, 2, 1, dtype=torch.bool), torch.ones(1, 64, 2, dtype=torch.bool)
    of = {(seed, i): crush(anchor="random", seed=seed)._anchor(bits, full, i) for seed in (0, 9) for i in (0, 1)}
    assert torch.equal(of[0, 1], crush(anchor="random")._anchor(bits, full, 1))
    assert not torch.equal(of[0, 0], of[9, 0]) and not torch.equal(of[0, 0], of[0, 1])
    assert 10 < int(of[0, 0].sum()) < 54


def ranks_of(crowd, wanted, reaches_end=True):
    hit = spaced(torch.arange(crowd), torch.tensor(crowd), torch.tensor(wanted), reaches_end)
    return hit.nonzero()[:, 0].tolist()


def test_ranks_by_hand():
    assert ranks_of(5, 3) == [0, 2, 4]
    assert ranks_of(10, 4) == [0, 3, 6, 9]
    assert ranks_of(10, 4, reaches_end=False) == [0, 2, 4, 6]
    assert ranks_of(7, 1) == [0] and ranks_of(7, 0) == [] and ranks_of(3, 3) == [0, 1, 2] and ranks_of(1, 4) == [0]


@given(crowd=st.integers(1, 300), wanted=st.integers(0, 320), reaches_end=st.booleans())
@settings(deadline=None, max_examples=150)
def test_ranks_are_as_many_as_asked_for(crowd, wanted, reaches_end):
    found = ranks_of(crowd, wanted, reaches_end)
    assert len(found) == min(crowd, wanted)
    if reaches_end and 1 < wanted < crowd:
        assert found == [k * (crowd - 1) // (wanted - 1) for k in range(wanted)]


# ---- what is kept --------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6), n=st.integers(2, 40), count=st.integers(1, 40), ratio=st.sampled_from([0, 0.1, 0.5, 1]),
    anchor=st.sampled_from(["alternate", "mean", "inverse_mean", "zeros", "ones", "random"]), window=st.integers(0, 5),
    levels=st.sampled_from([2, 1000]),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_the_kept_set_is_complete_and_holds_the_important(seed, n, count, ratio, anchor, window, levels):
    g = torch.Generator().manual_seed(seed)
    count, window = min(count, n), min(window, n, count)
    scores = torch.randint(levels, (2, 3, n), generator=g).float()
    scores[..., n - window :] = PROTECTED
    found = choose(crush(ratio=ratio, anchor=anchor), scores, count)
    important = count - int(ratio * (count - window) + 1e-9)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :important]
    for row, lists in enumerate(found):
        for head, slots in enumerate(lists):
            assert len(slots) == len(set(slots)) == count
            assert set(best[row, head].tolist()) <= set(slots)


def test_without_representatives_it_is_the_scorer_and_without_important_ones_the_crowd_alone():
    scores = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(0))
    layer = SimpleNamespace(index=0)
    same, counts = torch.tensor([[7]]), torch.tensor([[7]])
    assert crush(ratio=0).refine(layer, scores, counts) == (scores, counts) and torch.equal(same, counts)
    alone = choose(crush(ratio=1, anchor="zeros"), scores, 3)[0]
    best = scores.topk(3, dim=-1).indices
    assert all(set(slots) != set(best[0, head].tolist()) for head, slots in enumerate(alone))


def test_equal_scores_go_by_the_index():
    """The first half has every bit and the first three are important: the crowd's order is 6 .. 11, 3, 4, 5."""
    assert choose(crush(ratio=0.5, anchor="zeros"), torch.zeros(1, 4, 12), 6) == [[[0, 1, 2, 5, 6, 10]] * 4]


def test_a_crowd_no_larger_than_its_share_stays():
    scores = torch.rand(1, 2, 8)
    assert choose(crush(ratio=0.5), scores, 8) == [[list(range(8))] * 2]
    scores[..., 4:] = PROTECTED
    assert choose(crush(ratio=0.9), scores, 4) == [[[4, 5, 6, 7]] * 2]
    assert choose(crush(ratio=0.9), scores, 3) == [[[4, 5, 6]] * 2]


def test_heads_choose_for_themselves_or_together():
    scores = torch.rand(1, 4, 60, generator=torch.Generator().manual_seed(3))
    own = choose(crush(ratio=0.5), scores, 20)[0]
    assert len({tuple(slots) for slots in own}) == 4
    for heads in ("shared", "summed"):
        together = choose(crush(ratio=0.5, heads=heads), scores, 20)[0]
        assert len({tuple(slots) for slots in together}) == 1
        best = scores.mean(1)[0].topk(10).indices.tolist()
        assert set(best) <= set(together[0])


def test_signatures_belong_to_tokens_and_not_to_slots():
    """Head 1 stores other tokens than head 0: a token that it dropped has no bit there."""
    positions = torch.tensor([[[0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 6, 7]]], dtype=torch.int32)
    scores = torch.tensor([[[1.0, 9, 8, 7, 2, 3], [1.0, 6, 5, 2, 3, 7]]])
    # Upper halves: tokens 1, 2, 3 in head 0 and 7, 3, 4 in head 1. D to 11 by token 0..7: 2 1 1 0 1 2 2 1.
    found = choose(crush(ratio=0.5, anchor="ones"), scores, 4, positions)[0]
    # Head 0 holds 1, 2 as important; of 0, 3, 4, 5 the nearest is 3 and the furthest 5. Head 1: 7, 3 and then 4 to 6.
    assert found == [[1, 2, 3, 5], [1, 2, 4, 5]]


def test_rows_do_not_depend_on_each_other_nor_on_padding():
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 2, 30, generator=g)
    scores[1, :, :9] = NEVER
    positions = torch.arange(30, dtype=torch.int32).expand(2, 2, 30).clone()
    positions[1] -= 9
    positions[1, :, :9] = -1
    for anchor in ("mean", "random"):
        method = crush(ratio=0.5, anchor=anchor, start=2)
        both = choose(method, scores, 12, positions)
        assert both[0] == choose(method, scores[:1], 12)[0]
        assert both[1] == [[slot + 9 for slot in slots] for slots in choose(method, scores[1:, :, 9:], 12)[0]]


def test_first_and_last_tokens_are_protected():
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(2))
    for slots in choose(crush(ratio=0.5, start=3, recent=4), scores, 12)[0]:
        assert len(slots) == 12 and set(slots) >= {0, 1, 2, 36, 37, 38, 39}
    # No room beside them: the scorer's choice stands.
    for keep in (6, 7):
        base = scores.topk(keep, dim=-1).indices.sort().values[0].tolist()
        assert choose(crush(ratio=0.5, start=3, recent=4), scores, keep)[0] == base


def test_representatives_reach_more_kinds_of_tokens():
    """Eight kinds of unimportant tokens, one head each fond of one kind: the scorer alone keeps the fondest head's."""
    g, kinds = torch.Generator().manual_seed(0), 8
    kind = torch.arange(96) % kinds
    fondness = torch.arange(kinds).flip(0)[:, None] * 0.1
    heads = torch.arange(kinds)[:, None] >= kind
    scores = (heads + fondness + 0.01 * torch.rand(kinds, 96, generator=g))[None]
    scores[..., :4] = 100.0

    def reached(ratio):
        slots = choose(crush(ratio=ratio, anchor="zeros", bit_quantile=0.5), scores, 14)[0]
        return sum(len(set(kind[[s for s in one if s >= 4]].tolist())) for one in slots)

    assert reached(0.9) > reached(0)


# ---- on models -----------------------------------------------------------------------------------------------------


def test_it_changes_what_its_scorer_keeps_and_only_the_asked_for_share(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    base = kept(model, "snapkv(window=8)", 0.4, ids)
    same = kept(model, "snapkv(window=8)+kvcrush(ratio=0)", 0.4, ids)
    ours = kept(model, "snapkv(window=8)+kvcrush(ratio=0.5)", 0.4, ids)
    assert all(torch.equal(a, b) for a, b in zip(base, same, strict=True))
    for a, b in zip(base, ours, strict=True):
        assert a.shape == b.shape and bool((b.diff(dim=-1) > 0).all()) and bool((b[..., -8:] == a[..., -8:]).all())
        for head in range(2):
            common = set(a[0, head].tolist()) & set(b[0, head].tolist())
            assert 8 + 12 <= len(common) < 32


def test_layer_and_head_budgets_of_the_scorer_hold(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    for base in ("pyramidkv(window=8)", "snapkv(window=8)+adakv(floor=0.1)"):
        caches = [MethodCache(model, base + more, 0.4) for more in ("", "+kvcrush(ratio=0.5)")]
        for cache in caches:
            with torch.no_grad():
                model(ids, past_key_values=cache)
        lengths = [[layer.lengths().tolist() for layer in cache.layers] for cache in caches]
        # A layer's evidence depends on what earlier layers computed, and prompts are attended to in full: equal counts.
        assert lengths[0] == lengths[1]


def test_a_second_turn_keeps_whole_pages_and_the_budget(model_of):
    model, ids = model_of("llama"), tiny.text_ids(112)
    cache = MethodCache(model, "knorm+kvcrush(ratio=0.5,page=4,recent=8)", 0.5)
    with torch.no_grad():
        model(ids[:, :64], past_key_values=cache)
        model(ids[:, 64:], past_key_values=cache)
    for layer in range(3):
        for head in cache.kept_positions(layer)[0].tolist():
            whole = {p for p in head if p >= 0}
            assert len(whole) == 56 and whole >= set(range(104, 112))
            assert all({p // 4 * 4 + i for i in range(4)} <= whole for p in whole)


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("kvcrush", 0.4),
        ("kvcrush-official", 0.4),
        ("kvcrush-official(page=4,start=4,recent=8,ratio=0.5)", 0.5),
        ("snapkv(window=6)+kvcrush(ratio=0.5,anchor='mean')", 0.4),
        ("knorm(recent=2)+kvcrush(ratio=0.5,anchor='random',heads='shared')", "20t"),
        ("h2o(recent=0.2)+kvcrush(ratio=0.5)", 0.4),
        ("cake(window=6)+kvcrush(ratio=0.5)", 0.4),
        ("snapkv(window=6)+adakv(floor=0.2)+kvcrush(ratio=0.5,page=3)", 0.4),
    ],
)
def test_it_conforms(method, budget):
    assert {r.outcome for r in check_method(method, budget)} == {"passed"}


def test_every_scorer_can_be_wrapped_and_nothing_wraps_it():
    for base in [name for name in list_methods() if REGISTRY[name].capabilities.scores]:
        method = resolve_method(f"{base}+kvcrush(0.1)", 0.4)
        assert method.expression.endswith(f"{base}+kvcrush(ratio=0.1)") and method.needs() == method.inner.needs()
    assert resolve_method("kvcrush").expression == "snapkv+kvcrush"
    assert resolve_method("kvcrush-official").inner.expression == "snapkv(window=8,pooling='max')"
    with pytest.raises(ValueError, match="adakv needs importance scores and kvcrush gives none"):
        resolve_method("snapkv+kvcrush+adakv")
    with pytest.raises(ValueError, match="kvcrush needs importance scores and window gives none"):
        resolve_method("window+kvcrush")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -0.1}, r"ratio=-0.1: a share of the budget lies in \[0, 1\]; use 0.25"),
        ({"ratio": 1.5}, r"ratio=1.5: a share of the budget"),
        ({"bit_quantile": 0.0}, "bit_quantile=0.0: must lie between 0 and 1; 0.5 is the median"),
        ({"bit_quantile": 1.0}, "bit_quantile=1.0: must lie between"),
        ({"anchor": "middle"}, "anchor='middle': use one of alternate, mean, inverse_mean, zeros, ones, random"),
        ({"heads": "all"}, "heads='all': use one of own, shared, summed"),
        ({"page": 0}, "page=0, start=0, recent=0, seed=0: a page has at least 1 token"),
        ({"recent": -1}, "none of the others may be negative"),
        ({"page": 16, "start": 20}, "start=20 tokens are not whole pages of 16; use 32"),
        ({"page": 16, "recent": 8}, "recent=8 tokens are not whole pages of 16; use 16"),
        ({"page": 16, "budget": Budget(tokens=100)}, "budget=100 tokens are not whole pages of 16; use 112"),
        ({"start": 8, "recent": 8, "budget": Budget(tokens=16)}, "budget=16t: .* leave no token to choose; use 17t"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        crush(**options)


def test_a_shared_choice_needs_heads_that_store_the_same():
    with pytest.raises(ValueError, match="heads='shared': adakv gives every head its own number of tokens; use heads="):
        resolve_method("snapkv+adakv+kvcrush(heads='shared')", 0.4)
    positions = torch.tensor([[[0, 1, 3], [0, 2, 3]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="layer 0: its heads store different tokens and can share none"):
        choose(crush(heads="shared"), torch.rand(1, 2, 3), 2, positions)
