"""Finding, launching, crashing and relaunching the browser; isolation between browsers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Error

from agentkv import envs
from agentkv.envs import live
from agentkv.envs.actions import Click, Wait
from agentkv.envs.allow import AllowList
from agentkv.envs.browser import CHROMIUM_VARIABLE, Browser, ChromiumMissing, find_chromium
from agentkv.envs.tab import BrowserCrashed
from tests.envs.conftest import Site


def test_a_named_path_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ChromiumMissing) as caught:
        find_chromium(tmp_path / "nothing")
    for part in ("nothing", "apt-get install chromium", "playwright install chromium", "Browser(executable="):
        assert part in str(caught.value)


def test_nothing_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CHROMIUM_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ChromiumMissing, match="no Chromium found"):
        find_chromium()


def test_order_of_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("chromium-browser", "google-chrome", "mine", "named"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.delenv(CHROMIUM_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() == tmp_path / "chromium-browser"
    monkeypatch.setenv(CHROMIUM_VARIABLE, str(tmp_path / "mine"))
    assert find_chromium() == tmp_path / "mine"
    assert find_chromium(tmp_path / "named") == tmp_path / "named"


def test_the_headless_shell_comes_first_unless_headed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("chromium", "chromium-headless-shell"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.delenv(CHROMIUM_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() == tmp_path / "chromium-headless-shell"
    assert find_chromium(headed=True) == tmp_path / "chromium"


@pytest.mark.browser
def test_a_program_that_is_no_browser(browser: Browser) -> None:
    with pytest.raises(ChromiumMissing, match="did not start"):
        Browser(executable="/bin/false").start()
    assert browser.alive


@pytest.mark.browser
def test_a_browser_that_does_not_run() -> None:
    idle = Browser()
    assert not idle.alive and idle.version == "" and idle.pid is None
    with pytest.raises(BrowserCrashed, match="not running"):
        idle.open(AllowList(), (160, 210))
    idle.close()


@pytest.mark.browser
def test_a_killed_browser_is_reported_and_replaced(browser: Browser) -> None:
    env = envs.make("memory-colour")
    before, _ = env.reset(seed=1)
    assert env.browser.pid is not None
    os.kill(env.browser.pid, signal.SIGKILL)
    with pytest.raises(BrowserCrashed, match="reset the environment"):
        for _ in range(20):
            env.step(Wait(0.1))
    assert not env.browser.alive
    after, _ = env.reset(seed=1)
    assert (after["screenshot"] == before["screenshot"]).all()
    env.close()
    assert not env.browser.alive and browser.alive


@pytest.mark.browser
def test_a_page_that_hangs_is_stopped(browser: Browser, site: Site) -> None:
    url = site.page("<body onclick='while (true);' style='height: 200px'>busy")
    env = live.make(url, "click", viewport=(200, 200), step_timeout=2.0)
    env.reset(seed=0)
    with pytest.raises(BrowserCrashed, match="did not answer within 2 s"):
        env.step(Click(50, 50))
    env.reset(seed=0)
    env.close()


@pytest.mark.browser
def test_two_browsers_share_nothing(browser: Browser, site: Site) -> None:
    script = "localStorage.n = 1 + Number(localStorage.n || 0); document.cookie = 'seen=1';"
    url = site.page(f"<body><script>const had = document.cookie; {script}</script>")
    with Browser() as other:
        tabs = [one.open(AllowList((url,)), (160, 210)) for one in (browser, other, browser)]
        for tab in tabs:
            tab.goto(url, 20)
            assert tab.evaluate("() => [localStorage.n, had]") == ["1", ""]
        assert browser.pid != other.pid
        for tab in tabs:
            tab.close()
            tab.close()


@pytest.mark.browser
def test_a_tab_whose_page_died_between_episodes_is_not_used_again(
    browser: Browser, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*place: float) -> None:
        raise Error("Target crashed")

    env = live.make(site.page("<body>fine"), "look", browser, viewport=(160, 120), reuse_tab=True)
    env.reset(seed=0)
    first = env.tab
    env.reset(seed=1)
    assert env.tab is first
    monkeypatch.setattr(type(first.page.mouse), "move", dead)
    observation, _ = env.reset(seed=2)
    assert env.tab is not first and observation["screenshot"].shape == (120, 160, 3)
    env.close()
