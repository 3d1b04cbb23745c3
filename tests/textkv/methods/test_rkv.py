"""R-KV: the specification's worked case, the tiled redundancy against the whole matrix, rounds against a simulation."""

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.methods.test_h2o import blocks_of, feed, tokens
from tests.textkv.test_eviction import LAYER, case
from textkv import Budget, MethodCache, Needs, resolve_method
from textkv.conformance import check_method
from textkv.eviction import PROTECTED
from textkv.methods.rkv import QUERIES, RKV, importance, redundancy
from textkv.methods.snapkv import SnapKV
from textkv.scores import pool

# ---- the score -----------------------------------------------------------------------------------------------------

KEYS = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0, 2], [1, 1], [0.5, 0]])[None, None]
QUERIES_OF_WINDOW = torch.tensor([[[2.0, 0], [1, 1]], [[0, 2], [1, 0]]])[None]


def test_the_worked_case():
    close = dict(atol=1e-6, rtol=0)
    seen = importance(QUERIES_OF_WINDOW, KEYS, 2**-0.5, None)
    torch.testing.assert_close(seen[0, 0], torch.tensor([0.168304, 0.168304, 0.175485, 0.487907]), **close)
    pooled = torch.tensor([0.168304, 0.175485, 0.487907, 0.487907])
    torch.testing.assert_close(pool(seen, 3, "max")[0, 0], pooled, **close)
    repeats = torch.tensor([0.191556, 0.164997, 0.200069, 0.164997, 0.156283, 0.122098])
    torch.testing.assert_close(redundancy(KEYS, 0.5)[0, 0], repeats, **close)
    held, evidence = case(KEYS, QUERIES_OF_WINDOW)
    for weight, worth in (
        (0.1, [-0.155570, -0.130949, -0.131272, -0.099706]),
        (0.07, [-0.166366, -0.141163, -0.151911, -0.119293]),
    ):
        scores = RKV(window=2, kernel=3, weight=weight).score(LAYER, held, evidence, keep=4)[0, 0]
        torch.testing.assert_close(scores[:4], torch.tensor(worth), **close)
        assert scores[4:].tolist() == [PROTECTED] * 2


def whole_matrix(keys, similar):
    """Redundancy of keys [n, d] by its definition, in doubles."""
    unit = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    matrix = unit @ unit.T
    matrix.fill_diagonal_(0)
    for row in matrix:
        above = (row > similar).nonzero()[:, 0].tolist()
        row[above[-1] if above else 0] = 0
    return matrix.mean(0).softmax(0)


@pytest.mark.parametrize("similar", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("tile", [1, 200, 1 << 22])
def test_the_matrix_is_never_held_and_says_the_same(similar, tile, monkeypatch):
    monkeypatch.setattr("textkv.methods.rkv._TILE", tile)
    keys = torch.randn(2, 3, 23, 4, generator=torch.Generator().manual_seed(0))
    ours = redundancy(keys, similar)
    for row in range(2):
        for head in range(3):
            expected = whole_matrix(keys[row, head], similar)
            torch.testing.assert_close(ours[row, head].double(), expected, atol=1e-6, rtol=0)


def test_the_last_copy_of_what_is_said_again_is_the_new_one():
    keys = torch.eye(8)[[0, 1, 2, 1, 3, 1, 4]][None, None]
    scores = redundancy(keys, 0.5)[0, 0]
    assert scores[1] > scores[3] > scores[5] == scores[[0, 2, 4, 6]].max()


def test_importance_equals_plain_loops():
    g = torch.Generator().manual_seed(0)
    q, keys = torch.randn(1, 4, 3, 8, generator=g), torch.randn(1, 2, 15, 8, generator=g)
    ours = importance(q, keys, 0.3, 2.0)
    for head in range(2):
        rows = []
        for i in range(3):
            both = [2.0 * (0.3 * (keys[0, head, :12] @ q[0, 2 * head + j, i]) / 2.0).tanh() for j in range(2)]
            rows.append(torch.maximum(*both).softmax(0))
        torch.testing.assert_close(ours[0, head], torch.stack(rows).mean(0))


@pytest.mark.parametrize("keep", [1, 2, 3, 9, 30])
def test_a_small_budget_shortens_the_window(keep):
    g = torch.Generator().manual_seed(0)
    held, evidence = case(torch.randn(1, 2, 20, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g))
    scores = RKV().score(LAYER, held, evidence, keep=keep)
    assert bool((scores == PROTECTED).sum(-1).eq(min(8, keep - 1)).all()) and not bool(scores.isnan().any())


# ---- rounds ----------------------------------------------------------------------------------------------------------


def simulate(q, k, blocks, limits, interval, method):
    """Kept positions after each block, one KV head: q [group, n, d], k [n, d]."""
    held = []
    for (start, stop), limit in zip(blocks, limits, strict=True):
        held += range(start, stop)
        if len(held) < limit + (interval if stop - start == 1 else 1):
            yield [*held]
            continue
        w = method.window
        past, keys = held[:-w], k[held].double()
        logits = (q[:, stop - w : stop].double() @ keys[:-w].T).amax(0)
        seen = torch.nn.functional.max_pool1d(
            logits.softmax(-1).mean(0)[None], method.kernel, 1, method.kernel // 2
        )[0]  # fmt: skip
        worth = method.weight * seen - (1 - method.weight) * whole_matrix(keys, method.similar)[: len(past)]
        best = sorted(range(len(past)), key=lambda i: (-float(worth[i]), i))[: limit - w]
        held = sorted([past[i] for i in best] + held[-w:])
        yield [*held]


@pytest.mark.parametrize("group", [1, 2])
def test_it_does_what_a_plain_simulation_does(group):
    """Two turns and decoding, two rows, two KV heads: kept sets at every step."""
    blocks = blocks_of(30, *[1] * 11, 12, *[1] * 6)
    q, k, v = tokens(59, group=group, batch=2)
    limits = [12] * 12 + [21] * 7  # 0.4 of 30, then 0.4 of the 53 seen after the second turn
    method = RKV(interval=5, window=4, kernel=3, weight=0.3)
    expected = {
        (b, h): list(simulate(q[b, h * group : (h + 1) * group], k[b, h], blocks, limits, 5, method))
        for b in range(2)
        for h in range(2)
    }
    for step, layer in enumerate(feed("rkv(5,window=4,kernel=3,weight=0.3)", 0.4, q, k, v, blocks)):
        for (b, h), states in expected.items():
            assert layer.stored().positions[b, h].tolist() == states[step], f"step {step}, row {b}, head {h}"
    assert [len(s) for s in expected[0, 0]] == [*[12, 13, 14, 15, 16] * 2, 12, 13, *range(21, 26), 21, 22]


def test_queries_are_held_only_while_a_round_is_near():
    q, k, v = tokens(42)
    blocks = blocks_of(20, *[1] * 22)
    known = [QUERIES in layer.statistics for layer in feed("rkv(8,window=3)", "12t", q, k, v, blocks)]
    assert known == [False] + ([False] * 5 + [True] * 3) * 2 + [False] * 5 + [True]
    full = feed("rkv(8,window=3)", 1.0, q, k, v, blocks)
    assert [dict(layer.statistics) for layer in full] == [{}] * 23


def kept_of(cache, row=0):
    return [[[p for p in head if p >= 0] for head in layer.held_positions()[row].tolist()] for layer in cache.layers]


def test_rows_of_a_batch_are_what_each_is_alone(model_of):
    """Rows have their rounds at different tokens, one of them gets only padding for a while."""
    model, ids = model_of("llama"), tiny.text_ids(64, batch=3)
    mask = torch.ones(3, 64, dtype=torch.long)
    mask[1, :18], mask[2, :15], mask[2, 41:49] = 0, 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = MethodCache(model, "rkv(6,window=4)", "16t")
    alone = [MethodCache(model, "rkv(6,window=4)", "16t") for _ in range(3)]
    with torch.no_grad():
        for part in [slice(0, 30), *(slice(i, i + 1) for i in range(30, 64))]:
            both = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
            model((ids * mask)[:, part], past_key_values=cache, **both)
            for row, start in enumerate((0, 18, 15)):
                own = slice(max(start, part.start), part.stop)
                if bool(mask[row, own].all()):
                    at = {"position_ids": places[row : row + 1, own]}
                    model(ids[row : row + 1, own], past_key_values=alone[row], **at)
                assert kept_of(cache, row) == kept_of(alone[row]), f"row {row}, token {part.stop}"


def test_the_window_stays_and_the_budget_holds_after_every_round(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache = MethodCache(model, "rkv(10)", "20t")
    sizes = []
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        for token in range(40, 80):
            model(ids[:, token : token + 1], past_key_values=cache)
            sizes.append(len(kept_of(cache)[0][0]))
            assert all(head[-8:] == list(range(token - 7, token + 1)) for layer in kept_of(cache) for head in layer)
    assert sizes == [*range(21, 30), 20] * 4


def test_a_short_prompt_grows_to_its_first_round(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40)
    cache = MethodCache(model, "rkv(10)", "20t")
    with torch.no_grad():
        for token in range(40):
            model(ids[:, token : token + 1], past_key_values=cache)
            assert len(kept_of(cache)[0][0]) == (token + 1 if token < 29 else 20 + (token + 1) % 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_judged_in_fp32(dtype):
    q, k, v = (x.to(dtype) for x in tokens(14))
    exact = [x.float() for x in (q, k, v)]
    both = (feed("rkv(window=2)", 0.5, *given, [(0, 12)]) for given in ((q, k, v), exact))
    for half, full in zip(*both, strict=True):
        assert torch.equal(half.stored().positions, full.stored().positions)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("rkv(2,window=2)", 0.4), ("rkv(interval=3,window=3,kernel=1)", "24t"), ("rkv+mikv(16,0)", 0.4)],
)
def test_it_conforms(name, budget):
    checks = {check.name: check.outcome for check in check_method(name, budget)}
    refused = {name for name, outcome in checks.items() if outcome != "passed"}
    assert refused == {"equals_masked_full_attention", "crop_or_refusal"}


def test_under_adakv_it_scores_alone_and_decoded_tokens_stay():
    assert {check.outcome for check in check_method("rkv+adakv", 0.4)} == {"passed"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(interval=0), "interval=0: at least 1 token lies between two cuts"),
        (dict(window=0), "window=0: between 1 and interval=128"),
        (dict(window=9, interval=8), "window=9: between 1 and interval=8, for a round is judged by queries that came"),
        (dict(kernel=4), "kernel=4: pooling needs an odd width of at least 1; the authors use 7"),
        (dict(weight=1.2), r"weight=1.2: a share of importance lies in \[0, 1\]; the paper uses 0.1"),
        (dict(similar=1.5), r"similar=1.5: a cosine lies in \[-1, 1\]; the paper uses 0.5"),
        (dict(inner=SnapKV(), budget=Budget(0.5)), "rkv cannot follow snapkv"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, message):
    assert resolve_method("rkv").needs() == Needs(window=8)
    with pytest.raises(ValueError, match=message):
        RKV(**settings)
