"""TriAttention: the specification's worked case, both forms of the score, centres, and whole models."""

from types import SimpleNamespace

import pytest
import torch

from agentkv.eval import tiny as families
from tests.textkv import kinds, tiny
from tests.textkv.methods.test_expected import plain_queries
from tests.textkv.methods.test_tri_attention_rounds import kept_of
from textkv import Budget, MethodCache, Needs, resolve_method, use
from textkv.attention import CAPTURE
from textkv.conformance import check_method
from textkv.eviction import PROTECTED
from textkv.evidence import Evidence, QueryCentres
from textkv.kernels import rotate
from textkv.methods.snapkv import SnapKV
from textkv.methods.tri_attention import QUERIES, TriAttention, standardised, turned_ahead
from textkv.mini import load_mini
from textkv.positions import RotarySpec
from textkv.rotary import proven
from textkv.segments.base import Stored
from textkv.tri_attention.calibrate import read_text

FREQ = torch.tensor([1.0, 0.1])
CENTRES = QueryCentres(torch.ones(1), torch.tensor([[[1, 0.5, 0, 1]]]), torch.tensor([[[1.25, 1.5]]]))
KEYS = torch.tensor(
    [[-0.416147, -0.198669, 0.909297, 0.980067], [0.958924, 1.755165, 0.283662, 0.958851],
     [0.705071, 0.621610, -0.867684, 0.783327]]
)[None, None]  # fmt: skip
AT = torch.tensor([10])


def method(**settings):
    return TriAttention(**settings)


def rating(keys, centres=CENTRES, at=AT, rotary=None, **settings):
    return method(offsets=3, **settings)._rate(keys, centres, at, rotary or RotarySpec.halves(FREQ, keys.shape[-1]))


# ---- the score -----------------------------------------------------------------------------------------------------


def test_the_worked_case():
    ahead = turned_ahead(CENTRES.mean, AT, 3, RotarySpec.halves(FREQ)).mean(2)
    norm = rating(KEYS, trig=False)
    close = dict(atol=2e-6, rtol=0)
    torch.testing.assert_close(ahead[0, 0], torch.tensor([0.328339, -0.771912, -0.181985, 0.796756]), **close)
    torch.testing.assert_close(norm[0, 0], torch.tensor([0.631966, 1.013932, 0.661475]), **close)
    torch.testing.assert_close((rating(KEYS) - norm)[0, 0], torch.tensor([0.632114, -0.327632, 0.533700]), **close)
    torch.testing.assert_close(rating(KEYS)[0, 0], torch.tensor([1.264080, 0.686300, 1.195175]), **close)
    torch.testing.assert_close(rating(KEYS, over="max")[0, 0], torch.tensor([2.304197, 1.147325, 1.904175]), **close)
    whole = torch.tensor([1.25 + 1.5, 1.25 + 1.5 * 2, 1.25 * 1.25**0.5 + 1.5])
    torch.testing.assert_close(rating(KEYS, trig=False, mlr=False)[0, 0], whole, **close)


def layout(name):
    """A spec of 6 turning channels of 8: halves, neighbours, or the last ones."""
    freq, f = torch.tensor([1.0, 0.3, 0.02]), torch.arange(3)
    first, second = {"halves": (f, f + 3), "neighbours": (2 * f, 2 * f + 1), "end": (f + 2, f + 5)}[name]
    return RotarySpec(freq, first, second, 8)


@pytest.mark.parametrize("name", ["halves", "neighbours", "end"])
def test_it_is_the_paper_s_formula_and_the_mean_over_sampled_queries(name):
    """In doubles and complex numbers, from keys before their rotation; channels that stand still add their product."""
    spec, g = layout(name), torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 40, 8, generator=g) + torch.randn(1, 2, 1, 8, generator=g)
    plain, places = torch.randn(1, 1, 12, 8, generator=g), torch.arange(3, 27, 2)
    keys = spec.turn(plain, places[None])
    ours = rating(keys, QueryCentres.of(q, torch.ones(1, 40, dtype=torch.bool), spec), torch.tensor([30]), spec)
    still = [d for d in range(8) if d not in spec.first.tolist() + spec.second.tolist()]
    delta, omega = torch.tensor([1.0, 2.0, 4.0]).double(), spec.inv_freq.double()
    pairs = lambda x: torch.complex(x[..., spec.first].double(), x[..., spec.second].double())  # noqa: E731
    for head in range(2):
        centre, reach = pairs(q[0, head]).mean(0), pairs(q[0, head]).abs().mean(0)
        for slot, p in enumerate(places.tolist()):
            k = pairs(plain[0, 0, slot])
            angle = omega * (30 + delta[:, None] - p) + (centre * k.conj()).angle()
            trig = (centre.abs() * k.abs() * angle.cos()).sum(-1).mean()
            trig = trig + (q[0, head].double().mean(0)[still] * plain[0, 0, slot].double()[still]).sum()
            norm = ((reach - centre.abs()) * k.abs()).sum()
            assert abs(float(ours[0, head, slot]) - float(trig + norm)) < 2e-5
    sampled = [spec.turn(q, torch.full((1, 40), 30 + d)).double() @ keys.double().mT for d in (1, 2, 4)]
    trig = ours - rating(
        keys, QueryCentres.of(q, torch.ones(1, 40, dtype=torch.bool), spec), torch.tensor([30]), spec, trig=False
    )
    torch.testing.assert_close(trig.double(), torch.stack(sampled).mean((0, 3)), atol=2e-5, rtol=0)


def test_all_positions_moved_alike_change_nothing():
    moved = rotate(KEYS, torch.full((1, 3), 57), FREQ)
    torch.testing.assert_close(rating(moved, at=AT + 57), rating(KEYS), atol=1e-5, rtol=0)


def test_longer_keys_score_as_much_higher_and_a_scaled_rotation_changes_no_rank():
    torch.testing.assert_close(rating(3 * KEYS), 3 * rating(KEYS))
    factor = 1.3  # YaRN multiplies it into keys and queries alike
    scaled = QueryCentres(CENTRES.count, factor * CENTRES.mean, factor * CENTRES.lengths)
    torch.testing.assert_close(rating(factor * KEYS, scaled), factor**2 * rating(KEYS))


def test_layers_that_do_not_turn_score_by_the_mean_query():
    none = torch.zeros(0, dtype=torch.int64)
    spec = RotarySpec(torch.zeros(0), none, none, 4)
    centres = QueryCentres(CENTRES.count, CENTRES.mean, torch.zeros(1, 1, 0))
    torch.testing.assert_close(rating(KEYS, centres, rotary=spec), CENTRES.mean @ KEYS[:, 0].mT)


def test_blocks_of_keys_change_nothing(monkeypatch):
    whole = rating(KEYS)
    monkeypatch.setattr("textkv.methods.tri_attention._BLOCK", 2)
    torch.testing.assert_close(rating(KEYS), whole)


def test_scores_are_standardised_over_what_may_go():
    x = torch.tensor([[1.0, 100.0, 3.0, 5.0], [7.0, -9.0, 7.0, 7.0]])
    among = torch.tensor([True, False, True, True])
    out = standardised(x, among)
    assert out[0, [0, 2, 3]].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    assert out[1, [0, 2, 3]].tolist() == [0.0] * 3  # equal scores: no division by their spread of 0
    torch.testing.assert_close(standardised(x * 10 + 4, among)[0], out[0])


def case(keys, centres, tokens):
    """What `score` gets for one row without padding."""
    positions = torch.arange(keys.shape[2], dtype=torch.int32).expand(keys.shape[:3])
    newest = torch.tensor([[tokens - 1]])
    evidence = Evidence(
        torch.zeros(1, centres.mean.shape[1], 0, keys.shape[3]), 1.0, torch.tensor([tokens]), norm_positions=newest,
        rope_positions=newest, centres=centres,
    )  # fmt: skip
    return Stored(keys, keys, positions), evidence


def test_heads_of_a_group_are_joined_on_one_scale():
    g = torch.Generator().manual_seed(0)
    centres = QueryCentres(torch.ones(1), torch.randn(1, 4, 4, generator=g), torch.rand(1, 4, 2, generator=g) + 2)
    keys, layer = torch.randn(1, 2, 9, 4, generator=g), SimpleNamespace(rotary=RotarySpec.halves(FREQ))
    given = case(keys, centres, 9)
    single = method(sinks=2, window=1)._rate(keys, centres, torch.tensor([9]), layer.rotary)[0].unflatten(0, (2, 2))
    z = (single - single[..., 2:8].mean(-1, True)) / single[..., 2:8].std(-1, keepdim=True, correction=0)
    for group, joined in (("max", z.amax(1)), ("mean", z.mean(1))):
        scores = method(sinks=2, window=1, group=group).score(layer, *given, keep=5)[0]
        assert (scores[:, [0, 1, 8]] == PROTECTED).all()
        torch.testing.assert_close(scores[:, 2:8], joined[:, 2:8], atol=1e-5, rtol=1e-4)
    plain = method(sinks=2, window=1, normalise=False).score(layer, *given, keep=5)[0]
    torch.testing.assert_close(plain[:, 2:8], single.amax(1)[:, 2:8])


@pytest.mark.parametrize(
    ("keep", "guarded"), [(1, []), (2, [8]), (3, [7, 8]), (4, [6, 7, 8]), (5, [0, 6, 7, 8]), (9, [0, 1, 6, 7, 8])]
)
def test_where_little_is_kept_the_newest_are_protected_first(keep, guarded):
    g = torch.Generator().manual_seed(0)
    layer = SimpleNamespace(rotary=RotarySpec.halves(FREQ))
    scores = method(sinks=2, window=3).score(layer, *case(torch.randn(1, 1, 9, 4, generator=g), CENTRES, 9), keep=keep)
    assert (scores[0, 0] == PROTECTED).nonzero()[:, 0].tolist() == guarded


def test_the_union_of_all_heads_nominees_is_the_best_by_the_maximum():
    """The authors let every head nominate its best and rank the union again: the same set, here in 1,000 draws."""
    scores = torch.randn(1000, 6, 30, generator=torch.Generator().manual_seed(0))
    best = scores.amax(1).topk(8).indices.sort(-1).values
    nominated = torch.zeros(1000, 30, dtype=torch.bool)
    nominated.scatter_(1, scores.topk(8).indices.flatten(1), True)
    again = scores.amax(1).masked_fill(~nominated, -torch.inf).topk(8).indices.sort(-1).values
    assert torch.equal(best, again)


# ---- centres ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_5_vl"])
def test_a_prompt_s_centres_are_those_of_the_queries_before_the_rotation(model_of, family, monkeypatch):
    """Whole and in chunks, in blocks; a second turn adds to the first."""
    model, ids = model_of(family), tiny.text_ids(60)
    monkeypatch.setattr("textkv.collector._BLOCK", 16)
    cache = MethodCache(model, "tri_attention", 0.5)
    with torch.no_grad():
        queries = plain_queries(model, lambda: model(ids))
        cache.begin(tokens=40)
        for chunk in ids[:, :40].split((3, 1, 30, 6), 1):
            model(chunk, past_key_values=cache)
        first = [layer.statistics[QUERIES] for layer in cache.layers]
        model(ids[:, 40:41], past_key_values=cache)
        full = MethodCache(model, "full")
        model(ids[:, :41], past_key_values=full)
        # exact keys again, so that the second turn's queries are those of a plain forward
        for layer, exact in zip(cache.layers, full.layers, strict=True):
            layer.segments = exact.segments
        model(ids[:, 41:], past_key_values=cache)
    for layer, q, before in zip(cache.layers, queries, first, strict=True):
        for mark, taken in ((before, [*range(40)]), (layer.statistics[QUERIES], [*range(40), *range(41, 60)])):
            own = q[0][:, taken]
            reach = torch.hypot(own[..., : layer.head_dim // 2], own[..., layer.head_dim // 2 :]).mean(1)
            torch.testing.assert_close(mark[0, :, : layer.head_dim].double(), own.mean(1), atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(mark[0, :, layer.head_dim : -1].double(), reach, atol=2e-4, rtol=1e-4)
            assert mark[..., -1].unique().tolist() == [len(taken)]


def test_centres_need_the_rotation():
    joined = Needs(rope=True, query_centres=True) | Needs(window=8)
    assert joined == Needs(window=8, rope=True, query_centres=True)
    assert method().needs() == Needs(rope=True, query_centres=True)
    assert method(centres="mini").needs() == Needs(rope=True)
    with pytest.raises(ValueError, match="query_centres with rope=False: give rope=True"):
        Needs(query_centres=True)


def test_centres_of_parts_add_up():
    g, spec = torch.Generator().manual_seed(0), RotarySpec.halves(FREQ)
    q, counted = torch.randn(2, 3, 24, 4, generator=g) + 5, torch.rand(2, 24, generator=g) > 0.3
    counted[1, :8] = False
    whole = QueryCentres.of(q, counted, spec)
    parts = [QueryCentres.of(q[:, :, i : i + 8], counted[:, i : i + 8], spec) for i in (0, 8, 16)]
    added = parts[0] + parts[1] + parts[2]
    for ours, expected in zip(vars(added).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert not parts[0].mean[1].any()


@torch.no_grad()
def test_the_score_foretells_the_logits_of_queries_to_come():
    """Ranks of 900 keys by centres from another text, against the mean logits that the next 256 queries give them."""
    model, tokenizer = load_mini()
    ids, seen, policy = read_text(tokenizer, None, 1200), {}, method(centres="mini")
    use(model).model(ids[None], use_cache=False, **{CAPTURE: seen.__setitem__})
    for number, (keys, queries) in seen.items():
        past, spec = keys[:, :, :900], proven(model, [number])[number]
        told = policy._rate(past, policy._given.layers[number], torch.tensor([900]), spec)[0]
        true = (queries[0, :, 901:1157].unflatten(0, (2, 2)) @ past[0][:, None].mT).mean(2).flatten(0, 1)
        ranks = torch.stack([told, true]).argsort(-1).argsort(-1).float()
        correlation = torch.stack([torch.corrcoef(of_head)[0, 1] for of_head in ranks.unbind(1)])
        assert float(correlation.min()) > 0.6 and float(correlation.mean()) > 0.8


# ---- on models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_every_family_keeps_the_budget_and_the_sinks(model_of, family):
    model = model_of(family)
    cache = MethodCache(model, "tri_attention", 0.25)
    with torch.no_grad():
        model(tiny.text_ids(64), past_key_values=cache)
    for head in (head for layer in kept_of(cache) for head in layer):
        assert len(head) == 16 and head[:4] == [0, 1, 2, 3] and head == sorted(head)


@pytest.mark.parametrize("family", ["glm", "smollm3", "cohere", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_other_layouts_run_by_their_proven_rotation(family):
    """Part of the channels, neighbouring pairs, layers that do not turn, windows, sinks, states."""
    model = families.build(family)
    cache = MethodCache(model, "tri_attention(4)", "16t")
    kinds.logits(model, kinds.ids(40), cache)
    out = kinds.steps(model, kinds.ids(12, seed=1), cache)
    assert bool(out.isfinite().all())
    assert all(16 <= int(layer.lengths().max()) < 20 for layer in cache.context.layers)


def test_a_rotation_that_follows_the_length_is_refused_by_name():
    model = families.build("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(ValueError, match="rope type 'dynamic' changes its frequencies with the length"):
            MethodCache(model, "tri_attention", 0.5)
    finally:
        model.model.rotary_emb.rope_type = "default"


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_behind_an_image_the_next_position_is_the_model_s(model_of, family):
    """M-RoPE: an image takes fewer positions than it has tokens; rounds go by the positions that text gets there."""
    model, seen = model_of(family), []
    inputs, spans = tiny.screens(2)
    cache = MethodCache(model, "tri_attention(2)", "20t")
    cache.begin(**inputs, spans=spans)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        n = inputs["input_ids"].shape[1]
        rotary = model.model.language_model.rotary_emb
        handle = rotary.register_forward_pre_hook(
            lambda m, args, kw: seen.append((*args, *kw.values())[1]), with_kwargs=True
        )
        for token in range(5):
            model(tiny.text_ids(1, seed=token), past_key_values=cache)
        handle.remove()
    newest = int(cache.method.recall(cache.layers[0]).rope_positions)
    assert newest == int(seen[-1].flatten()[0]) < n + 4
    assert all(int(layer.lengths().max()) in (20, 21) for layer in cache.layers)


def test_a_full_budget_keeps_nothing_beside_the_cache(model_of):
    model, ids = model_of("llama"), tiny.text_ids(30)
    for name in ("tri_attention(1)", "tri_attention(1,mode='union')"):
        cache = MethodCache(model, name, 1.0)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            for token in range(20, 30):
                model(ids[:, token : token + 1], past_key_values=cache)
        assert [dict(layer.statistics) for layer in cache.layers] == [{}] * 3
        assert [int(layer.lengths().min()) for layer in cache.layers] == [30] * 3


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("tri_attention(2)", 0.4),
        ("tri_attention(interval=3,sinks=1,window=4)", "24t"),
        ("tri_attention(2,mode='union',over='max')", 0.4),
        ("tri_attention(2,mode='per_head',normalise=False)", "24t"),
        ("tri_attention+mikv(16,0)", 0.4),
    ],
)
def test_it_conforms(name, budget):
    checks = {check.name: check.outcome for check in check_method(name, budget)}
    refused = {name for name, outcome in checks.items() if outcome != "passed"}
    assert refused == {"equals_masked_full_attention", "crop_or_refusal"}


def test_under_adakv_it_scores_alone_and_decoded_tokens_stay():
    assert {check.outcome for check in check_method("tri_attention+adakv", 0.4)} == {"passed"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(interval=0), "interval=0: at least 1 token lies between two cuts; the papers use 128"),
        (dict(mode="all"), "mode='all': use one of per_layer_perhead, per_head, union"),
        (dict(group="sum"), "group='sum': use one of max, mean"),
        (dict(over="min"), "over='min': use one of mean, max"),
        (dict(sinks=-1), "sinks=-1, window=0: neither may be negative"),
        (dict(offsets=0), "offsets=0: 1 to 24 powers of two"),
        (dict(group="mean", mode="union"), "group='mean' with mode='union': .* use 'max'"),
        (dict(pin_prompt=True, budget=Budget(0.5)), "pin_prompt=True with budget=0.5: .* give a budget in tokens"),
        (dict(inner=SnapKV(), budget=Budget(0.5)), "tri_attention cannot follow snapkv"),
        (dict(centres="nowhere"), "centres='nowhere': there is no nowhere; make one with `python -m textkv.tri_att"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TriAttention(**settings)


def test_what_judges_all_layers_together_gives_a_wrapper_no_scores():
    for name in ("tri_attention(mode='union')", "tri_attention(pin_prompt=True)"):
        with pytest.raises(ValueError, match="adakv needs importance scores and tri_attention gives none"):
            resolve_method(f"{name}+adakv", "40t")
