"""Scripts, aim and the description of a screen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkv import envs
from agentkv.envs import oracle
from agentkv.envs.actions import Click
from agentkv.envs.browser import Browser
from agentkv.envs.scripted.look import Look, ScriptLost, aim

points = st.lists(st.tuples(st.floats(0, 160), st.floats(0, 210)), min_size=1, max_size=30).map(tuple)


@given(points, st.integers(0, 9))
def test_aim_is_one_of_the_points(choices: tuple[tuple[float, float], ...], seed: int) -> None:
    assert aim(choices, None) in choices
    assert aim(choices, random.Random(seed)) in choices


def test_aim_prefers_the_middle() -> None:
    square = tuple((float(x), float(y)) for x in range(9) for y in range(9))
    assert aim(square, None) == (4, 4)
    drawn = {aim(square, random.Random(seed)) for seed in range(100)}
    assert len(drawn) > 10 and all(1 <= x <= 7 and 1 <= y <= 7 for x, y in drawn)


@pytest.mark.browser
def test_jitter_stays_inside_and_still_solves(browser: Browser) -> None:
    env = envs.make("click-dialog-2", browser)
    env.reset(seed=0)
    spots = {next(oracle.solve(env, random.Random(n))) for n in range(8)}
    assert len(spots) > 2 and len({next(oracle.solve(env)) for _ in range(3)}) == 1
    assert oracle.run(env, 0, random.Random(5)) == (1, 1)
    env.close()


@pytest.mark.browser
def test_a_covered_button_is_clicked_where_it_shows(browser: Browser) -> None:
    env = envs.make("click-test-2", browser)
    env.reset(seed=0)
    place = "left: 10px; top: 60px; width: 40px; height: 40px; position: absolute"
    env.page.evaluate(
        "(style) => { for (const b of [subbtn, subbtn2]) b.style = style; subbtn2.style.left = '20px'; }", place
    )
    action = next(oracle.solve(env))
    assert isinstance(action, Click) and 10 < action.x < 20
    *_, info = env.step(action)
    assert info["success"]
    env.close()


@pytest.mark.browser
def test_a_lost_script_says_so(browser: Browser) -> None:
    env = envs.make("click-test", browser)
    env.reset(seed=0)
    env.page.evaluate("() => document.getElementById('subbtn').remove()")
    with pytest.raises(ScriptLost, match="no visible '#area button' for the goal 'Click the button.'"):
        next(oracle.solve(env))
    env.close()


@pytest.mark.browser
def test_descriptions(browser: Browser) -> None:
    wanted = {
        "login-user": {("Username", "field"), ("Password", "password"), ("Login", "button")},
        "click-tab": {("Tab #1", "tab"), ("Tab #2", "tab"), ("Tab #3", "tab")},
        "click-dialog": {("Close", "button")},
        "memory-colour": {("Next", "button")},
        "memory-code": {("Next", "button")},
    }
    for task_id, some in wanted.items():
        env = envs.make(task_id, browser)
        env.reset(seed=5)
        seen = oracle.describe(env)
        assert some <= {(element["text"], element["kind"]) for element in seen}
        assert env.goal not in {element["text"] for element in seen}
        for element in seen:
            x, y, width, height = element["box"]
            assert 0 <= x and 0 <= y and x + width <= 160.01 and y + height <= 210.01
            assert all(x <= px <= x + width and y <= py <= y + height for px, py in element["points"])
        # To know what is there, one point of each is enough.
        assert oracle.describe(env, 1) == [element | {"points": element["points"][:1]} for element in seen]
        env.close()


@pytest.mark.browser
def test_the_command_prints_a_table(browser: Browser, capsys: pytest.CaptureFixture[str]) -> None:
    assert oracle.main(["--seeds", "1", "--task", "click-test", "--jitter"]) == 0
    assert "click-test" in capsys.readouterr().out


@pytest.mark.browser
def test_the_command_fails_with_a_script(
    browser: Browser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(look: Look) -> object:
        yield look.click(look.one("#nothing"))

    monkeypatch.setitem(oracle.SCRIPTS, "click-test", wrong)
    assert oracle.main(["--seeds", "1", "--task", "click-test"]) == 1
    assert "seed 0: no visible '#nothing'" in capsys.readouterr().err
