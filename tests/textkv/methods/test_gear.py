"""GEAR: the fit, the extreme entries, and what they cost and bring, against the formulas and plain linear algebra."""

from __future__ import annotations

import pytest
import torch

from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.kernels.pack import unpack
from textkv.methods.gear import Gear, GearL, extremes, low_rank
from textkv.methods.kivi import Kivi
from textkv.segments.base import storage_bytes

SMALL = "group=16,residual=16"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def like_keys(runs: int = 4, n: int = 256, D: int = 128) -> torch.Tensor:
    """16 directions and noise, four channels 12 times as large, one with an offset: the data of the spec's table."""
    x = torch.randn(runs, n, 16) @ torch.randn(runs, 16, D) / 4 + torch.randn(runs, n, D)
    x[..., [3, 40, 77, 100]] *= 12
    x[..., 9] += 20
    return x


def whole(x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), x.shape[1])


def error(method, x: torch.Tensor, values: bool = False) -> float:
    """Relative error of what the method stores for keys (or values)."""
    packed = method.encode(x, x, whole(x), prompt=True)[values]
    return float((unpack(packed).view_as(x) - x).norm() / x.norm())


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_without_corrections_it_is_kivi():
    x = like_keys(n=64)
    plain = Kivi(2).encode(x, x, whole(x), True)
    for method in (Gear(2, prompt_rank=0, outliers=0.0), GearL(2, prompt_rank=0)):
        for ours, true in zip(method.encode(x, x, whole(x), True), plain, strict=True):
            assert ours.lowrank is None and ours.sparse is None
            assert all(torch.equal(a, b) for a, b in zip(ours.tensors().values(), true.tensors().values(), strict=True))


@pytest.mark.parametrize("n, D", [(32, 80), (80, 32), (16, 16)])
def test_an_error_of_that_rank_is_recovered_in_every_row(n, D):
    sizes = torch.tensor([30.0, 2.0, 0.1])
    true = (torch.randn(5, n, 3) * sizes) @ torch.randn(5, 3, D)
    a, p = low_rank(true, 3, rounds=3)
    assert not mismatch(a @ p.mT, true, rtol=1e-4, atol=1e-4)
    halved = a.half().float() @ p.half().float().mT
    assert float((halved - true).norm() / true.norm()) < 1e-3
    assert not mismatch(a.norm(dim=1), p.norm(dim=1))  # each direction's size is shared equally


def test_the_fit_is_nearly_the_best_of_its_rank():
    x = like_keys()
    plain = x - unpack(Kivi(2).encode(x, x, whole(x), True)[0]).view_as(x)
    a, p = low_rank(plain, 4, rounds=3)
    u, s, v = torch.linalg.svd(plain, full_matrices=False)
    best = float((s[:, 4:] ** 2).sum().sqrt())
    assert (
        0.999 * best < float((plain - a @ p.mT).norm()) < 1.02 * best
    )  # it comes within 1e-5, which rounding can cross


def test_a_row_gets_what_it_would_get_alone():
    x = torch.randn(3, 32, 24)
    together = low_rank(x, 2, 3)
    alone = low_rank(x[1:2], 2, 3)
    for ours, true in zip(together, alone, strict=True):
        assert not mismatch(ours[1:2], true)


def test_no_error_and_less_rank_than_asked_for_stay_finite():
    for x in (torch.zeros(2, 16, 8), torch.ones(2, 16, 1) @ torch.ones(2, 1, 8)):
        a, p = low_rank(x, 3, 3)
        assert bool(a.isfinite().all()) and bool(p.isfinite().all())
        assert not mismatch(a @ p.mT, x, rtol=1e-5, atol=1e-5)


def test_extreme_entries_are_the_right_number_of_the_right_ones():
    x = torch.randn(3, 96, 10)
    counts = torch.tensor([96, 48, 0])
    found = extremes(x, counts, 0.25, over="tokens")  # floor(96 * 0.125) = 12, floor(48 * 0.125) = 6 at each end
    assert found.sum(1).unique(dim=1).tolist() == [[24], [12], [0]]
    assert not bool(found[1, 48:].any())
    column = x[1, :48, 4]
    picked = column[found[1, :48, 4]].sort().values
    assert torch.equal(picked, torch.cat([column.sort().values[:6], column.sort().values[-6:]]))
    of_values = extremes(x, counts, 0.25, over="channels")  # floor(10 * 0.125) = 1
    assert of_values[0].sum(1).unique().tolist() == [2] and of_values[1].sum(1).tolist() == [2] * 48 + [0] * 48
    assert extremes(x, counts, 0.02, over="channels") is None
    assert extremes(torch.randn(1, 100, 4), torch.tensor([100]), 0.58, over="tokens").sum(1).tolist() == [[58] * 4]


def test_extreme_values_of_a_token_are_those_over_all_heads_of_its_row():
    """Two rows of two heads of four channels, share 0.25: one entry of the eight at each end of a token."""
    x = torch.zeros(4, 3, 4)
    x[0, 0] = torch.tensor([9.0, 8.0, 1.0, 2.0])  # row 0, token 0: largest here, smallest in head 1
    x[1, 0] = torch.tensor([3.0, 4.0, -5.0, 5.0])
    x[0, 1] = torch.tensor([1.0, -9.0, 2.0, 9.5])  # token 1: both ends in head 0, none in head 1
    x[1, 1] = torch.tensor([3.0, 4.0, -5.0, 5.0])
    x[2, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # row 1, which knows nothing of row 0
    x[3, 0] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    found = extremes(x, torch.tensor([2, 2, 1, 1]), 0.25, over="channels", heads=2)
    assert found.nonzero().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 3], [1, 0, 2], [2, 0, 0], [3, 0, 3]]
    # Head by head no vector of four has an entry at either end.
    assert extremes(x, torch.tensor([2, 2, 1, 1]), 0.25, over="channels") is None


def test_a_slot_that_fewer_heads_hold_has_fewer_extreme_values():
    x = torch.randn(3, 6, 8)
    counts = torch.tensor([6, 2, 4])
    for run, count in enumerate(counts.tolist()):
        x[run, count:] = 0
    found = extremes(x, counts, 0.25, over="channels", heads=3)
    # floor(24 * 0.125) = 3, floor(16 * 0.125) = 2 and floor(8 * 0.125) = 1 at each end.
    assert found.sum((0, 2)).tolist() == [6, 6, 4, 4, 2, 2]
    assert not any(bool(found[run, count:].any()) for run, count in enumerate(counts.tolist()))
    of_two = x[[0, 2], 3].flatten()
    kept = torch.cat([of_two.topk(2).values, of_two.topk(2, largest=False).values]).sort().values
    assert torch.equal(x[:, 3][found[:, 3]].sort().values, kept)


def test_at_head_dim_64_some_values_are_kept_and_the_error_falls():
    x = torch.randn(8, 256, 64) * torch.randn(8, 256, 64).exp()  # two rows of four heads, with heavy tails
    of_heads, of_rows = (Gear(2, prompt_rank=2).encode(x, x, whole(x), True, heads)[1] for heads in (1, 4))
    assert of_heads.sparse is None
    assert len(of_rows.sparse.at) == 2 * 256 * 2 * int(4 * 64 * 0.01)
    errors = [float((unpack(p).view_as(x) - x).norm() / x.norm()) for p in (of_heads, of_rows)]
    assert errors[1] < 0.8 * errors[0]
    alone = Gear(2, prompt_rank=2).encode(x[4:], x[4:], whole(x[4:]), True, 4)[1]
    assert not mismatch(unpack(alone), unpack(of_rows)[16:], rtol=1e-4, atol=1e-4)


def test_a_cache_takes_the_heads_of_a_row_together(model_of):
    """Two heads of 16 channels: 32 entries a token, of which one at each end at a share of 1 / 16."""
    cache = MethodCache(model_of("llama"), f"gear(2,{SMALL},outliers=0.0625)")
    feed(cache._model(), cache, tiny.text_ids(48, batch=2))
    sparse = cache.layers[0].segments[0].pools[0].v.sparse
    per_token = torch.zeros(2 * 2 * 48)  # batch, head, token
    block = torch.arange(len(sparse.count)).repeat_interleave(sparse.count.long())
    per_token.scatter_add_(0, block * 16 + sparse.at.long() // 16, torch.ones(len(sparse.at)))
    assert per_token.view(2, 2, 48).sum(1).unique().tolist() == [2.0]
    assert len(per_token.unique()) == 3  # a head of a token may hold none, one or both of them


def test_extreme_entries_are_stored_exactly_and_do_not_widen_the_range():
    x = torch.randn(2, 64, 32)
    x[0, 5, 3], x[1, 60, 31] = 500.0, -300.0
    packed = Gear(4, prompt_rank=2, outliers=0.04).encode(x, x, whole(x), True)[0]  # one at each end of a channel
    back = unpack(packed).view_as(x)
    outside = extremes(x, whole(x), 0.04, over="tokens")
    assert not mismatch(back[outside], x[outside], rtol=1e-3, atol=1e-3)
    assert float((back - x).abs().max()) < 0.5
    assert int(packed.sparse.count.sum()) == len(packed.sparse.at) == 2 * 32 * 2


@pytest.mark.parametrize("bits", [2, 4])
def test_every_correction_helps_and_more_helps_more(bits):
    x = like_keys()
    by_rank = [error(Gear(bits, prompt_rank=r, outliers=0.0), x) for r in (0, 1, 2, 4, 8)]
    by_share = [error(Gear(bits, prompt_rank=0, outliers=s), x) for s in (0.0, 0.02, 0.05, 0.1)]
    assert by_rank == sorted(by_rank, reverse=True) and by_share == sorted(by_share, reverse=True)
    both = error(Gear(bits), x)
    assert both < min(error(GearL(bits), x), by_share[1], by_rank[0])
    assert error(Gear(bits), x, values=True) < error(GearL(bits), x, values=True) < error(Kivi(bits), x, values=True)


def test_the_errors_of_the_spec_table():
    x = like_keys(n=1024)
    table = {
        Kivi(2): 0.398, GearL(2, prompt_rank=2): 0.305, GearL(2): 0.168, GearL(2, prompt_rank=8): 0.164,
        Gear(2, prompt_rank=0): 0.337, Gear(2): 0.142,
    }  # fmt: skip
    for method, known in table.items():
        assert error(method, x) == pytest.approx(known, rel=0.06), method.expression


@pytest.mark.parametrize("bits, rank, share", [(2, 4, 0.02), (4, 4, 0.02), (2, 0, 0.1)])
def test_bytes_are_those_of_the_formula(bits, rank, share):
    n, D, group = 1024, 128, 64
    x = torch.randn(2, n, D)
    packed = Gear(bits, prompt_rank=rank, outliers=share).encode(x, x, whole(x), True)
    for part, vector in zip(packed, (n, D), strict=True):
        single = 2 * int(vector * share / 2 + 1e-9) / vector  # whole entries at each end
        formula = bits + 32 / group + 16 * rank * (n + D) / (n * D) + single * 32
        measured = storage_bytes(list(part.tensors().values())) * 8 / x.numel()
        assert measured == pytest.approx(formula, abs=0.02)  # bounds of blocks: 12 bytes for 64 tokens


@pytest.mark.parametrize("value", [0.0, 7.0, 65504.0])
def test_constant_and_extreme_tensors_stay_finite(value):
    x = torch.full((2, 64, 32), value)
    x[1, ::2] *= -1
    for method in (Gear(2), Gear(4, outliers=0.2), GearL(2)):
        for part in method.encode(x.half().float(), x, whole(x), True):
            back = unpack(part).view_as(x)
            assert bool(back.isfinite().all())
            assert not mismatch(back, x, rtol=0, atol=0.002 * value)
            assert all(bool(t.isfinite().all()) for t in part.tensors().values() if t.is_floating_point())


# ---- in a cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 15, 16, 17, 48])
def test_prompts_of_every_length_pack_keys_and_values_in_whole_chunks(model_of, n):
    cache = MethodCache(model_of("llama"), f"gear(2,{SMALL},outliers=0.25)")
    feed(cache._model(), cache, tiny.text_ids(n))
    layer = cache.layers[0]
    packed = layer.segments[0].lengths()[0, 0].item() if len(layer.segments) == 2 else 0
    assert packed == n - n % 16 and layer.lengths().tolist() == [[n, n]] and cache.get_seq_length() == n
    if packed:
        pool = layer.segments[0].pools[0]
        assert pool.k.blocks == pool.v.blocks == 2 * packed // 16
        assert pool.k.lowrank.p.shape == (2, 16, 4)  # one chunk for each head's prompt


def test_decoded_chunks_have_a_rank_of_their_own_and_are_never_touched_again(model_of):
    model = model_of("llama")
    cache = MethodCache(model, f"gear(2,{SMALL},outliers=0.25)")
    feed(model, cache, tiny.text_ids(40))
    layer = cache.layers[0]
    for i in range(8):
        feed(model, cache, tiny.text_ids(1, seed=i))
    chunk = layer.segments[0].pools[1]
    assert chunk.k.lowrank.a.shape[2] == 2 and layer.segments[0].pools[0].k.lowrank.a.shape[2] == 4
    frozen = layer.segments[0].stored()
    for i in range(64):
        feed(model, cache, tiny.text_ids(1, seed=i))
    now = layer.segments[0].stored()
    n = frozen.keys.shape[2]
    assert torch.equal(now.keys[:, :, :n], frozen.keys) and torch.equal(now.values[:, :, :n], frozen.values)
    assert layer.segments[0].lengths().tolist() == [[112, 112]]


def test_factored_attention_equals_attention_over_what_is_stored(model_of):
    cache = MethodCache(model_of("llama"), f"gear(2,{SMALL},outliers=0.25)")
    layer, n = cache.layers[0], 0
    for m in (40, *[1] * 30, 9):  # chunk of the prompt, several of decoded tokens, a later turn; buffers of every size
        q, k, v = torch.randn(1, 4, m, 16), torch.randn(1, 2, m, 16), torch.randn(1, 2, m, 16)
        if n == 0:
            layer.lazy_initialization(k, v)
        before = layer.stored() if n else None
        out = layer.feed(q, k, v, 0.25)
        if n:
            keys, values = torch.cat([before.keys, k], 2), torch.cat([before.values, v], 2)
            seen = torch.ones(m, keys.shape[2]).tril(keys.shape[2] - m).bool()
            scores = (q @ keys.repeat_interleave(2, 1).mT * 0.25).masked_fill(~seen, -torch.inf)
            assert not mismatch(out, scores.softmax(-1) @ values.repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)
        n += m
    assert layer.lengths().tolist() == [[79, 79]]


def test_heads_of_different_length_have_fits_of_their_own():
    x = torch.randn(3, 64, 24)
    x[1, 32:] = 0
    counts, method = torch.tensor([64, 32, 64]), Gear(2, group=16, residual=16, outliers=0.2)
    together = unpack(method.encode(x, x, counts, True)[0])
    alone = torch.cat([unpack(method.encode(x[r : r + 1, :n], x[r : r + 1, :n], counts[r : r + 1], True)[0])
                       for r, n in enumerate(counts.tolist())])  # fmt: skip
    assert not mismatch(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        f"gear(2,{SMALL},outliers=0.25)",
        f"gear-l(4,{SMALL})",
        f"adakv+gear(2,{SMALL},outliers=0.25)",
        f"snapkv+gear(2,{SMALL},outliers=0.0625)",
    ],  # fmt: skip
)
def test_conforms(method):
    skipped = {check.name for check in check_method(method) if check.outcome != "passed"}
    assert skipped == {
        "full_budget_equals_full_cache",  # corrected codes are near the numbers, not the numbers
        "equals_masked_full_attention",  # its oracle reads the exact numbers
        "forgotten_tokens_are_gone",  # its oracle too
    }


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, message",
    [
        ("gear(3)", "bits=3 cannot be packed"),
        ("gear(2,group=24)", "a group of 24 tokens cannot be packed"),
        ("gear(2,residual=0)", "residual=0 is no multiple of group=64; use 64"),
        ("gear(2,prompt_rank=17)", r"prompt_rank=17, rank=2: ranks lie in 0..16 \(residual=64, at most 16\)"),
        ("gear(2,rank=-1)", "prompt_rank=4, rank=-1: ranks lie in 0..16"),
        ("gear(2,outliers=0.6)", r"outliers=0.6: a share of entries lies in \[0, 0.5\]; the authors use 0.02"),
        ("gear(2,rounds=0)", "rounds=0: the power iteration needs at least 1"),
        ("gear-l(2,outliers=0.1)", "outliers=0.1: gear-l keeps none; use gear"),
    ],
)
def test_bad_settings_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(method)


def test_what_does_not_fit_the_model_is_refused(model_of):
    model = model_of("llama")
    with pytest.raises(ValueError, match="a group of 32 channels does not divide head_dim 16; use 16"):
        feed(model, MethodCache(model, "gear(2,channels=32)"), tiny.text_ids(3))
    cache = MethodCache(model, "gear(2)")
    with pytest.raises(ValueError, match="prompt_rank=4, rank=2: head_dim 2 is the largest rank"):
        cache.layers[0].lazy_initialization(torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
