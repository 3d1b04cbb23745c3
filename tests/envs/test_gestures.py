"""Several gestures as one step, clicks at the pointer, keys inside a text, and the verbs of a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentkv.envs import live
from agentkv.envs.act import check
from agentkv.envs.actions import (
    CallUser,
    Click,
    DoubleClick,
    Finished,
    Goto,
    Hotkey,
    Move,
    Note,
    PressBack,
    Reload,
    Several,
    Type,
    ending,
    parts,
)
from agentkv.envs.browser import Browser
from agentkv.envs.web import WebEnv
from tests.envs.conftest import Site

SIZE = (200, 200)
PAGE = """<!doctype html><body style="margin: 0">
<input id="a" style="position: absolute; left: 10px; top: 10px; width: 100px; height: 20px">
<input id="b" style="position: absolute; left: 10px; top: 50px; width: 100px; height: 20px">
<script>
  window.log = [];
  for (const type of ['click', 'dblclick']) addEventListener(type, (e) => log.push([type, e.clientX, e.clientY]));
  addEventListener('keydown', (e) => log.push(['key', e.key]));
</script>"""


@pytest.fixture
def env(browser: Browser, site: Site) -> Iterator[WebEnv]:
    env = live.make(site.page(PAGE), "write", browser, viewport=SIZE)
    env.reset(seed=0)
    yield env
    env.close()


def log(env: WebEnv) -> list[list]:
    return env.page.evaluate("log.splice(0)")


@pytest.mark.browser
def test_gestures_are_done_in_order_as_one_step(env: WebEnv) -> None:
    *_, info = env.step(Several((Click(20, 20), Type("tea"), Hotkey(("Control", "a")), Type("milk\n"))))
    assert info["error"] == "" and info["steps"] == 1
    assert env.page.input_value("#a") == "milk"


@pytest.mark.browser
def test_the_first_that_cannot_be_done_ends_the_step(env: WebEnv) -> None:
    *_, terminated, truncated, info = env.step(Several((Click(20, 20), Click(900, 20), Finished("x"))))
    assert info["error"].startswith("gesture 2 of 3: (900, 20) is outside the screen") and not (terminated or truncated)
    *_, terminated, _, info = env.step(Several((Click(20, 20), Finished("x"))))
    assert terminated and info["error"] == ""


@pytest.mark.browser
def test_a_tab_inside_a_text_goes_to_the_next_field(env: WebEnv) -> None:
    env.step(Several((Click(20, 20), Type("a\tb\r\n"))))
    assert (env.page.input_value("#a"), env.page.input_value("#b")) == ("a", "b")
    assert [key for kind, key in (entry[:2] for entry in log(env)) if kind == "key"].count("Enter") == 1


@pytest.mark.browser
def test_a_click_without_a_point_is_at_the_pointer(env: WebEnv) -> None:
    env.step(Move(30, 60))
    env.step(DoubleClick())
    assert log(env) == [["click", 30, 60], ["click", 30, 60], ["dblclick", 30, 60]]


@pytest.mark.browser
def test_addresses_open_within_what_is_allowed(env: WebEnv, site: Site) -> None:
    there = site.page("<body>second")
    *_, info = env.step(Goto(there))
    assert info["error"] == "" and info["url"] == there and env.page.inner_text("body") == "second"
    *_, info = env.step(Goto("https://example.com/"))
    assert "https://example.com/" in info["error"] or info["blocked"]
    assert info["url"] == there
    env.step(Note("nothing happens"))
    *_, info = env.step(Reload())
    assert info["error"] == "" and info["url"] == there
    *_, info = env.step(PressBack())
    assert env.page.url != "about:blank"


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (Goto("javascript:alert(1)"), "is not an address that can be opened"),
        (Goto("https://a b"), "is not an address that can be opened"),
        (Several(()), "an answer has 1 to 50 gestures"),
        (Several((Several((Move(1, 2),)),)), "gestures do not nest"),  # type: ignore[arg-type]
        (Click(None, 3), "is not a point"),
        (Move(None, None), "is not a point"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_done_is_told(action: object, told: str) -> None:
    assert told in check(action, SIZE)  # type: ignore[arg-type]


def test_parts_and_the_end_of_an_answer() -> None:
    several = Several((Move(1, 2), CallUser()))
    assert parts(several) == several.actions and parts(Move(1, 2)) == (Move(1, 2),)
    assert ending(several) == CallUser() and ending(Move(1, 2)) is None
