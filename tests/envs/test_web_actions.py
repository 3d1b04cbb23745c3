"""Typed actions reach the page as real input events; wrong ones are answered with a text and do nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import live
from envs.act import check
from envs.actions import CallUser, Click, DoubleClick, Drag, Finished, Hotkey, RightClick, Scroll, Type, Wait
from envs.browser import Browser
from envs.web import WebEnv

SIZE = (200, 200)
PAGE = """<!doctype html><body style="margin: 0; width: 200px; height: 200px; user-select: none">
<div id="far" style="position: absolute; left: 0; top: 0; width: 600px; height: 600px"></div>
<input id="field" style="position: absolute; left: 10px; top: 100px; width: 100px; height: 20px">
<script>
  window.log = [];
  const note = (e) => { log.push([e.type, e.clientX, e.clientY, e.isTrusted, e.button]); };
  for (const type of ['click', 'dblclick', 'contextmenu', 'mousedown', 'mouseup']) addEventListener(type, note);
  addEventListener('mousemove', (e) => { if (e.buttons) log.push(['drag', e.clientX, e.clientY, e.isTrusted, 0]); });
  addEventListener('keydown', (e) => { log.push(['key', e.key, e.ctrlKey, e.isTrusted, 0]); });
</script>"""

point = st.floats(allow_nan=True, allow_infinity=True)


@pytest.fixture(scope="module")
def env(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebEnv]:
    page = Path(tmp_path_factory.mktemp("page")) / "page.html"
    page.write_text(PAGE)
    env = live.make(page.as_uri(), "try everything", browser, viewport=SIZE, max_steps=1000)
    env.reset(seed=0)
    yield env
    env.close()


def done(env: WebEnv, action: object) -> list[list[object]]:
    """The events of one action."""
    env.page.evaluate("() => { log.length = 0; }")
    *_, info = env.step(action)  # type: ignore[arg-type]
    assert info["error"] == ""
    return env.page.evaluate("() => log")


@pytest.mark.browser
def test_clicks(env: WebEnv) -> None:
    assert ["click", 50, 60, True, 0] in done(env, Click(50, 60))
    assert ["dblclick", 50, 60, True, 0] in done(env, DoubleClick(50, 60))
    assert ["contextmenu", 50, 60, True, 2] in done(env, RightClick(50, 60))


@pytest.mark.browser
def test_drag_moves_on_the_way(env: WebEnv) -> None:
    events = done(env, Drag(20, 20, 120, 60))
    assert ["mousedown", 20, 20, True, 0] in events and ["mouseup", 120, 60, True, 0] in events
    assert len([event for event in events if event[0] == "drag"]) >= 5


@pytest.mark.browser
def test_scroll_turns_the_wheel(env: WebEnv) -> None:
    offset = "() => [scrollX, scrollY]"
    for direction, wanted in (("down", [0, 80]), ("right", [80, 80]), ("up", [80, 0]), ("left", [0, 0])):
        done(env, Scroll(100, 50, direction, 80))  # type: ignore[arg-type]
        env.page.wait_for_function("([x, y]) => scrollX === x && scrollY === y", arg=wanted, timeout=5000)
        assert env.page.evaluate(offset) == wanted


@pytest.mark.browser
def test_typing_and_keys(env: WebEnv) -> None:
    done(env, Click(50, 110))
    keys = [event[1] for event in done(env, Type("Ab\u00e9 1\n"))]
    assert keys[-1] == "Enter"
    assert env.page.evaluate("() => field.value") == "Ab\u00e9 1"
    assert ["key", "a", True, True, 0] in done(env, Hotkey(("Control", "a")))
    done(env, Type("x"))
    assert env.page.evaluate("() => field.value") == "x"
    done(env, Hotkey(("Backspace",)))
    assert env.page.evaluate("() => field.value") == ""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Click(200, 10), "(200, 10) is outside the screen of 200 x 200"),
        (Click(-0.5, 10), "outside the screen"),
        (DoubleClick(math.nan, 10), "is not a point"),
        (RightClick(10, math.inf), "is not a point"),
        (Click("10", 10), "is not a point"),  # type: ignore[arg-type]
        (Drag(10, 10, 10, 200), "(10, 200) is outside"),
        (Scroll(10, 10, "inward", 10), "direction='inward'"),  # type: ignore[arg-type]
        (Scroll(10, 10, "down", math.nan), "pixels=nan"),
        (Type("x" * 6000), "6000 characters"),
        (Type(5), "text=5 is not text"),  # type: ignore[arg-type]
        (Hotkey("Enter"), "is not a tuple of key names"),  # type: ignore[arg-type]
        (Hotkey(()), "0 keys"),
        (Hotkey(("Control", "Hyper")), "'Hyper' is not a key"),
        (Wait(math.nan), "seconds=nan"),
        (Wait(-1), "seconds=-1"),
        ("click", "str is not an action"),
    ],
)
def test_wrong_actions_do_nothing(env: WebEnv, action: object, message: str) -> None:
    env.page.evaluate("() => { log.length = 0; }")
    _, reward, terminated, _, info = env.step(action)  # type: ignore[arg-type]
    assert message in info["error"]
    assert reward == 0 and not terminated
    assert [event for event in env.page.evaluate("() => log") if event[0] != "key"] == []


@pytest.mark.browser
def test_no_key_stays_down_after_a_wrong_hotkey(env: WebEnv) -> None:
    env.step(Hotkey(("Control", "Hyper")))
    done(env, Click(50, 110))
    done(env, Type("q"))
    assert env.page.evaluate("() => field.value").endswith("q")


@given(point, point)
def test_only_points_of_the_screen_pass(x: float, y: float) -> None:
    inside = 0 <= x < 200 and 0 <= y < 200
    assert (check(Click(x, y), SIZE) == "") == inside
    assert (check(Drag(10, 10, x, y), SIZE) == "") == inside


@pytest.mark.parametrize("action", [Wait(1e9), Finished("yes"), CallUser(), Type(""), Hotkey(("a",))])
def test_right_actions(action: object) -> None:
    assert check(action, SIZE) == ""  # type: ignore[arg-type]
