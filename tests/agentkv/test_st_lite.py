"""ST-Lite: the worked cases of its specification, its gate, and what a later turn compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentkv.frames import saliency, singularity, smoothed
from agentkv.st_lite import PLACE, STLite, STLiteOfficial, alike
from tests.agentkv.screen_cases import GRIDS, SPANS, evidence, held, kept, layer_of, random_case
from textkv import Budget, resolve_method
from textkv.eviction import NEVER
from textkv.methods.snapkv import SnapKV
from textkv.screens import ScreenStates

RIGHT, UP = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


class TestSingularity:
    def test_one_of_another_kind(self):
        states = RIGHT.repeat(9, 1)
        states[4] = UP
        c, e = 1 / 3, 1 / 5
        assert torch.allclose(singularity(states, (3, 3)), torch.tensor([c, e, c, e, 1, e, c, e, c]), atol=1e-6)

    def test_two_rows(self):
        states = torch.stack([RIGHT, RIGHT, RIGHT + UP, UP, UP, UP])
        expected = [0.666667, 0.658579, 0.292893, 0.666667, 0.458579, 0.430964]
        assert torch.allclose(singularity(states, (2, 3)), torch.tensor(expected), atol=1e-6)

    def test_length_does_not_matter_and_a_single_token_stands_out_of_nothing(self):
        states = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        longer = states * torch.arange(1.0, 13.0)[:, None]
        assert torch.allclose(singularity(states, (3, 4)), singularity(longer, (3, 4)), atol=1e-6)
        assert singularity(states[:1], (1, 1)).tolist() == [0.0]
        assert singularity(RIGHT.repeat(3, 1), (1, 3)).tolist() == [0.0, 0.0, 0.0]


class TestAlike:
    HISTORY = torch.tensor([[2.0, 0], [1, 1], [-1, 0], [3, 4], [0, -2]])

    def test_worked_case(self):
        found = alike(self.HISTORY, torch.stack([RIGHT, UP]))
        assert torch.allclose(found, torch.tensor([1, 0.70711, 0, 0.8, 0]), atol=1e-5)

    def test_neither_length_nor_order_matters_and_a_zero_vector_is_like_nothing(self):
        g = torch.Generator().manual_seed(0)
        history, now = torch.randn(7, 4, generator=g), torch.randn(9, 4, generator=g)
        turned = now[torch.randperm(9, generator=g)] * 3
        assert torch.allclose(alike(history * 5, turned), alike(history, now), atol=2e-5)
        assert alike(torch.zeros(1, 4), now).tolist() == [0.0]


class TestOfficialSaliency:
    def test_no_square(self):
        norms = torch.tensor([5.0, 1, 1])
        expected = torch.tensor([0.738638, 0.130681, 0.130681])
        assert torch.equal(smoothed(norms), norms)
        assert torch.allclose(saliency(norms, 1.0), expected, atol=1e-6)

    def test_a_square_is_smoothed(self):
        norms = torch.tensor([5.0, 1, 1, 2])
        assert torch.allclose(smoothed(norms), norms + 1)
        expected = torch.tensor([0.691221, 0.083544, 0.083544, 0.141691])
        assert torch.allclose(saliency(smoothed(norms), 1.0), expected, atol=1e-6)


def worked_gate(share: float) -> list[int]:
    """The worked case of likeness as history at 2..7, the current frame at 8..10, in a prompt of 20."""
    states = torch.zeros(1, 20, 2)
    states[0, 2:7], states[0, 8:10] = TestAlike.HISTORY, torch.stack([RIGHT, UP])
    stored = held(torch.zeros(1, 1, 20, 4))
    seen = evidence(torch.zeros(1, 1, 2, 4), states, [(2, 7), (8, 10)], [(1, 5), (1, 2)])
    method = STLite(window=2, budget=Budget(1.0))
    return method._gated(layer_of(stored), seen, 0, stored.positions[0], round(share * 20)).tolist()


@pytest.mark.parametrize(("share", "gone"), [(0.4, [0, 3, 1]), (0.6, [0, 3])])
def test_the_gate_takes_what_is_most_like_the_current_screen(share, gone):
    assert worked_gate(share) == [2 + x for x in gone]


def test_of_equal_copies_the_oldest_goes_first():
    states = torch.randn(1, 60, 24, generator=torch.Generator().manual_seed(0))
    for start, end in SPANS[:-1]:
        states[0, start:end] = states[0, 40:56]
    stored = held(torch.randn(1, 2, 60, 16))
    seen = evidence(torch.randn(1, 4, 4, 16), states, SPANS, GRIDS)
    gone = STLite(window=4)._gated(layer_of(stored), seen, 0, stored.positions[0], 30)
    assert sorted(gone.tolist()) == list(range(4, 20))


@pytest.mark.parametrize("method", [STLite, STLiteOfficial])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5])
def test_exactly_so_many_history_tokens_are_gated(method, share):
    layer, _, seen = random_case()
    one = method(window=4, budget=Budget(share))
    count = one.budget.count(60)
    scores = one.scores(layer, seen)[0]
    history = [*range(4, 20), *range(22, 38)]
    for head in scores:
        gone = (head == NEVER).nonzero()[:, 0].tolist()
        assert len(gone) == 32 - -(-count * 32 // 60) and set(gone) <= set(history)
        assert not set(kept(head, count)) & set(gone)
    assert torch.equal(scores[0] == NEVER, scores[1] == NEVER)


def test_without_pictures_it_is_snapkv_and_with_one_there_is_no_gate():
    layer, stored, seen = random_case()
    snap = SnapKV(window=4, budget=Budget(0.4)).score(layer, stored, seen, 24)
    none = replace(
        seen, spans=[[]], grids=[[]], states=ScreenStates(seen.states.states[:, :0], seen.states.positions[:, :0])
    )
    for method in (STLite(window=4, budget=Budget(0.4)), STLiteOfficial(window=4, budget=Budget(0.4))):
        assert torch.allclose(method.scores(layer, none), snap, atol=1e-6)
        one = method.scores(layer, replace(seen, spans=[SPANS[-1:]], grids=[GRIDS[-1:]]))
        added = (one - snap)[0, :, :56]
        assert torch.allclose(added[:, :40], torch.zeros(2, 40), atol=1e-6)
        assert torch.allclose(added[:, 40:56].sum(1), torch.full((2,), method.alpha), atol=1e-4)


def test_the_printed_formula_and_frames_that_get_it():
    layer, stored, seen = random_case()
    snap = SnapKV(window=4, budget=Budget(0.4)).score(layer, stored, seen, 24)
    printed = STLite(window=4, alpha=None, frames="all", gate=False, budget=Budget(0.4)).scores(layer, seen) - snap
    for span, grid in zip(SPANS, GRIDS, strict=True):
        expected = singularity(seen.states.row(0).states[0, (SPANS.index(span)) * 16 :][:16], grid)
        assert torch.allclose(printed[0, 0, span[0] : span[1]], expected, atol=1e-5)


def test_a_frame_without_contrast_is_favoured_evenly():
    states = torch.ones(1, 60, 24)
    stored = held(torch.randn(1, 2, 60, 16))
    seen = evidence(torch.randn(1, 4, 4, 16), states, SPANS, GRIDS)
    share = STLite(window=4)._bonus(seen, 0, SPANS[-1], GRIDS[-1])
    assert torch.allclose(share, torch.full((16,), 2 / 16)) and stored.keys.shape[2] == 60


def test_a_later_screenshot_is_compared_with_projections_of_what_is_left():
    method, (layer, stored, seen) = STLite(window=4, budget=Budget(0.5)), random_case()
    early = replace(
        seen, spans=[SPANS[:2]], grids=[GRIDS[:2]],
        states=ScreenStates(seen.states.states[:, :32], seen.states.positions[:, :32]),
        norms=seen.norms[:, :38], norm_positions=seen.norm_positions[:, :38],
    )  # fmt: skip
    method.learn(layer, early)
    assert layer.statistics[PLACE].tolist() == [[*range(4, 20), *range(22, 38)]]
    method.on_evict(layer, torch.tensor([[[4, 5, 30, -1], [4, 6, 30, 31]]], dtype=torch.int32))
    assert layer.statistics[PLACE].tolist() == [[4, 5, 6, 30, 31]]
    states = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(5))
    states[0, 3] = 2 * seen.states.states[0, 16 + 8]  # the token at 30 comes again
    at = torch.arange(38, 60, dtype=torch.int32)[None]
    late = replace(
        seen, states=ScreenStates(states, torch.arange(40, 56, dtype=torch.int32)[None]), norms=seen.norms[:, 38:],
        norm_positions=at,
    )  # fmt: skip
    method.learn(layer, late)
    gone = method._gated(layer, late, 0, stored.positions[0], 6)
    # 6 of 60 tokens: of 32 that history had, 4 may stay; 5 are there.
    assert gone.tolist() == [30]


def test_what_was_taken_back_is_not_compared_with():
    method, (layer, _, seen) = STLite(window=4, budget=Budget(0.5)), random_case()
    method.learn(layer, seen)
    again = replace(seen, norm_positions=seen.norm_positions[:, 30:], norms=seen.norms[:, 30:],
                    states=ScreenStates(seen.states.states[:, 40:], seen.states.positions[:, 40:]))  # fmt: skip
    method.learn(layer, again)
    assert layer.statistics[PLACE].tolist() == [[*range(4, 20), *range(22, 30), *range(48, 56)]]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"window": 0}, "window=0"), ({"kernel": 2}, "odd width"), ({"heads": "head0"}, "use one of kv_mean"),
     ({"frames": "first"}, "use one of current, all"), ({"sketch": -1}, "sketch=-1")],
)  # fmt: skip
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        STLite(**change)


def test_presets():
    official = resolve_method("st-lite-official", 0.2)
    assert (official.alpha, official.tau, official.past) == (1.0, 1.0, 2) and not official.needs().grids
    copies = resolve_method("st-lite-official(heads='per_query_head')", 0.2)
    assert copies.capabilities.stores_query_heads and not official.capabilities.stores_query_heads
    with pytest.raises(ValueError, match="no printed form"):
        STLiteOfficial(alpha=None)
