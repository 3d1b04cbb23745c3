"""The environment's contract, and every curated task: the same for the same seed, solved by its script."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from agentkv import envs
from agentkv.envs import miniwob, oracle
from agentkv.envs.actions import CallUser, Click, Finished, Hotkey, Type, Wait
from agentkv.envs.browser import Browser
from agentkv.envs.scripted.look import Look
from agentkv.envs.sites import SITES
from agentkv.envs.spaces import MAX_GOAL, ActionSpace, GoalSpace
from agentkv.envs.web import WebEnv
from tests.envs.conftest import SEEDS


@pytest.fixture
def make(browser: Browser) -> Iterator[object]:
    opened: list[WebEnv] = []

    def one(task_id: str, **options: object) -> WebEnv:
        opened.append(envs.make(task_id, browser, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield one
    for env in opened:
        env.close()


@pytest.mark.browser
@pytest.mark.parametrize("task_id", envs.task_ids())
def test_same_seed_same_screen_and_solved_by_its_script(make, task_id: str) -> None:
    env = make(task_id)
    first, _ = env.reset(seed=0)
    second, info = env.reset(seed=0)
    assert first["goal"] == second["goal"] != ""
    assert (first["screenshot"] == second["screenshot"]).all()
    assert first["screenshot"].std() > 5, "the screen is empty"
    assert info["raw_reward"] == 0 and not info["success"] and info["blocked"] == []
    assert any(element["points"] for element in oracle.describe(env))
    for seed in range(SEEDS):
        reward, steps = oracle.run(env, seed)
        assert reward == 1 and 0 < steps <= env.max_steps
        assert env.over


@pytest.mark.browser
def test_seeds_differ(make) -> None:
    env = make("memory-colour")
    seen = {env.reset(seed=seed)[0]["screenshot"].tobytes() for seed in range(6)}
    assert len(seen) > 1
    stream = [env.reset(seed=3 if n == 0 else None)[1]["seed"] for n in range(3)]
    env.reset(seed=3)
    assert stream[0] == 3 and len(set(stream)) == 3
    assert [env.reset()[1]["seed"] for _ in range(2)] == stream[1:]


WRONG = {
    "click-test-2": "#subbtn2",
    "click-dialog-2": ".ui-dialog button",
    "click-color": "#area .color",
    "click-tab": "#area ul a",
    "grid-coordinate": "circle",
    "enter-text": "#subbtn",
    "memory-changed": None,
}


@pytest.mark.browser
@pytest.mark.parametrize("task_id", WRONG)
def test_a_wrong_click_is_worth_nothing(make, task_id: str) -> None:
    env = make(task_id)
    env.reset(seed=1)
    *first, right = list(_actions(env)) if task_id != "enter-text" else [None]
    env.reset(seed=1)
    for action in first:
        env.step(action)
    look = Look(env.tab, env.goal)
    wrong = next(element for element in look.visible(WRONG[task_id] or "svg") if look.click(element) != right)
    _, reward, terminated, truncated, info = env.step(look.click(wrong))
    assert terminated and not truncated
    assert reward == info["raw_reward"] <= 0 and not info["success"]


def _actions(env: WebEnv) -> Iterator[object]:
    for action in oracle.solve(env):
        env.step(action)
        yield action


@pytest.mark.browser
def test_doing_nothing_is_truncated(make) -> None:
    env = make("click-test", max_steps=2)
    env.reset(seed=0)
    assert env.step(Wait(0))[1:4] == (0.0, False, False)
    *_, truncated, info = env.step(Wait(0))
    assert truncated and info["raw_reward"] == 0 and info["steps"] == 2
    with pytest.raises(RuntimeError, match="the episode is over"):
        env.step(Wait(0))


@pytest.mark.browser
def test_finishing_too_early_and_calling_the_user(make) -> None:
    env = make("memory-code")
    for action, reason in ((Finished("done"), "finished before"), (CallUser(), "called the user")):
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(action)
        assert terminated and reward == 0 and not info["success"] and reason in info["reason"]


@pytest.mark.browser
def test_the_time_limit_is_lifted_and_the_cover_never_shows(make) -> None:
    env = make("click-test")
    env.reset(seed=0)
    assert env.page.evaluate("() => core.EPISODE_MAX_TIME") == 1_000_000
    env.page.evaluate("() => core.endEpisode(-1, false, 'timed out')")
    *_, terminated, _, info = env.step(Wait(0))
    assert terminated and info["raw_reward"] == -1 and info["reason"] == "timed out"
    for name in ("sync-task-cover", "reward-display", "click-canvas"):
        assert env.page.evaluate("(id) => getComputedStyle(document.getElementById(id)).display", name) == "none"


@pytest.mark.browser
def test_leaving_the_page_ends_the_episode(make) -> None:
    env = make("click-test")
    env.reset(seed=0)
    env.page.evaluate("() => { location.href = 'click-tab.html'; }")
    *_, terminated, _, info = env.step(Wait(0.3))
    assert terminated and info["raw_reward"] == -1 and info["reason"] == "the agent left the task's page"


@pytest.mark.browser
def test_partial_credit_is_no_success(make) -> None:
    env = make("click-checkboxes")
    for seed in range(10):
        env.reset(seed=seed)
        if "," in env.goal:
            break
    *_, info = env.step(Look(env.tab, env.goal).click(Look(env.tab, env.goal).one("#subbtn")))
    assert -1 <= info["raw_reward"] < 1 and not info["success"]


@pytest.mark.browser
@pytest.mark.parametrize("scale", [1, 1.5, 2, 4])
def test_scale_changes_pixels_not_coordinates(make, scale: float) -> None:
    env = make("click-test-2", device_scale=scale)
    observation, _ = env.reset(seed=2)
    assert observation["screenshot"].shape == (210 * scale, 160 * scale, 3)
    assert env.observation_space.contains(observation)
    assert env.page.evaluate("() => [devicePixelRatio, innerWidth, innerHeight]") == [scale, 160, 210]
    assert oracle.run(env, 2) == (1, 1)
    assert env.render() is not None


def test_a_scale_of_broken_pixels() -> None:
    with pytest.raises(ValueError, match="device_scale=1.33 makes broken pixels of 160 x 210"):
        envs.make("memory-code", device_scale=1.33)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it(make) -> None:
    env = make("memory-colour")
    check_env(env, skip_render_check=True, skip_close_check=True)
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation) and isinstance(info, dict), "after it as before"


def test_spaces() -> None:
    space = ActionSpace((160, 210), seed=1)
    drawn = [space.sample() for _ in range(200)]
    assert all(action in space for action in drawn) and len({type(action) for action in drawn}) == 14
    assert drawn[:5] == [ActionSpace((160, 210), seed=1).sample() for _ in range(1)] + drawn[1:5]
    assert "click" not in space and space == ActionSpace((160, 210)) and space != ActionSpace((1, 1))
    assert Click(1, 2) in space and Hotkey(("a",)) in space and Type("x") in space
    goals = GoalSpace(seed=1)
    assert goals.sample() in goals and "确定 ♥" in goals and "x" * (MAX_GOAL + 1) not in goals and 3 not in goals


def test_before_the_first_reset() -> None:
    env = envs.make("memory-code")
    for call in (
        lambda: env.step(Wait(0)),
        lambda: env.page,
        lambda: oracle.describe(env),
        lambda: list(oracle.solve(env)),
    ):
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            call()
    assert env.render() is None
    env.close()


def test_unknown_tasks_get_near_matches() -> None:
    with pytest.raises(ValueError, match="there is no task 'click-tba'; did you mean click-tab"):
        envs.make("click-tba")
    with pytest.raises(ValueError, match="memory-colour"):
        envs.make("memory-color")
    with pytest.raises(ValueError, match="see envs.task_ids"):
        envs.make("???????")


def test_every_page_has_a_name() -> None:
    assert len(miniwob.page_ids()) >= 130
    everything = envs.task_ids(everything=True)
    assert len(everything) == len(set(everything)) == len(miniwob.page_ids()) + len(envs.memory.PAGES) + len(SITES)
    assert everything[: len(envs.task_ids())] == envs.task_ids()
    assert set(envs.task_ids()) == set(oracle.task_ids())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    miniwob.html_root.cache_clear()
    monkeypatch.setattr(miniwob, "find_spec", lambda name: None)
    with pytest.raises(miniwob.MiniwobMissing, match=r'pip install "agentkv\[miniwob\]"'):
        envs.make("click-test")
    assert "memory-code" in envs.task_ids()
    envs.make("memory-code")
    monkeypatch.undo()
    assert miniwob.html_root().name == "html"


def test_nothing_imports_selenium() -> None:
    assert "selenium" not in sys.modules and "miniwob" not in sys.modules


@pytest.mark.browser
def test_pages_without_a_script_open_too(make) -> None:
    env = make("tic-tac-toe")
    observation, _ = env.reset(seed=0)
    assert isinstance(observation["screenshot"], np.ndarray) and observation["goal"]
    with pytest.raises(ValueError, match="there is no script for 'tic-tac-toe'"):
        next(oracle.solve(env))
