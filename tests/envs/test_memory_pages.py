"""The memory pages: what was shown is gone when it is asked, and cannot be guessed better than the stated chance."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from agentkv import envs
from agentkv.envs import oracle
from agentkv.envs.actions import Click, Type
from agentkv.envs.allow import AllowList
from agentkv.envs.browser import Browser
from agentkv.envs.memory import PAGES, MemoryTask
from agentkv.envs.scripted.look import Look
from agentkv.envs.web import WebEnv


def to_the_question(env: WebEnv, seed: int) -> list[str]:
    """Press Next until the last screen; what the earlier screens showed, as their markup."""
    env.reset(seed=seed)
    shown = []
    while (look := Look(env.tab, env.goal)).visible(".next"):
        shown.append(env.page.evaluate("() => document.body.innerHTML"))
        env.step(look.click(look.one(".next")))
    return shown


@pytest.mark.browser
@pytest.mark.parametrize("task_id", ["memory-code", "memory-code-typed"])
def test_the_code_leaves_the_document(browser: Browser, task_id: str) -> None:
    env = envs.make(task_id, browser)
    env.reset(seed=4)
    code = [card.text for card in Look(env.tab, env.goal).visible(".glyph")]
    to_the_question(env, 4)
    assert len(code) == 2
    assert all(not card.text for card in Look(env.tab, env.goal).all(".glyph"))
    assert env.page.evaluate("() => [Object.keys(task).sort().join(), task.reason()]") == [
        "done,goal,reason,reward,start",
        "",
    ]
    env.close()


@pytest.mark.browser
def test_next_is_always_at_the_same_large_place(browser: Browser) -> None:
    for task_id in PAGES:
        env = envs.make(task_id, browser)
        env.reset(seed=0)
        assert Look(env.tab, env.goal).one(".next").box == (10, 160, 140, 44)
        env.close()


@pytest.mark.browser
def test_a_wrong_code_and_a_half_code(browser: Browser) -> None:
    env = envs.make("memory-code", browser)
    to_the_question(env, 4)
    look = Look(env.tab, env.goal)
    assert not env.step(look.click(look.one("button")))[2]
    *_, terminated, _, info = env.step(look.click(look.one("button")))
    assert terminated and info["raw_reward"] == -1 and info["reason"].startswith("entered 11, the code was ")
    env.close()


@pytest.mark.browser
def test_enter_submits_the_typed_code(browser: Browser) -> None:
    env = envs.make("memory-code-typed", browser)
    env.reset(seed=4)
    code = "".join(card.text for card in Look(env.tab, env.goal).visible(".glyph"))
    to_the_question(env, 4)
    env.step(Click(80, 70))
    *_, info = env.step(Type(code + "\n"))
    assert info["success"]
    env.close()


@pytest.mark.browser
def test_a_shape_counts_once(browser: Browser) -> None:
    env = envs.make("memory-order", browser)
    env.reset(seed=4)
    actions = oracle.solve(env)
    for _ in range(4):
        env.step(last := next(actions))
    *_, terminated, _, info = env.step(last)
    assert not terminated and info["raw_reward"] == 0
    env.close()


@pytest.mark.browser
def test_the_answer_is_spread_evenly(browser: Browser) -> None:
    """400 seeds, drawn in one page without reloading: no answer is much more frequent than the chance that is
    stated.
    """
    draw = "(n) => [...Array(n).keys()].map((seed) => { task.start(seed); return document.body.innerHTML; })"
    for task_id, digits in (("memory-code", 2), ("memory-colour", 0)):
        task = MemoryTask(task_id)
        tab = browser.open(AllowList() | task.allow, task.viewport)
        tab.goto(task.url, 20)
        first = Counter(html.partition("Next")[0] for html in tab.evaluate(draw, 400))
        assert max(first.values()) < (16 if digits else 80)
        assert len(first) > (90 if digits else 7)
        tab.close()


@pytest.mark.browser
def test_guessing_on_the_last_screen_is_near_chance(browser: Browser) -> None:
    env = envs.make("memory-changed", browser)
    won = 0
    for seed in range(12):
        to_the_question(env, seed)
        look = Look(env.tab, env.goal)
        *_, info = env.step(look.click(random.Random(seed).choice(look.visible("svg"))))
        won += info["success"]
    assert won <= 9
    env.close()


def test_chances_are_stated() -> None:
    assert MemoryTask("memory-code").chance == 0.01
    assert MemoryTask("memory-order").chance == pytest.approx(1 / 6)
    assert all(0 < page.chance < 0.5 and page.steps >= 2 for page in PAGES.values())
    assert MemoryTask("memory-order", max_steps=3).max_steps == 3
