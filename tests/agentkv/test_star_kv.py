"""STaR-KV: the worked cases of its specification, what cannot act, and what a trajectory teaches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from agentkv.gui_kv import GuiKV
from agentkv.positional import bins_for, cells, guessed_grid, mutual_information, weights
from agentkv.star_kv import GAIN, PATTERN, STEPS, Learned, StarKV, StarKVOfficial
from tests.agentkv.screen_cases import GRIDS, SPANS, kept, random_case
from tests.textkv import tiny
from textkv import Budget, MethodCache, resolve_method
from textkv.eviction import PROTECTED

LOOKS = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])
FRAMES = [(0, 2), (2, 4)]


def information(values: torch.Tensor, grid: tuple[int, int], bins: int = 12) -> float:
    cell = cells(torch.arange(values.numel()), grid, bins)
    return float(mutual_information(values.flatten()[None], cell, bins * bins)[0])


class TestInformation:
    def test_worked_cases(self):
        ramp = torch.arange(576.0).view(24, 24)
        assert information(ramp, (24, 24)) == pytest.approx(2.310491, abs=1e-6)
        assert information(ramp.T, (24, 24)) == pytest.approx(2.310491, abs=1e-6)
        rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        blob = torch.exp(-((rows - 8) ** 2 + (columns - 6) ** 2) / 18)
        assert information(blob, (24, 24)) == pytest.approx(2.079901, abs=1e-6)
        assert information(torch.arange(1161.0), guessed_grid(1161)) == pytest.approx(2.243586, abs=1e-6)

    @pytest.mark.parametrize("tokens", [16, 144])
    def test_small_screens_tell_the_same_whatever_is_seen(self, tokens):
        shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).float()
        for values in (torch.arange(float(tokens)), shuffled):
            assert information(values, guessed_grid(tokens)) == pytest.approx(math.log(16), abs=1e-6)
        assert bins_for(tokens) ** 2 * 9 <= tokens and bins_for(5) == 1 and bins_for(10_000) == 12

    def test_only_the_order_counts_and_nothing_seen_tells_nothing(self):
        values = torch.rand(200, generator=torch.Generator().manual_seed(1))
        assert information(values, (10, 20)) == information(values**3 * 7, (10, 20))
        assert information(torch.zeros(200), (10, 20)) == 0.0
        assert information(values[:1], (1, 1), 1) == 0.0

    def test_guessed_grids(self):
        assert guessed_grid(1161) == (34, 35) and guessed_grid(1196) == (35, 35) and guessed_grid(1) == (1, 1)

    def test_weights(self):
        assert torch.allclose(weights(torch.tensor([1.0, 0.0]), 1.0), torch.tensor([0.731059, 0.268941]), atol=1e-6)
        assert torch.allclose(weights(torch.tensor([2.0, 2.0]), 1.0), torch.tensor([0.5, 0.5]))


class TestWeighing:
    """Two KV heads, four tokens, two frames; information (1, 0), strength 1/2, decay 0.1."""

    def scores(self, stable):
        learned = Learned(0.5, weights(torch.tensor([1.0, 0.0]), 1.0), torch.tensor(stable))
        return StarKV().weighed(LOOKS, 2, torch.arange(4, dtype=torch.int32), FRAMES, learned)

    def test_first_step(self):
        scores = self.scores([1.0, 1.0])
        assert torch.allclose(scores, torch.tensor([0.334172, 0.139153, 0.184659, 0.246212]), atol=1e-6)
        assert scores.argsort(descending=True).tolist() == [0, 3, 2, 1]

    def test_a_head_whose_pattern_moves_forgets_more_slowly(self):
        base = torch.tensor([0.3, 0.2]) * torch.tensor([1.231059, 0.768941])
        expected = base * torch.tensor([0.910530, 0.904837])
        assert torch.allclose(self.scores([0.937281, 1.0])[:2], expected, atol=1e-6)

    @pytest.mark.parametrize(("step", "strength"), [(1, 0), (5, 0), (6, 0.05), (10, 0.25), (15, 0.5), (40, 0.5)])
    def test_the_strength_grows(self, step, strength):
        assert StarKV().strength_at(step) == pytest.approx(strength)

    def test_without_history_or_pictures_age_is_nothing(self):
        learned = Learned(0.0, torch.full((2,), 0.5), torch.ones(2))
        for spans in ([], [(0, 4)]):
            found = StarKV().weighed(LOOKS, 2, torch.arange(4, dtype=torch.int32), spans, learned)
            assert torch.allclose(found, LOOKS.mean(0))


def learned_steps(method, *cases):
    layer = cases[0][0]
    for other, _, seen in cases:
        layer.stored, layer.held_positions = other.stored, other.held_positions
        method.learn(layer, seen)
    return layer


class TestTrajectory:
    def test_a_pattern_is_the_mean_of_its_steps(self):
        method = StarKV(window=4, alpha=0.0, budget=Budget(0.4))
        first, second = (learned_steps(method, random_case(seed)) for seed in (1, 2))
        both = learned_steps(method, random_case(1), random_case(2))
        assert both.trajectory[STEPS].tolist() == [2.0]
        for name in (PATTERN, GAIN):
            mean = 0.9 * first.trajectory[name] + 0.1 * second.trajectory[name]
            assert torch.allclose(both.trajectory[name], mean, atol=1e-6)

    def test_worked_case_of_stability(self):
        method, (layer, _, _) = StarKV(), random_case()
        for looks in (torch.tensor([[0.6, 0.4], [0.5, 0.5]]), torch.tensor([[0.2, 0.3], [0.1, 0.1]])):
            method._step(layer, 0, looks, torch.arange(2), (0, 2), (1, 2))
        assert torch.allclose(method._learned(layer, 0).stable, torch.tensor([0.937281, 1.0]), atol=1e-6)

    def test_another_size_begins_the_pattern_anew(self):
        method = StarKV(window=4, budget=Budget(0.4))
        small = random_case(2, spans=[(40, 52)], grids=[(3, 4)])
        layer = learned_steps(method, random_case(1), small)
        assert layer.trajectory[STEPS].tolist() == [2.0]
        assert torch.allclose(method._learned(layer, 0).stable, torch.ones(2))

    def test_a_block_without_a_screenshot_is_no_step(self):
        method, (layer, _, seen) = StarKV(window=4, budget=Budget(0.4)), random_case()
        method.learn(layer, replace(seen, spans=[[]], grids=[[]]))
        late = replace(seen, norms=seen.norms[:, 57:], norm_positions=seen.norm_positions[:, 57:])
        method.learn(layer, late)
        assert layer.trajectory == {}

    def test_heads_are_weighed_only_after_the_first_steps(self):
        method = StarKV(window=4, budget=Budget(0.4))
        layer, _, seen = random_case(n=110, spans=[(4, 20), (40, 104)], grids=[(4, 4), (8, 8)])
        plain = method.scores(layer, seen)
        for _ in range(5):
            method.learn(layer, seen)
        assert torch.allclose(method.scores(layer, seen), plain)
        method.learn(layer, seen)
        assert not torch.allclose(method.scores(layer, seen), plain)

    def test_rows_have_states_of_their_own(self):
        method = StarKV(window=4, budget=Budget(0.4))
        alone = [learned_steps(method, random_case(seed)) for seed in (1, 2)]
        layer, _, _ = random_case()
        layer.real_seen = torch.zeros(2)
        for row, seed in enumerate((1, 2)):
            other, _, seen = random_case(seed)
            attention, positions = method._attention(other.stored(), seen, 0, 24)
            here = (positions >= 40) & (positions < 56)
            looks = method._groups(attention, 2)[:, here]
            method._step(layer, row, looks, positions[here] - 40, SPANS[-1], GRIDS[-1])
        for row in range(2):
            assert torch.allclose(layer.trajectory[GAIN][row], alone[row].trajectory[GAIN][0])
            assert torch.allclose(layer.trajectory[PATTERN][row], alone[row].trajectory[PATTERN][0])

    def test_as_released_nothing_is_remembered(self):
        method = StarKVOfficial(window=4, budget=Budget(0.4))
        assert learned_steps(method, random_case(1), random_case(2)).trajectory == {}


def test_a_temperature_of_the_layer_changes_no_choice():
    g = torch.Generator().manual_seed(0)
    for _ in range(1000):
        scores = torch.rand(40, generator=g)
        t = 0.5 + 1.5 * float(torch.rand(1, generator=g))
        assert scores.argsort().tolist() == (scores ** (1 / t)).argsort().tolist()
    for seed in range(10):
        layer, _, seen = random_case(seed)
        off, on = (StarKV(window=4, aeb=aeb, budget=Budget(0.4)).scores(layer, seen)[0, 0] for aeb in ("off", "layer"))
        assert not torch.allclose(off[:50], on[:50]) and kept(off, 24) == kept(on, 24)


def test_a_temperature_of_each_head_can_change_the_choice():
    changed = 0
    for seed in range(10):
        layer, _, seen = random_case(seed)
        off, on = (
            StarKV(window=4, aeb=aeb, budget=Budget(0.4)).scores(layer, seen)[0, 0] for aeb in ("off", "per_head")
        )
        changed += kept(off, 24) != kept(on, 24)
    assert changed


def test_temperature_goes_by_entropy():
    method = StarKV(coldest=0.5, warmest=1.5)
    even, one = torch.full((64,), 0.1), torch.zeros(64)
    one[3] = 1.0
    assert float(method.temperature(even)) == pytest.approx(1.5, abs=1e-4)
    assert float(method.temperature(one)) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("spans", [[], [(40, 56)]])
def test_with_one_screenshot_it_is_ungated_gui_kv_with_one_choice_per_layer(spans):
    layer, stored, seen = random_case()
    seen = replace(seen, spans=[spans], grids=[GRIDS[: len(spans)]])
    star = StarKV(window=4, strength=0.0, budget=Budget(0.4)).scores(layer, seen)
    gui = GuiKV(window=4, gate=False, budget=Budget(0.4)).score(layer, stored, seen, 24)
    assert torch.allclose(star[..., :56], gui.mean(1, keepdim=True)[..., :56].expand(1, 2, 56), atol=1e-6)
    assert bool((star[..., 56:] == PROTECTED).all())


def test_heads_that_hold_different_tokens_share_one_score_for_each():
    layer, stored, seen = random_case()
    whole = StarKV(window=4, budget=Budget(0.4)).scores(layer, seen)
    holes = stored.positions.clone()
    holes[0, 1, 5:9] = -1
    other = type(stored)(stored.keys, stored.values, holes)
    layer.stored, layer.held_positions = (lambda: other), (lambda: holes)
    scores = StarKV(window=4, budget=Budget(0.4)).scores(layer, seen)
    assert bool((scores[0, 1, 5:9] == -torch.inf).all())
    assert torch.equal(scores[0, 0, 9:], scores[0, 1, 9:])
    # What one head no longer holds counts half, beside what the other makes of it.
    assert bool((scores[0, 0, 5:9] < whole[0, 0, 5:9]).all())


@torch.no_grad()
def test_a_row_may_begin_in_a_later_block():
    """Until then it holds nothing, and its neighbour is cut all the same."""
    model, ids, seen = tiny.build("llama"), tiny.text_ids(50, batch=2), torch.ones(2, 50).long()
    seen[1, :33] = 0
    cache, one = MethodCache(model, "star-kv", "12t"), MethodCache(model, "star-kv", "12t")
    for part, cut in zip(ids.split((30, 20), 1), (30, 50), strict=True):
        at = (seen[:, :cut].cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
        model(part, attention_mask=seen[:, :cut], position_ids=at, past_key_values=cache)
    model(ids[1:, 33:], past_key_values=one)
    for layer, alone in zip(cache.layers, one.layers, strict=True):
        held = layer.stored().positions[1, 0]
        assert held[held >= 0].tolist() == alone.stored().positions[0, 0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"window": 0}, "window=0"), ({"tau": 0.0}, "tau=0.0"), ({"grid": "square"}, "use one of true, guessed"),
     ({"strength": 1.5}, "strength=1.5"), ({"decay": -1.0}, "decay=-1.0"), ({"bins": 0}, "bins=0"),
     ({"coldest": 0.0}, "temperatures are positive"), ({"aeb": "on"}, "use one of off, layer, per_head")],
)  # fmt: skip
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        StarKV(**change)


def test_presets():
    official = resolve_method("star-kv-official", 0.2)
    assert (official.grid, official.bins, official.aeb, official.past) == ("guessed", 12, "layer", 2)
    assert not official.needs().grids and resolve_method("star-kv", 0.2).needs().grids
