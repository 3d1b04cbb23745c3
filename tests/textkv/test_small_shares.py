"""A layer or head that keeps fewer tokens than its window: the newest count - 1 of it, and the best one before them."""

from types import SimpleNamespace

import pytest
import torch

import agentkv.gui_kv  # noqa: F401  (registers gui-kv)
from tests.textkv import tiny
from textkv import Budget, MethodCache
from textkv.eviction import NEVER, PROTECTED, keep_best
from textkv.evidence import Evidence
from textkv.methods.adakv import AdaKV
from textkv.methods.vl_cache import VLCache
from textkv.scores import fit_window

P = PROTECTED
LAYER = SimpleNamespace(index=0)


class Recorder:
    """Stands for a layer: takes down which slots of each head were kept."""

    index = 0

    def __init__(self, lengths: list[list[int]]) -> None:
        self._lengths, self.kept = torch.tensor(lengths), None

    def lengths(self) -> torch.Tensor:
        return self._lengths

    def resting(self, counts: torch.Tensor) -> torch.Tensor:
        return counts  # something came to every row

    def keep(self, index: torch.Tensor) -> None:
        self.kept = [[[i for i in head if i >= 0] for head in row] for row in index.tolist()]

    def keep_mask(self, mask: torch.Tensor) -> None:
        self.kept = [[head.nonzero()[:, 0].tolist() for head in row] for row in mask]


def chosen(scores: list, counts: list[list[int]], lengths: list[list[int]] | None = None) -> list:
    scores = torch.tensor(scores)
    layer = Recorder(lengths or [[scores.shape[-1]] * scores.shape[1]] * len(scores))
    keep_best(layer, scores, torch.tensor(counts))
    return layer.kept


def run(model, method, budget, ids, mask=None, spans=None, decoded=0):
    cache = MethodCache(model, method, budget)
    cache.begin(ids, spans=spans, attention_mask=mask)
    places = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(ids, past_key_values=cache, **places)
        for i in range(decoded):
            model(tiny.text_ids(1, seed=i), past_key_values=cache)
    return cache


def heads_of(cache, layer: int, row: int = 0) -> list[list[int]]:
    """The positions that each stored head of a row keeps, ascending."""
    return [sorted(set(head.tolist()) - {-1}) for head in cache.kept_positions(layer)[row]]


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, kept",
    [(1, [1]), (2, [1, 6]), (3, [1, 5, 6]), (4, [3, 4, 5, 6]), (5, [1, 3, 4, 5, 6]), (6, [1, 2, 3, 4, 5, 6])],
)
def test_a_head_keeps_the_newest_of_its_window_and_the_best_before_it(count, kept):
    assert chosen([[[0.1, 0.5, 0.3, P, P, P, P]]], [[count]]) == [[kept]]


def test_every_row_and_every_head_by_its_own_count():
    scores = [[[0.1, 0.5, P, P, P], [0.6, 0.5, P, P, P]], [[0.1, 0.5, P, P, P], [0.6, 0.5, P, P, P]]]
    assert chosen(scores, [[2], [4]]) == [[[1, 4], [0, 4]], [[1, 2, 3, 4], [0, 2, 3, 4]]]
    assert chosen(scores, [[2, 4], [1, 3]]) == [[[1, 4], [0, 2, 3, 4]], [[1], [2, 3, 4]]]


def test_the_newest_win_against_protected_first_tokens():
    assert chosen([[[P, 0.1, 0.5, P, P, P]]], [[3]]) == [[[2, 4, 5]]]
    assert chosen([[[P, 0.1, 0.5, P, P, P]]], [[4]]) == [[[0, 3, 4, 5]]]


def test_where_nothing_else_is_held_one_more_of_the_window_stays():
    assert chosen([[[P, P, P, P]]], [[2]]) == [[[2, 3]]]
    # Neither a token that must go first nor a hole comes before a token of the window.
    assert chosen([[[NEVER, NEVER, P, P, P]]], [[2]]) == [[[3, 4]]]
    assert chosen([[[NEVER, NEVER, P, P, P]]], [[2]], [[3]]) == [[[3, 4]]]
    assert chosen([[[NEVER, -1e30, P, P, P]]], [[2]]) == [[[1, 4]]]


def test_a_window_leaves_room_for_what_lies_before_it():
    queries = torch.arange(8.0).view(1, 1, 8, 1)
    for keep, widths in {1: (0, 0), 2: (1, 1), 3: (2, 1), 4: (3, 2), 9: (8, 7), 10: (8, 8), 50: (8, 8)}.items():
        fitted = [fit_window(queries, 100, keep, past) for past in (1, 2)]
        assert tuple(f.shape[2] for f in fitted) == widths
        assert all(f[0, 0, :, 0].tolist() == list(range(8 - w, 8)) for f, w in zip(fitted, widths, strict=True))
    assert fit_window(queries, 5, 50).shape[2] == 4


@pytest.mark.parametrize("safeguard", ["mix", "protect"])
def test_heads_share_nothing_where_the_window_fills_the_budget(safeguard):
    scores = torch.nn.functional.pad(torch.rand(1, 3, 30) + torch.arange(3.0)[:, None], (0, 6), value=P)
    seen = Evidence(torch.zeros(1, 3, 2, 8), 1.0, torch.tensor([36]))
    for budget, sum_ in (("3t", 9), ("6t", 18), ("9t", 27)):
        method = AdaKV(floor=0.0, safeguard=safeguard, budget=Budget.parse(budget))
        counts = method.counts(LAYER, scores, seen)
        assert int(counts.sum()) == sum_ and int(counts.min()) >= min(6, sum_ // 3)
    layer = Recorder([[36, 36, 36]])
    keep_best(layer, scores, AdaKV(floor=0.0, budget=Budget.parse("3t")).counts(LAYER, scores, seen))
    best = scores[0, :, :30].argmax(-1).tolist()
    assert layer.kept == [[[b, 34, 35] for b in best]]


# ---- vl-cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(monkeypatch):
    """Layers of very different density: under vl-cache one takes nearly all, others less than a window."""
    monkeypatch.setattr(VLCache, "_density", lambda self, layer, evidence, row: (1.0, 0.03, 0.15)[layer.index])


@pytest.mark.parametrize("official", [False, True])
def test_a_layer_of_vl_cache_keeps_what_snapkv_would_keep_of_as_many(model_of, uneven, official):
    model, ids = model_of("llama"), tiny.text_ids(64)
    name, kernel = ("vl-cache-official", 5) if official else ("vl-cache", 1)
    seen = set()
    for budget in (0.1, 0.2, 0.3, 0.5):
        cache = run(model, name, budget, ids, spans=[[(4, 50)]])
        for layer in range(3):
            count = len(heads_of(cache, layer)[0])
            snap = run(model, f"snapkv(window=14,kernel={kernel})", f"{count}t", ids)
            assert heads_of(cache, layer) == heads_of(snap, layer)
            newest = list(range(64 - min(14, count - 1), 64))
            assert all(head[len(head) - len(newest) :] == newest for head in heads_of(cache, layer))
            seen.add(count)
    assert any(1 < count <= 14 for count in seen) and max(seen) > 15


def test_rows_of_vl_cache_have_shares_and_windows_of_their_own(model_of, monkeypatch):
    dense = {60: (1.0, 0.03, 0.15), 44: (0.03, 0.4, 1.0)}
    monkeypatch.setattr(
        VLCache, "_density", lambda self, layer, evidence, row: dense[int(evidence.tokens[row])][layer.index]
    )
    model, ids = model_of("llama"), tiny.text_ids(60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :16] = 0
    both = torch.cat([ids, torch.cat([torch.zeros(1, 16, dtype=torch.long), ids[:, :44]], 1)])
    cache = run(model, "vl-cache", 0.2, both, mask, spans=[[(4, 40)], [(20, 50)]])
    for row, (n, span) in enumerate(((60, (4, 40)), (44, (4, 34)))):
        alone = run(model, "vl-cache", 0.2, ids[:, :n], spans=[[span]])
        assert [heads_of(cache, i, row) for i in range(3)] == [heads_of(alone, i) for i in range(3)]
        sizes = [len(heads_of(alone, i)[0]) for i in range(3)]
        assert sum(sizes) == 3 * Budget(0.2).count(n) and min(sizes) < 10


def test_the_official_vl_cache_observes_all_tokens_behind_the_image(model_of, monkeypatch):
    monkeypatch.setattr(VLCache, "_density", lambda *args: 0.5)
    model, ids, spans = model_of("llama"), tiny.text_ids(200), [[(2, 30)]]
    for method, window in (("vl-cache-official", 170), ("vl-cache-official(window=128)", 128)):
        ours = run(model, method, "180t", ids, spans=spans)
        snap = run(model, f"snapkv(window={window})", "180t", ids)
        assert [heads_of(ours, i) for i in range(3)] == [heads_of(snap, i) for i in range(3)]
    other = run(model, "vl-cache-official", "180t", ids, spans=spans)
    assert any(heads_of(ours, i) != heads_of(other, i) for i in range(3))


def test_vl_cache_holds_the_observed_queries_alone_until_the_prompt_ends(model_of, monkeypatch):
    held = []
    finish = VLCache.on_finish
    monkeypatch.setattr(
        VLCache,
        "on_finish",
        lambda self, cache: (held.extend(x.notes["vl-cache"][0] for x in cache.layers), finish(self, cache)),
    )
    cache = run(model_of("llama"), "vl-cache-official", 0.3, tiny.text_ids(64), spans=[[(4, 50)]])
    assert [x.queries.shape[2] for x in held] == [14] * 3
    assert all(x.queries.untyped_storage().nbytes() == x.queries.numel() * 4 for x in held)
    assert not any(layer.notes for layer in cache.layers)


# ---- pyramidkv -------------------------------------------------------------------------------------------------------


def test_the_last_layer_of_the_official_pyramid_may_keep_its_window_alone(model_of):
    model, ids = model_of("llama"), tiny.text_ids(64)
    official = run(model, "pyramidkv-official(window=8)", "14t", ids)
    assert [len(heads_of(official, i)[0]) for i in range(3)] == [8 + 12, 8 + 6, 8]
    assert heads_of(official, 2) == [list(range(56, 64))] * 2
    ours = run(model, "pyramidkv(window=8)", "14t", ids)
    assert [len(heads_of(ours, i)[0]) for i in range(3)] == [8 + 11, 8 + 6, 8 + 1]


@pytest.mark.parametrize("method", ["pyramidkv(window=8)", "pyramidkv(window=8)+adakv", "pyramidkv(window=8)+kvcrush"])
def test_a_later_turn_is_cut_by_each_layers_own_number(model_of, method):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache = MethodCache(model, method, 0.4)
    with torch.no_grad():
        model(ids[:, :64], past_key_values=cache)
        model(ids[:, 64:], past_key_values=cache)
    expected = (cache.method.inner or cache.method).line(32, 8, 80, 3)
    assert sum(expected) == 3 * 32 and expected[2] < 32 - 16
    stored = [[len(head) for head in heads_of(cache, i)] for i in range(3)]
    assert [sum(layer) for layer in stored] == [2 * n for n in expected]


# ---- every method ----------------------------------------------------------------------------------------------------

PROMISED = {  # the newest tokens of a head that keeps c, under a budget of b. Heads under adakv share what a window
    # that fits the budget leaves: one that wins more has more of the past, not a longer window.
    "snapkv(window=8)": lambda c, b: min(8, c - 1),
    "vatp(window=8)": lambda c, b: min(8, c - c // 4 - 1),
    "pyramidkv(window=8)": lambda c, b: min(8, c - 1),
    "pyramidkv-official(window=8)": lambda c, b: min(8, c - 1),
    "cake(window=4)": lambda c, b: min(4, c - 1),
    "cake-official(window=4)": lambda c, b: min(4, c - 1),
    "cake(window=4)+adakv": lambda c, b: min(4, b - 1, c - 1),
    "vl-cache(text_window=8)": lambda c, b: min(8, c - 1),
    "vl-cache-official(text_window=8)": lambda c, b: min(8, c - 1),
    "vl-cache(text_window=8)+mikv(16,0)": lambda c, b: min(8, c - 1),
    "vl-cache(text_window=8)+kivi(8,group=16,residual=16)": lambda c, b: min(8, c - 1),
    "gui-kv": lambda c, b: min(8, c - 1),
    "gui-kv-official": lambda c, b: min(8, max(c - 2, 1), c - 1),
    "gui-kv+adakv(floor=0)": lambda c, b: min(8, b - 1, c - 1),
    "adakv(floor=0)": lambda c, b: min(32, b - 1, c - 1),
    "adakv(floor=0,safeguard='protect')": lambda c, b: min(32, b - 1, c - 1),
    "pyramidkv(window=8)+adakv(floor=0)": lambda c, b: min(8, b - 1, c - 1),
    "pyramidkv-official(window=8)+adakv(floor=0)": lambda c, b: min(8, b - 1, c - 1),
    "vl-cache(text_window=8)+adakv(floor=0)": lambda c, b: min(8, b - 1, c - 1),
    "snapkv(window=8)+kvcrush": lambda c, b: min(8, c - 1),
    "pyramidkv-official(window=8)+kvcrush": lambda c, b: min(8, c - 1),
    "snapkv(window=8)+adakv(floor=0)+kvcrush": lambda c, b: min(8, b - 1, c - 1),
    "pyramidkv(window=8)+mikv(16,0)": lambda c, b: min(8, c - 1),
    "pyramidkv(window=8)+minicache(start=0)": lambda c, b: min(8, c - 1),
    "h2o": lambda c, b: max(1, c // 2),
    "h2o(recent=1.0)+adakv(floor=0)": lambda c, b: c,
    "h2o+mikv(16,0)": lambda c, b: max(1, c // 2),
    "tova(recent=8)": lambda c, b: min(8, c),
    "rkv": lambda c, b: min(8, c - 1),
    "rkv+adakv(floor=0)": lambda c, b: min(8, b - 1, c - 1),
    "tri_attention(window=8)": lambda c, b: min(8, c - 1),
    "tri_attention(window=8,mode='union')": lambda c, b: min(8, c - 1),
    "keydiff(recent=8)+adakv(floor=0)": lambda c, b: min(8, c),
    "knorm(recent=8)": lambda c, b: min(8, c),
    "d2o(sinks=1)": lambda c, b: max(1, c // 4),
    "d2o-official(sinks=1)": lambda c, b: max(1, c // 2),
    "critic": lambda c, b: min(32, c // 2),
    "duo_attention": lambda c, b: c - c // 5,
}


@pytest.mark.parametrize("decoded", [0, 3])
@pytest.mark.parametrize("method", PROMISED)
def test_no_method_keeps_an_older_token_of_its_window_in_place_of_a_newer_one(model_of, uneven, method, decoded):
    model, ids = model_of("llama"), tiny.text_ids(64)
    for budget in ("5t", "9t", "14t", 0.3):
        cache, allowed = run(model, method, budget, ids, decoded=decoded), Budget.parse(budget).count(64)
        for layer in range(3):
            for head in heads_of(cache, layer):
                # Methods that evict at the prompt's end alone keep what was decoded on top of it.
                grown = 0 if cache.method.capabilities.decode_eviction else decoded
                window = PROMISED[method](len(head) - grown, allowed) + grown
                assert head[len(head) - window :] == list(range(64 + decoded - window, 64 + decoded)), (budget, layer)
