"""Typed actions reach the page as real input events; wrong ones are answered with a text and do nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkv.envs import live
from agentkv.envs.act import check
from agentkv.envs.actions import (
    MODIFIER_KEYS,
    NAMED_KEYS,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MiddleClick,
    Move,
    OpenApp,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
    TripleClick,
    Type,
    Wait,
)
from agentkv.envs.browser import Browser
from agentkv.envs.web import WebEnv

SIZE = (200, 200)
PAGE = """<!doctype html><body style="margin: 0; width: 200px; height: 200px; user-select: none">
<div id="far" style="position: absolute; left: 0; top: 0; width: 600px; height: 600px"></div>
<input id="field" style="position: absolute; left: 10px; top: 100px; width: 100px; height: 20px">
<script>
  window.log = [];
  const note = (e) => { log.push([e.type, e.clientX, e.clientY, e.isTrusted, e.button]); };
  const types = ['click', 'dblclick', 'contextmenu', 'mousedown', 'mouseup', 'auxclick'];
  for (const type of types) addEventListener(type, note);
  addEventListener('click', (e) => { log.push(['count', e.detail, 0, e.isTrusted, 0]); });
  addEventListener('mousemove', (e) => {
    log.push([e.buttons ? 'drag' : 'hover', e.clientX, e.clientY, e.isTrusted, 0]);
  });
  addEventListener('keydown', (e) => { log.push(['key', e.key, e.ctrlKey, e.isTrusted, 0]); });
  addEventListener('keyup', (e) => { log.push(['up', e.key, e.ctrlKey, e.isTrusted, 0]); });
  let since = 0;
  addEventListener('mousedown', () => { since = performance.now(); });
  addEventListener('mouseup', () => { window.held = performance.now() - since; });
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
    assert ["auxclick", 50, 60, True, 1] in done(env, MiddleClick(50, 60))
    events = done(env, TripleClick(50, 60))
    assert [event[1] for event in events if event[0] == "count"] == [1, 2, 3]


@pytest.mark.browser
def test_a_move_presses_nothing(env: WebEnv) -> None:
    assert {event[0] for event in done(env, Move(70, 80))} == {"hover"}


@pytest.mark.browser
def test_a_long_press_holds_the_button(env: WebEnv) -> None:
    events = done(env, LongPress(50, 60))
    assert ["mousedown", 50, 60, True, 0] in events and ["mouseup", 50, 60, True, 0] in events
    assert env.page.evaluate("() => held") > 500


@pytest.mark.browser
def test_drag_moves_on_the_way(env: WebEnv) -> None:
    events = done(env, Drag(20, 20, 120, 60))
    assert ["mousedown", 20, 20, True, 0] in events and ["mouseup", 120, 60, True, 0] in events
    assert len([event for event in events if event[0] == "drag"]) >= 5


@pytest.mark.browser
def test_a_drag_may_begin_where_the_pointer_is(env: WebEnv) -> None:
    done(env, Move(30, 40))
    events = done(env, Drag(None, None, 120, 60))
    assert ["mousedown", 30, 40, True, 0] in events and ["mouseup", 120, 60, True, 0] in events


@pytest.mark.browser
def test_scroll_turns_the_wheel(env: WebEnv) -> None:
    offset = "() => [scrollX, scrollY]"
    for direction, wanted in (("down", [0, 80]), ("right", [80, 80]), ("up", [80, 0]), ("left", [0, 0])):
        done(env, Scroll(100, 50, direction, 80))  # type: ignore[arg-type]
        env.page.wait_for_function("([x, y]) => scrollX === x && scrollY === y", arg=wanted, timeout=5000)
        assert env.page.evaluate(offset) == wanted
    done(env, Move(100, 50))
    done(env, Scroll(None, None, "down", 50))
    env.page.wait_for_function("() => scrollY === 50", timeout=5000)
    done(env, Scroll(100, 50, "up", 50))
    env.page.wait_for_function("() => scrollY === 0", timeout=5000)


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
        (Move(None, None), "is not a point"),  # type: ignore[arg-type]
        (Move(10, 200), "(10, 200) is outside"),
        (TripleClick(-1, 10), "(-1, 10) is outside"),
        (LongPress(10, math.nan), "is not a point"),
        (MiddleClick(10, 500), "is outside"),
        (Drag(None, None, 10, 200), "(10, 200) is outside"),
        (Drag(None, 10, 10, 10), "(None, 10) is not a point"),
        (Scroll(None, 10, "down", 10), "(None, 10) is not a point"),
        (Type("\ud800"), "half a character"),
        (KeyDown("Hyper"), "'Hyper' is not a key"),
        (KeyUp("é"), "'é' is not a key"),
        (KeyDown(3), "key=3 is not the name of a key"),  # type: ignore[arg-type]
        (KeyDown("Meta"), "'Meta' belongs to the operating system"),
        (Hotkey(("Meta", "r")), "'Meta' belongs to the operating system"),
        (PressHome(), "a web page has no home button; nothing was done"),
        (OpenApp("Maps"), "a web page cannot open apps, 'Maps' neither; nothing was done"),
        (PressBack(), "there is no page to go back to; nothing was done"),
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


@pytest.mark.browser
def test_a_key_is_held_until_it_is_let_go(env: WebEnv) -> None:
    done(env, Click(50, 110))
    done(env, Hotkey(("Control", "a")))
    assert done(env, KeyDown("Shift")) == [["key", "Shift", False, True, 0]]
    done(env, Hotkey(("a",)))
    assert done(env, KeyUp("Shift")) == [["up", "Shift", False, True, 0]]
    assert done(env, KeyUp("Shift")) == [["up", "Shift", False, True, 0]]
    assert env.page.evaluate("() => field.value") == "A"


@pytest.mark.browser
def test_every_key_of_the_list_is_one(env: WebEnv) -> None:
    for key in (*NAMED_KEYS, *MODIFIER_KEYS, *map(chr, range(33, 127))):
        *_, info = env.step(KeyUp(key))
        assert info["error"] == "", key


@pytest.mark.browser
def test_back_stays_within_the_episode(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<body style="margin: 0"><a href="b.html">a long enough link to b</a>')
    (tmp_path / "b.html").write_text("<a href='#here'>b</a>")
    env = live.make((tmp_path / "a.html").as_uri(), "go and come back", browser, viewport=SIZE, max_steps=20)
    env.reset(seed=0)
    assert "no page to go back to" in env.step(PressBack())[4]["error"]
    assert env.step(Click(10, 8))[4]["url"].endswith("b.html")
    info = env.step(PressBack())[4]
    assert info["error"] == "" and info["url"].endswith("a.html")
    assert "no page to go back to" in env.step(PressBack())[4]["error"]
    env.close()


@given(point, point)
def test_only_points_of_the_screen_pass(x: float, y: float) -> None:
    inside = 0 <= x < 200 and 0 <= y < 200
    assert (check(Click(x, y), SIZE) == "") == inside
    assert (check(Drag(10, 10, x, y), SIZE) == "") == inside


@pytest.mark.parametrize(
    "action", [Wait(1e9), Finished("yes"), CallUser(), Type(""), Hotkey(("a",)), PressBack(), KeyDown("a")]
)
def test_right_actions(action: object) -> None:
    assert check(action, SIZE) == ""  # type: ignore[arg-type]
