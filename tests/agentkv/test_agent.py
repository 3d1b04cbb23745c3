"""The loop: what stops it, what the model is told, what a decision measures. No browser, a tiny random model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agentkv.agent import Agent, Limits, ScriptPolicy, kept_frames, run_episode
from agentkv.envs.actions import CallUser, Click, Finished, Several, Type
from agentkv.grammars import ParseError
from agentkv.grammars.base import Reading
from agentkv.models.base import ADDRESS
from tests.agentkv.fake_episodes import FakeEnv, FakePolicy, tiny_adapter

BAD = ParseError("no action was found")


def play(env=None, policy=None, **options):
    steps = []
    result = run_episode(env or FakeEnv(), policy or FakePolicy(), 7, on_step=steps.append, **options)
    return result, steps


def test_done_when_the_page_says_so():
    result, steps = play(FakeEnv(needed=2))
    assert (result.stop, result.success, result.reward, result.steps) == ("done", True, 1.0, 3)
    assert [s.reward for s in steps] == [0.0, 0.0, 1.0]
    assert steps[1].screenshot[0, 0, 0] == 1, "a step keeps the picture that it was decided on"


@pytest.mark.parametrize("last", [Finished("42"), CallUser()], ids=["finished", "call_user"])
def test_done_when_the_agent_says_so(last):
    result, _ = play(FakeEnv(needed=9), FakePolicy([Click(1, 1), last]))
    assert (result.stop, result.success, result.steps) == ("done", False, 2)


def test_step_limit_of_the_loop_and_of_the_environment():
    assert play(FakeEnv(needed=99), limits=Limits(max_steps=4))[0].steps == 4
    result, _ = play(FakeEnv(needed=99, max_steps=3))
    assert (result.stop, result.steps) == ("step limit", 3)


def test_three_parse_failures_in_all():
    result, steps = play(FakeEnv(needed=9), FakePolicy([BAD, Click(1, 1), BAD, Click(2, 2), BAD, Click(3, 3)]))
    assert (result.stop, result.steps) == ("parse failures", 5)
    assert [s.error for s in steps] == [BAD.reason, "", BAD.reason, "", BAD.reason]


def test_an_unreadable_answer_costs_a_step_and_its_error_is_in_the_next_prompt():
    policy = FakePolicy([BAD])
    result, steps = play(FakeEnv(needed=1), policy)
    assert result.success and result.steps == 3
    assert steps[0].url == "" and np.array_equal(steps[0].screenshot, steps[1].screenshot), "the page was not touched"
    assert policy.prompts[1][1][0][1] == "Action: click\n[no action was found]"


def test_an_error_of_the_page_is_in_the_next_prompt():
    policy = FakePolicy()
    play(FakeEnv(error="(900, 1) is outside the screen"), policy)
    assert policy.prompts[1][1][0][1].endswith("[(900, 1) is outside the screen]")


def test_the_same_action_on_an_unchanged_screen_three_times():
    result, _ = play(FakeEnv(needed=99, frozen=True))
    assert (result.stop, result.steps) == ("repeated action", 3)
    assert play(FakeEnv(needed=99), limits=Limits(max_steps=6))[0].stop == "step limit", "the screen changed"
    others = [Click(float(i), 1.0) for i in range(6)]
    assert play(FakeEnv(needed=99, frozen=True), FakePolicy(others), limits=Limits(max_steps=6))[0].stop == "step limit"


@pytest.mark.parametrize("history", [1, 2, 5])
def test_history_counts_the_screenshots_of_a_prompt_with_the_current_one(history):
    policy = FakePolicy()
    _, steps = play(FakeEnv(needed=6), policy, history=history)
    for index, (goal, past) in enumerate(policy.prompts):
        shown = [image is not None for image, _ in past]
        assert goal == "click it" and len(past) == index, "older steps stay as text"
        assert shown == [i >= index - (history - 1) for i in range(index)]
    assert steps[-1].frame_steps == tuple(range(6 - min(history, 7) + 1, 7))


def test_a_screenshot_knows_the_address_of_its_page():
    env, policy = FakeEnv(needed=3), FakePolicy([Click(1, 1), BAD])
    env.reset = lambda seed: (FakeEnv.reset(env, seed=seed)[0], {"url": "file:///start"})
    play(env, policy)
    shown = [image.info[ADDRESS] for image, _ in policy.prompts[-1][1]]
    assert shown == ["file:///start", "file:///a", "file:///a", "file:///a"]


def test_a_script_that_ends_says_finished():
    policy = ScriptPolicy(lambda env: [Type("a")])
    result, steps = play(FakeEnv(needed=9), policy)
    assert [s.decision.action for s in steps] == [Type("a"), Finished()] and result.stop == "done"


@pytest.mark.parametrize("name", ["max_steps", "parse_failures", "repeats"])
def test_limits_name_what_is_wrong(name):
    with pytest.raises(ValueError, match=f"{name}=0 stops before the first step; use 1 or more"):
        Limits(**{name: 0})
    with pytest.raises(ValueError, match="history=0 would hide the current screenshot"):
        play(history=0)


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 29), max_size=30), min_size=1, max_size=4),
    st.sampled_from([[(2, 8, 2, 3)], [(0, 4, 1, 4), (10, 22, 4, 3)]]),
    st.sampled_from([1, 2]),
)
def test_kept_frames_counts_layers_and_heads(kept, boxes, merge):
    layers = [torch.tensor([[sorted(held) + [-1] * (30 - len(held))]]) for held in kept]
    frames = kept_frames(layers, [b[:2] for b in boxes], [(1, b[2] * merge, b[3] * merge) for b in boxes])
    for frame, (start, _, rows, cols) in zip(frames, boxes, strict=True):
        for i, share in enumerate(frame.share.ravel()):
            assert share == pytest.approx(sum(start + i in held for held in kept) / len(kept))
        assert frame.share.shape == (rows, cols)


def test_kept_frames_refuses_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match=r"span \[0, 5\) has 5 tokens, its grid 4 x 6 does not fit"):
        kept_frames([torch.zeros(1, 1, 1, dtype=torch.int32)], [(0, 5)], [(1, 4, 6)])


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


def test_a_decision_with_the_full_cache_is_what_the_model_says(adapter):
    image = Image.new("RGB", (4, 3))
    plain = adapter.model.generate(**adapter.prompt("", [], image, (4, 3)).inputs, max_new_tokens=6, do_sample=False)
    decision = Agent(adapter, "full", 1.0, max_new_tokens=6).decide("goal", [], image, (4, 3))
    assert decision.text == " ".join(map(str, plain[0, 40:].tolist()))
    assert (decision.prompt_tokens, decision.decode_tokens, decision.action) == (40, 6, Click(1.0, 2.0))
    # 2 layers x (K and V) x 2 KV heads x 8 numbers x 4 bytes
    assert decision.kv_bytes_full == 40 * 2 * 2 * 2 * 8 * 4 and decision.kv_bytes >= decision.kv_bytes_full
    assert decision.tokens_stored == 40 and (decision.frames[0].share == 1).all()


def test_a_decision_with_a_method_holds_less(adapter):
    decision = Agent(adapter, "snapkv", 0.5, max_new_tokens=6).decide("goal", [], Image.new("RGB", (4, 3)), (4, 3))
    assert decision.tokens_stored == 20 and decision.kv_bytes < 0.6 * decision.kv_bytes_full
    assert decision.kv_bytes <= decision.kv_bytes_peak
    assert 0 < decision.frames[0].share.mean() < 1 and decision.spans == ((5, 17),)
    assert decision.seconds_prefill > 0 and decision.seconds_decode > 0


def test_an_agent_checks_its_settings(adapter):
    with pytest.raises(ValueError, match="max_new_tokens=0 leaves no room for an answer; use 64"):
        Agent(adapter, "full", 1.0, max_new_tokens=0)


class Cut:
    """The tiny adapter with a reader that finds nothing until it is told otherwise."""

    def __init__(self, adapter, found):
        self.adapter, self.found = adapter, found

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def read(self, text, frame):
        return self.found


def test_an_answer_that_was_cut_says_so(adapter):
    image, whole = Image.new("RGB", (4, 3)), Reading((Click(1.0, 2.0),), left_out="a later call was left out")
    cut = Agent(Cut(adapter, ParseError("no call")), "full", 1.0, max_new_tokens=3).decide("goal", [], image, (4, 3))
    assert cut.action == ParseError("the answer was cut after 3 tokens", len(cut.text))
    begun = Agent(Cut(adapter, whole), "full", 1.0, max_new_tokens=3).decide("goal", [], image, (4, 3))
    assert begun.action == Click(1.0, 2.0)
    assert begun.left_out == "the answer was cut after 3 tokens; a later call was left out"


def test_answers_are_as_long_as_the_familys(adapter):
    assert Agent(adapter, "full", 1.0).max_new_tokens == adapter.answer_tokens == 64


class Leaving(FakePolicy):
    """A policy whose answers say more than is done."""

    def decide(self, *given):
        return replace(super().decide(*given), left_out="the second was left out")


def test_what_was_left_out_stands_in_the_next_prompt():
    policy = Leaving()
    play(FakeEnv(needed=1), policy)
    assert policy.prompts[1][1][0][1] == "Action: click\n[the second was left out]"


def test_an_end_that_was_not_reached_is_none():
    stuck = Several((Click(900.0, 1.0), Finished()))
    _, steps = play(FakeEnv(needed=2, error="gesture 1 of 2: outside"), FakePolicy([stuck]))
    assert len(steps) == 3
    result, steps = play(FakeEnv(needed=9), FakePolicy([Several((Click(1.0, 1.0), Finished()))]))
    assert result.stop == "done" and len(steps) == 1


def test_what_happened_while_the_page_was_loaded_is_told_with_the_first_step():
    env, policy = FakeEnv(needed=1), FakePolicy()
    env.reset = lambda seed: (
        FakeEnv.reset(env, seed=seed)[0],
        {"told": ["a dialog was closed"], "dialogs": ["alert: a"]},
    )
    _, steps = play(env, policy)
    assert [step.told for step in steps] == [("a dialog was closed",), ()] and steps[0].dialogs == ("alert: a",)
    assert policy.prompts[1][1][0][1] == "Action: click\n[a dialog was closed]"
