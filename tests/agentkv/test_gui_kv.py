"""GUI-KV: the worked case of its specification, its gate and counts, and how it degenerates to SnapKV."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from agentkv.frames import saliency
from agentkv.gui_kv import GuiKV, GuiKVOfficial, orthobasis
from textkv import Budget, resolve_method
from textkv.eviction import NEVER
from textkv.evidence import Evidence
from textkv.kernels import subspace_residual
from textkv.methods.snapkv import SnapKV
from textkv.segments.base import Stored

LAYER = SimpleNamespace(index=0)


def held(keys: torch.Tensor) -> Stored:
    batch, heads, n, _ = keys.shape
    return Stored(keys, torch.zeros_like(keys), torch.arange(n, dtype=torch.int32).expand(batch, heads, n))


def evidence(queries: torch.Tensor, norms: torch.Tensor, spans, scale=None) -> Evidence:
    batch, n = norms.shape
    positions = torch.arange(n, dtype=torch.int32).expand(batch, n)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return Evidence(queries, scale, torch.full((batch,), n), norms, positions, None, [spans] * batch)


def kept(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def random_case(seed=0, kv_heads=2, group=2, n=60, dim=16, spans=((4, 20), (22, 38), (40, 55)), window=4):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, kv_heads, n, dim, generator=g)
    queries = torch.randn(1, kv_heads * group, window, dim, generator=g)
    norms = torch.rand(1, n, generator=g) + 1
    return held(keys), evidence(queries, norms, list(spans))


class TestWorkedCase:
    """One head, S=10, D=2, w=2, C=6, kernel 1, alpha 1, tau 1, r=1, spans (1,4) and (5,8)."""

    def setup_method(self):
        keys = torch.zeros(1, 1, 10, 2)
        keys[0, 0, 1], keys[0, 0, 2], keys[0, 0, 3], keys[0, 0, 5] = (
            torch.tensor(x) for x in ([2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0])
        )
        queries = torch.zeros(1, 1, 2, 2)
        queries[0, 0, 1, 0] = math.sqrt(2) * math.log(2)
        norms = torch.ones(1, 10)
        norms[0, 5:8] = torch.tensor([1.0, 2.0, 3.0])
        self.held, self.evidence = held(keys), evidence(queries, norms, [(1, 4), (5, 8)])
        self.method = GuiKV(window=2, kernel=1, alpha=1.0, tau=1.0, rank=1, basis="qr_first", budget=Budget(0.6))

    def score(self, **changes):
        return replace(self.method, **changes).score(LAYER, self.held, self.evidence, 6)[0, 0]

    def test_window_scores(self):
        expected = [0.1778, 0.3778, 0.1778, 0.2444, 0.1778, 0.2444, 0.1778, 0.1778]
        assert torch.allclose(self.score(alpha=0.0, gate=False)[:8], torch.tensor(expected), atol=1e-4)

    def test_saliency(self):
        assert torch.allclose(
            saliency(torch.tensor([1.0, 2.0, 3.0]), 1.0), torch.tensor([0.09, 0.2447, 0.6652]), atol=1e-4
        )

    def test_residuals(self):
        basis = orthobasis(self.held.keys[0, :, 5:8], 1, "qr_first")
        residual = subspace_residual(self.held.keys[:, :, 1:4], basis[None]).sqrt()
        assert torch.allclose(residual[0, 0], torch.tensor([0.0, 1.0, 1.0]), atol=1e-6)

    def test_kept_with_and_without_the_gate(self):
        scores = self.score()
        assert (scores == NEVER).nonzero().tolist() == [[1]]
        assert kept(scores, 6) == [3, 5, 6, 7, 8, 9]
        assert kept(self.score(gate=False), 6) == [1, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("spans", [[], [(4, 20)]])
def test_without_bonus_and_history_it_is_snapkv(spans):
    stored, seen = random_case()
    seen = replace(seen, spans=[spans])
    gui = GuiKV(window=4, alpha=0.0, budget=Budget(0.4)).score(LAYER, stored, seen, 24)
    snap = SnapKV(window=4, budget=Budget(0.4)).score(LAYER, stored, seen, 24)
    assert torch.allclose(gui, snap, atol=1e-6)


def test_large_alpha_keeps_the_most_salient_tokens_of_the_frame():
    stored, seen = random_case(spans=((10, 50),))
    scores = GuiKV(window=4, alpha=1e6, budget=Budget(0.4)).score(LAYER, stored, seen, 24)
    best = (10 + seen.norms[0, 10:50].topk(20).indices).tolist()
    for head in scores[0]:
        assert kept(head, 24) == sorted(best + [56, 57, 58, 59])


def test_the_official_window_leaves_two_tokens_of_a_small_budget_to_the_past():
    stored, seen = random_case(kv_heads=4, group=1, window=8, spans=())
    seen = replace(seen, spans=[[]])
    for keep, widths in {1: (0, 0), 2: (1, 1), 3: (2, 1), 6: (5, 4), 9: (8, 7), 10: (8, 8)}.items():
        for method, width in zip((GuiKV(gate=False), GuiKVOfficial(gate=False)), widths, strict=True):
            scores = method.score(LAYER, stored, seen, keep)
            assert torch.isinf(scores).sum(-1).tolist() == [[width] * 4]
            alone = replace(seen, queries=seen.queries[:, :, 8 - width :])
            past = SnapKV(window=8).score(LAYER, stored, alone, 60)[..., : 60 - width]
            assert torch.allclose(scores[..., : 60 - width], past, atol=1e-6)


def test_saliency_does_not_see_scale_and_survives_one_token_and_equal_norms():
    norms = torch.rand(30) + 0.5
    assert torch.allclose(saliency(norms, 3.5), saliency(7 * norms, 3.5), atol=1e-6)
    assert saliency(torch.ones(1), 3.5).tolist() == [1.0]
    assert torch.allclose(saliency(torch.full((4,), 2.0), 3.5), torch.full((4,), 0.25))


def test_gate_takes_copies_first_and_orthogonal_keys_last():
    g = torch.Generator().manual_seed(1)
    keys = torch.zeros(1, 1, 30, 8)
    keys[0, 0, 16:26, :3] = torch.randn(10, 3, generator=g)  # the current frame spans the first three axes
    keys[0, 0, 2:6] = keys[0, 0, 16:20]  # copies of it
    keys[0, 0, 6:12, 5] = torch.arange(1.0, 7.0)  # orthogonal, growing
    stored = held(keys)
    gated = GuiKV(rank=3)._gated(stored, 0, [(2, 12), (16, 26)], share=0.6)
    assert gated[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5]
    basis = orthobasis(keys[0, :, 16:26], 3, "svd")
    residual = subspace_residual(keys[:, :, 6:12], basis[None]).sqrt()
    assert torch.allclose(residual[0, 0], torch.arange(1.0, 7.0), atol=1e-4)


@pytest.mark.parametrize("basis", ["svd", "qr_first", "qr_pivot"])
def test_closed_form_residual_is_the_explicit_one_whatever_the_signs(basis):
    g = torch.Generator().manual_seed(2)
    frame, keys = torch.randn(2, 20, 16, generator=g), torch.randn(2, 9, 16, generator=g)
    u = orthobasis(frame, 5, basis)
    turn = torch.linalg.qr(torch.randn(2, 5, 5, generator=g)).Q
    explicit = ((keys - keys @ u @ u.mT) ** 2).sum(-1)
    assert torch.allclose(subspace_residual(keys[None], u[None])[0], explicit, atol=1e-4)
    assert torch.allclose(subspace_residual(keys[None], (u @ turn)[None])[0], explicit, atol=1e-4)


def test_frame_order_matters_to_the_released_basis_only():
    g = torch.Generator().manual_seed(3)
    frame = torch.randn(1, 20, 8, generator=g)
    shuffled = frame[:, torch.randperm(20, generator=g)]

    def projector(keys, basis):
        u = orthobasis(keys, 3, basis)
        return u @ u.mT

    assert torch.allclose(projector(frame, "svd"), projector(shuffled, "svd"), atol=1e-5)
    assert not torch.allclose(projector(frame, "qr_first"), projector(shuffled, "qr_first"), atol=1e-2)


def test_gated_tokens_never_win_and_history_is_bounded():
    for seed in range(5):
        stored, seen = random_case(seed)
        method = GuiKV(window=4, budget=Budget(0.4))
        count = method.budget.count(60)
        scores = method.score(LAYER, stored, seen, count)[0]
        history = list(range(4, 20)) + list(range(22, 38))
        gated = int((1 - count / 60) * len(history))
        for head in scores:
            assert int((head == NEVER).sum()) == gated
            chosen = kept(head, count)
            assert len(set(chosen)) == count and {56, 57, 58, 59} <= set(chosen)
            assert not bool((head[chosen] == NEVER).any())
            assert len(set(chosen) & set(history)) <= len(history) - gated


def test_head_modes_agree_when_query_heads_of_a_group_are_equal():
    stored, seen = random_case(group=1)
    same = replace(seen, queries=seen.queries.repeat_interleave(2, 1))
    mean = GuiKV(window=4, heads="kv_mean").score(LAYER, stored, same, 24)
    first = GuiKV(window=4, heads="head0").score(LAYER, stored, same, 24)
    doubled = held(stored.keys.repeat_interleave(2, 1))
    each = GuiKV(window=4, heads="per_query_head").score(LAYER, doubled, same, 24)
    assert torch.allclose(mean, first, atol=1e-6)
    assert torch.allclose(mean.repeat_interleave(2, 1), each, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"window": 0}, "window=0"), ({"rank": 0}, "rank=0"), ({"kernel": 4}, "odd width"), ({"tau": 0.0}, "tau=0.0"),
     ({"basis": "pca"}, "use one of svd, qr_first, qr_pivot"), ({"heads": "all"}, "use one of kv_mean")],
)  # fmt: skip
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GuiKV(**change)


def test_registered_with_its_preset():
    assert isinstance(resolve_method("gui-kv", 0.4), GuiKV)
    official = resolve_method("gui-kv-official", 0.4)
    assert isinstance(official, GuiKVOfficial) and official.basis == "qr_first"
    assert official.capabilities.stores_query_heads and not resolve_method("gui-kv").capabilities.stores_query_heads
