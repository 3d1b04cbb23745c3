"""D2O against a token-by-token simulation in fp64, its layer shares, its merging, and what it shares with H2O."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.methods.test_h2o import attention, blocks_of, feed, sizes_of, tokens
from textkv import Budget, MethodCache
from textkv.conformance import CHECKS, check_method
from textkv.kernels import rotate
from textkv.methods import d2o
from textkv.methods.d2o import D2O, THRESHOLD, D2OOfficial, absorb, nearest, spread
from textkv.positions import RotarySpec


def simulate(q, k, v, blocks, keeps, method):
    """One KV head, q [group, n, DIM], k, v [n, DIM]: yields {position: (key, value)} and the bar after each block."""
    held, mass, bar = {}, {}, None
    for (start, stop), keep in zip(blocks, keeps, strict=True):
        held |= {p: (k[p].double(), v[p].double()) for p in range(start, stop)}
        seen = attention(q[:, start:stop], {p: key for p, (key, _) in held.items()}, start).sum(0)
        for p, got in zip(sorted(held), seen.tolist(), strict=True):
            mass[p] = mass.get(p, 0.0) + got
        if len(held) > keep:
            kept = choose(sorted(held), mass, keep, method)
            bar = merge_into(held, kept, bar, method)
            held = {p: held[p] for p in kept}
        yield dict(held), bar


def choose(held, mass, keep, method):
    last = max(1, int(method.recent * keep + 1e-9))
    first = held[: min(method.sinks, keep - last)]
    rest = [p for p in held[: len(held) - last] if p not in first]
    heavy = sorted(rest, key=lambda p: -mass[p])[: keep - last - len(first)]
    return sorted([*first, *heavy, *held[len(held) - last :]])


def merge_into(held, kept, bar, method):
    official = isinstance(method, D2OOfficial)
    gone = [p for p in held if p not in kept]
    cosine = {p: [float(F.cosine_similarity(held[p][0], held[c][0], dim=0)) for c in kept] for p in gone}
    best = {p: max(c) for p, c in cosine.items()}
    mean = sum(best.values()) / len(best)
    late = mean if official else max(best.values())
    bar = mean if bar is None else method.beta * late + (1 - method.beta) * bar
    joins = {c: [p for p in gone if best[p] >= bar - 1e-9 and kept[cosine[p].index(best[p])] == c] for c in kept}
    for c, victims in joins.items():
        own = 1.0 if official else method.self_weight
        weights = [best[p] if official else math.exp(best[p]) for p in victims]
        total = own + (len(victims) if official else sum(weights))
        if victims:
            held[c] = tuple(
                (own * held[c][i] + sum(w * held[p][i] for w, p in zip(weights, victims, strict=True))) / total
                for i in range(2)
            )
    return bar


@pytest.mark.parametrize(
    ("method", "heads"),
    [(D2O(sinks=2), 2), (D2O(sinks=0, recent=0.5, beta=0.2, self_weight=0.1), 2), (D2OOfficial(sinks=2), 1)],
    ids=["paper", "other settings", "official"],
)
def test_it_does_what_a_plain_simulation_does(method, heads):
    """Two turns and decoding: kept sets, merged keys and values, and the bar, at every step."""
    blocks, keeps = blocks_of(20, 1, 1, 1, 9, 1, 1, 1, 1), [8, 8, 8, 8, 12, 12, 12, 12, 12]
    q, k, v = tokens(36, heads=heads, batch=2)
    expected = {
        (b, h): list(simulate(q[b, 2 * h : 2 * h + 2], k[b, h], v[b, h], blocks, keeps, method))
        for b in range(2)
        for h in range(heads)
    }
    for step, layer in enumerate(feed(method.expression, 0.4, q, k, v, blocks)):
        held = layer.stored()
        for (b, h), states in expected.items():
            tokens_kept, bar = states[step]
            assert held.positions[b, h].tolist() == sorted(tokens_kept), f"step {step}, row {b}, head {h}"
            keys, values = (torch.stack([tokens_kept[p][i] for p in sorted(tokens_kept)]) for i in range(2))
            assert not mismatch(held.keys[b, h].double(), keys, atol=1e-4, rtol=0)
            assert not mismatch(held.values[b, h].double(), values, atol=1e-4, rtol=0)
            assert layer.statistics[THRESHOLD][b, h].item() == pytest.approx(bar, abs=1e-4)


def test_without_merging_and_sinks_it_is_h2o():
    q, k, v = tokens(30)
    blocks = blocks_of(20, *[1] * 10)
    pairs = zip(
        feed("d2o(sinks=0,recent=0.5,threshold=2.0)", 0.4, q, k, v, blocks), feed("h2o", 0.4, q, k, v, blocks),
        strict=True,
    )  # fmt: skip
    for ours, plain in pairs:
        assert torch.equal(ours.stored().positions, plain.stored().positions)
        assert torch.equal(ours.stored().keys, plain.stored().keys)
        assert torch.equal(ours.stored().values, plain.stored().values)


def test_sinks_stay_whatever_they_get():
    q, k, v = tokens(30, heads=1, group=1)
    q, k = torch.ones_like(q), k.abs()
    k[:, :, :4] = -5.0
    for layer in feed("d2o", 0.4, q, k, v, blocks_of(20, *[1] * 10)):
        assert layer.stored().positions[0, 0, :4].tolist() == [0, 1, 2, 3]
        assert layer.stored().positions[0, 0, -2:].diff().tolist() == [1]


def test_a_prompt_shorter_than_its_sinks_still_decodes():
    q, k, v = tokens(9)
    kept = [x.stored().positions[0, 0].tolist() for x in feed("d2o", 0.5, q, k, v, blocks_of(5, 1, 1))]
    assert kept == [[0, 4], [0, 5], [0, 6]]


def test_the_bar_lets_through_what_is_alike():
    """Kept (1, 0); victims (1, 0) and (0, 1): similarities 1 and 0, bar 0.5, only the first is merged."""
    kept, victims = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    closeness, target = nearest(victims, kept, torch.ones(1, 1, 1, dtype=torch.bool))
    assert closeness.tolist() == [[[1.0, 0.0]]] and target.tolist() == [[[0, 0]]]
    bar = D2O()._moved(None, closeness, torch.ones(1, 1, 2, dtype=torch.bool))
    assert bar.tolist() == [[[0.5]]]
    joins = (closeness >= bar).float()
    merged = absorb(kept, victims, target, closeness.exp() * joins, closeness.exp() * joins, math.e)
    assert not mismatch(merged, kept)


def test_the_bar_moves_per_row_and_head():
    before = torch.tensor([[[0.5], [torch.nan]], [[0.5], [0.5]]])
    closeness = torch.tensor([[[0.9, 0.1], [0.4, 0.2]], [[0.3, 0.9], [0.0, 0.0]]])
    gone = torch.tensor([[[True, True], [True, True]], [[True, False], [False, False]]])
    moved = D2O(beta=0.7)._moved(before, closeness, gone)
    assert not mismatch(moved[..., 0], torch.tensor([[0.78, 0.3], [0.36, 0.5]]))
    mean = D2OOfficial(beta=0.5)._moved(before, closeness, gone)[..., 0]
    assert not mismatch(mean, torch.tensor([[0.45, 0.4], [0.4, 0.5]]))
    assert D2O(threshold=0.6)._moved(before, closeness, gone)[..., 0].tolist()[0] == pytest.approx([0.6, 0.6])


def test_duplicates_change_nothing_and_the_official_mean_shrinks():
    token, first = torch.tensor([[[[3.0, -4.0]]]]), torch.zeros(1, 1, 2, dtype=torch.long)
    for method in (D2O(), D2O(self_weight=0.1)):
        same = absorb(token, token.expand(1, 1, 2, 2), first, *method._weights(torch.ones(1, 1, 2)))
        assert not mismatch(same, token)
    other = torch.tensor([[[[1.0, 1.0]]]])
    merged = absorb(token, other, first[..., :1], *D2OOfficial()._weights(torch.full((1, 1, 1), 0.8)))
    assert not mismatch(merged, 0.5 * token + 0.4 * other)


def test_a_small_self_weight_leaves_a_small_share():
    one, first = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    merged = absorb(one, 0 * one, first, *D2O(self_weight=0.1)._weights(torch.full((1, 1, 1), 0.9)))
    assert merged.item() == pytest.approx(0.1 / (0.1 + math.exp(0.9)))


def test_similarities_are_the_same_in_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    kept, victims = torch.randn(2, 3, 7, 8, generator=g), torch.randn(2, 3, 11, 8, generator=g)
    real = torch.rand(2, 3, 7, generator=g) > 0.3
    whole = nearest(victims, kept, real)
    monkeypatch.setattr(d2o, "_BLOCK_ELEMENTS", 2 * 3 * 7 * 4)
    for a, b in zip(nearest(victims, kept, real), whole, strict=True):
        assert not mismatch(a, b)
    every = F.cosine_similarity(victims[:, :, :, None], kept[:, :, None], dim=-1).masked_fill(~real[:, :, None], -2)
    assert not mismatch(whole[0], every.amax(-1))
    assert nearest(victims * 0, kept, real)[0].abs().max() == 0


def test_merging_helps_where_tokens_repeat_and_a_fixed_bar_blocks_strangers():
    """Eight clusters of near-equal keys with noisy values; then one-hot keys, which no bar of 0.5 lets through."""
    g = torch.Generator().manual_seed(0)
    cluster = torch.arange(64) % 8
    k = (3 * torch.eye(8)[cluster] + 0.05 * torch.randn(64, 8, generator=g))[None, None]
    v = torch.randn(8, 8, generator=g)[cluster][None, None] + torch.randn(1, 1, 64, 8, generator=g)
    q = torch.randn(1, 1, 64, 8, generator=g)
    asked = torch.randn(40, 8, generator=g)
    exact = (asked @ k[0, 0].T).softmax(-1) @ v[0, 0]
    errors = {}
    for bar in (None, 2.0):
        (layer,) = feed(f"d2o(threshold={bar})", 0.4, q, k, v, [(0, 64)])
        held = layer.stored()
        errors[bar] = ((asked @ held.keys[0, 0].T).softmax(-1) @ held.values[0, 0] - exact).square().mean()
    assert errors[None] < 0.8 * errors[2.0]
    one_hot = torch.eye(8)[None, None]
    (blocked,) = feed("d2o(threshold=0.5,sinks=1)", 0.5, q[:, :, :8], one_hot, v[:, :, :8], [(0, 8)])
    (plain,) = feed("d2o(threshold=2.0,sinks=1)", 0.5, q[:, :, :8], one_hot, v[:, :, :8], [(0, 8)])
    assert torch.equal(blocked.stored().values, plain.stored().values)


def test_heads_are_cut_and_merged_for_themselves():
    q, k, v = tokens(24, heads=3, group=2)
    order, blocks = [2, 0, 1], blocks_of(20, 1, 1, 1, 1)
    swapped = q.unflatten(1, (3, 2))[:, order].flatten(1, 2), k[:, order], v[:, order]
    both = zip(feed("d2o", 0.4, q, k, v, blocks), feed("d2o", 0.4, *swapped, blocks), strict=True)
    for plain, moved in both:
        assert torch.equal(plain.stored().positions[:, order], moved.stored().positions)
        assert not mismatch(plain.stored().keys[:, order], moved.stored().keys)


def test_a_kv_head_is_stored_once_and_equals_its_repeated_copies():
    q, k, v = tokens(24, heads=2, group=2)
    q = q[:, ::2].repeat_interleave(2, 1)
    blocks = blocks_of(20, 1, 1, 1, 1)
    repeated = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for once, twice in zip(feed("d2o", 0.4, q, k, v, blocks), feed("d2o", 0.4, *repeated, blocks), strict=True):
        assert torch.equal(once.stored().positions.repeat_interleave(2, 1), twice.stored().positions)
        assert not mismatch(once.stored().values.repeat_interleave(2, 1), twice.stored().values)


def test_the_spread_is_the_variance_of_the_tokens_that_are_there():
    mass, real = torch.rand(2, 3, 9), torch.ones(2, 3, 9, dtype=torch.bool)
    real[1, :, :4], mass[1, :, :4] = False, 0
    assert not mismatch(spread(mass, real)[0], mass[0].var(-1))
    assert not mismatch(spread(mass, real)[1], mass[1, :, 4:].var(-1))
    assert spread(torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("density", ["layers", "heads", "variance"])
def test_equal_layers_keep_the_budget_each(density):
    method = D2O(density=density, budget=Budget(0.2))
    assert method.layer_counts(torch.full((5, 2), 3.0), 100) == [20] * 5
    official = D2OOfficial(density=density, budget=Budget(0.2))
    assert official.layer_counts(torch.full((5, 2), 3.0), 100) == [20] * 5


def test_uneven_layers_keep_less():
    spreads = torch.tensor([[1.0, 1.0], [4.0, 2.0], [30.0, 20.0]])
    counts = D2O(budget=Budget(0.2)).layer_counts(spreads, 500)
    assert counts[0] > counts[1] > counts[2] and sum(counts) == 300
    assert counts[0] / counts[2] == pytest.approx(math.e, rel=0.02)
    raw = D2O(budget=Budget(0.2), density="variance").layer_counts(spreads, 500)
    assert raw[0] > raw[1] > raw[2] == 5 and sum(raw) == 300


def test_the_official_shares_are_clamped_and_not_scaled_up():
    """Unscaled variances give one layer everything: it is capped at the prompt, the others get one per cent."""
    wide = D2OOfficial(budget=Budget(0.5), density="variance")
    assert wide.layer_counts(torch.tensor([[0.0], [50.0], [90.0]]), 1000) == [1000, 10, 10]
    mild = D2OOfficial(budget=Budget(0.2)).layer_counts(torch.tensor([[1.0, 9.0], [5.0, 5.0]]), 1000)
    weight = (-torch.tensor([0.5, 0.0])).softmax(0)
    assert mild == pytest.approx((400 * weight).tolist(), abs=2)


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=9), st.integers(1, 400), st.integers(1, 99),
    st.sampled_from(["layers", "heads", "variance"]),
)  # fmt: skip
def test_layers_together_spend_the_budget(spreads, seen, percent, density):
    method = D2O(budget=Budget(percent / 100), density=density)
    counts = method.layer_counts(torch.tensor(spreads)[:, None].expand(-1, 2), seen)
    assert sum(counts) == len(spreads) * method.budget.count(seen)
    assert all(1 <= count <= seen for count in counts)
    if density != "heads":
        order = sorted(range(len(spreads)), key=lambda i: spreads[i])
        assert all(counts[a] >= counts[b] - 1 for a, b in zip(order, order[1:], strict=False))


def lengths(cache):
    return [int(layer.lengths().max()) for layer in cache.layers]


def run(model, method, budget, ids, prompt):
    """The cache after the prompt, and the lengths of its layers then and after each decoded token."""
    cache = MethodCache(model, method, budget)
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        seen = [lengths(cache)]
        for token in range(prompt, ids.shape[1]):
            model(ids[:, token : token + 1], past_key_values=cache)
            seen.append(lengths(cache))
    return cache, seen


def test_each_layer_keeps_its_share_while_decoding(model_of):
    cache, seen = run(model_of("llama"), "d2o", 0.4, tiny.text_ids(54), 50)
    assert sum(seen[0]) == 3 * 20 and len(set(seen[0])) > 1 and seen == [seen[0]] * 5
    assert all(not layer.notes for layer in cache.layers) and not cache.is_croppable
    cache, seen = run(model_of("llama"), "d2o", "20t", tiny.text_ids(54), 50)
    assert sum(seen[0]) == 3 * 20 and seen == [seen[0]] * 5


def test_a_short_prompt_grows_up_to_the_ceiling(model_of):
    _, seen = run(model_of("llama"), "d2o", "20t", tiny.text_ids(24), 18)
    assert [x[0] for x in seen] == [18, 19, 20, 20, 20, 20, 20] and all(len(set(x)) == 1 for x in seen)


def test_protected_layers_keep_all_and_the_others_pay(model_of):
    _, seen = run(model_of("llama"), "d2o(protected_layers=(-1,))", 0.6, tiny.text_ids(43), 40)
    assert seen[0][2] == 40 and sum(seen[0]) == 3 * 24
    assert seen[3] == [*seen[0][:2], 43]
    _, seen = run(model_of("llama"), "d2o-official(protected_layers=(0,1))", 0.4, tiny.text_ids(41), 40)
    assert seen[0][:2] == [40, 40] and seen[0][2] < 40 and seen[1] == [41, 41, seen[0][2]]


@pytest.mark.parametrize("method", ["d2o", "d2o-official"])
def test_all_layers_protected_is_the_full_cache(model_of, method):
    model, ids = model_of("llama"), tiny.text_ids(34)
    cache, plain = MethodCache(model, f"{method}(protected_layers=(0,1,-1))", 0.2), DynamicCache()
    with torch.no_grad():
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:32], ids[:, 32:]):
            ours, full = (model(part, past_key_values=c).logits for c in (cache, plain))
            assert not mismatch(ours, full, atol=1e-4, rtol=0)


def test_a_new_conversation_starts_a_new_bar(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    used, _ = run(model, "d2o", 0.4, ids[:, :44], 40)
    used.reset()
    with torch.no_grad():
        model(ids[:, 40:], past_key_values=used)
    fresh, _ = run(model, "d2o", 0.4, ids[:, 40:], 40)
    for a, b in zip(used.layers, fresh.layers, strict=True):
        assert torch.equal(a.statistics[THRESHOLD], b.statistics[THRESHOLD])


def test_which_of_keys_and_values_are_merged(model_of):
    """The prompt is read before anything is cut: the three modes keep the same tokens and the same values."""
    model, ids = model_of("llama"), tiny.text_ids(40)
    post, pre, none, plain = (
        run(model, f"d2o({how})", 0.4, ids, 40)[0].layers[1].stored()
        for how in ("merge_keys='post'", "merge_keys='pre'", "merge_keys='none'", "threshold=2.0")
    )
    assert all(torch.equal(post.positions, x.positions) for x in (pre, none, plain))
    assert torch.equal(post.values, pre.values) and torch.equal(post.values, none.values)
    assert torch.equal(none.keys, plain.keys) and not torch.equal(none.values, plain.values)
    assert not torch.allclose(pre.keys, post.keys) and not torch.allclose(post.keys, none.keys)


def test_keys_are_turned_to_where_they_are_merged():
    g = torch.Generator().manual_seed(0)
    base, inv_freq = torch.randn(2, 3, 5, 8, generator=g), 1 / 10 ** torch.arange(4).float()
    at, to = (torch.randint(0, 50, (2, 3, 5), generator=g) for _ in range(2))

    def placed(where):
        return rotate(base.flatten(0, 1)[:, None], where.flatten(0, 1), inv_freq)[:, 0].view_as(base)

    assert not mismatch(d2o._rotated(placed(at), to - at, RotarySpec.halves(inv_freq)), placed(to))


def test_half_precision_is_merged_in_fp32():
    q, k, v = (x.bfloat16() for x in tokens(24))
    exact = [x.float() for x in (q, k, v)]
    blocks = blocks_of(20, 1, 1)
    for half, full in zip(feed("d2o", 0.4, q, k, v, blocks), feed("d2o", 0.4, *exact, blocks), strict=True):
        assert half.stored().keys.dtype == torch.bfloat16 and half.statistics[THRESHOLD].dtype == torch.float32
        assert not mismatch(half.statistics[THRESHOLD], full.statistics[THRESHOLD], atol=1e-2, rtol=0)
        assert sizes_of(half) == sizes_of(full)


def test_settings_are_checked():
    for arguments, message in (
        ({"recent": 0.0}, r"recent=0.0: give a share of the budget in \(0, 1\]"),
        ({"sinks": -1}, "sinks=-1: cannot be negative"),
        ({"beta": 1.5}, r"beta=1.5: the weight of the newest similarity lies in \[0, 1\]"),
        ({"self_weight": 0.0}, "self_weight=0.0: must be positive"),
        ({"merge_keys": "both"}, "merge_keys='both': use 'post', 'pre' or 'none'"),
        ({"density": "flat"}, "density='flat': use 'layers', 'heads' or 'variance'"),
        ({"budget": Budget(tokens=4)}, "budget=4t: 4 sinks leave no other token; use 5t or more"),
    ):
        with pytest.raises(ValueError, match=message):
            D2O(**arguments)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("llama", "d2o(protected_layers=(3,))", r"protected_layers=\(3,\): the model has layers 0 to 2"),
        (
            "qwen2_5_vl",
            "d2o(merge_keys='pre')",
            "merge_keys='pre' knows one position per token and the model has three",
        ),
    ],
)
def test_settings_that_only_the_model_can_refuse(model_of, family, method, message):
    with pytest.raises(ValueError, match=message):
        MethodCache(model_of(family), method, 0.4)


def test_nan_sums_name_the_layer():
    q, k, v = tokens(12)
    q[0, 0, -1] = torch.nan
    with pytest.raises(ValueError, match="layer 0: the attention sums contain NaN"):
        list(feed("d2o", 0.5, q, k, v, [(0, 12)]))


@pytest.mark.parametrize("method", ["d2o", "d2o-official"])
def test_it_conforms(method):
    assert len(check_method(method)) == len(CHECKS)
