"""Any address as an environment."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agentkv.envs import live
from agentkv.envs.actions import Click, Finished, Type
from agentkv.envs.browser import Browser
from agentkv.envs.tab import PageNotLoaded
from tests.envs.conftest import Site

SIZE = (200, 200)


@pytest.mark.browser
def test_a_checker_grades_the_end(browser: Browser, site: Site) -> None:
    url = site.page("<body><input autofocus>")
    env = live.make(
        url, " say hello ", browser, viewport=SIZE, checker=lambda page, said: said == page.input_value("input")
    )
    for answer, reward in (("hello", 1.0), ("good day", 0.0)):
        observation, _ = env.reset(seed=0)
        assert observation["goal"] == "say hello" and observation["screenshot"].shape == (200, 200, 3)
        env.step(Type("hello"))
        _, got, terminated, _, info = env.step(Finished(answer))
        assert terminated and got == reward and info["success"] == (reward == 1)
    env.close()


@pytest.mark.browser
def test_without_a_checker_success_is_unknown(browser: Browser, site: Site) -> None:
    env = live.make(site.page("<body>hello"), "look", browser, viewport=SIZE)
    env.reset(seed=0)
    *_, info = env.step(Finished("I saw it"))
    assert info["raw_reward"] == 0 and not info["success"] and "success is unknown" in info["reason"]
    env.close()


@pytest.mark.browser
def test_links_inside_the_origin_work(browser: Browser, site: Site) -> None:
    site.page("<title>second</title>", "/second")
    url = site.page("<body style='margin: 0'><a href='/second' style='display: block; height: 100px'>on</a>")
    env = live.make(url, "follow", browser, viewport=SIZE)
    env.reset(seed=0)
    *_, info = env.step(Click(50, 50))
    env.page.wait_for_url(site.url + "/second", timeout=5000)
    assert info["blocked"] == []
    env.close()


@pytest.mark.browser
def test_a_file_sees_its_folder_only(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.js").write_text("document.title = 'secret';")
    (tmp_path / "in" / "own.js").write_text("window.own = true;")
    page = tmp_path / "in" / "page.html"
    page.write_text("<body>x<script src='own.js'></script><script src='../secret.js'></script>")
    env = live.make(page.as_uri(), "look", browser, viewport=SIZE)
    _, info = env.reset(seed=0)
    assert env.page.evaluate("() => [window.own, document.title]") == [True, ""]
    assert [entry["reason"] for entry in info["blocked"]] == ["the file is outside the task's folder"]
    env.close()


@pytest.mark.browser
def test_a_page_that_never_loads(browser: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        env = live.make(url, "wait", browser, viewport=SIZE, load_timeout=1.0)
        with pytest.raises(PageNotLoaded, match="did not load within 1 s; check the address or raise load_timeout"):
            env.reset(seed=0)
    with pytest.raises(PageNotLoaded, match="could not be opened: .*ERR_CONNECTION_REFUSED"):
        env.reset(seed=0)
    env.close()


@pytest.mark.parametrize(
    "url", ["example.com", "javascript:alert(1)", "data:text/html,x", "chrome://version", "ftp://a/b", ""]
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened; use an address like https://"):
        live.LiveTask(url, "look")


def test_other_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        live.LiveTask((tmp_path / "nothing.html").as_uri(), "look")
    with pytest.raises(ValueError, match="goal is empty"):
        live.LiveTask("https://example.com", " ")
    with pytest.raises(ValueError, match=r"viewport=\(0, 5\) is no screen"):
        live.LiveTask("https://example.com", "look", viewport=(0, 5))
    with pytest.raises(ValueError, match="allow='ftp://a'"):
        live.LiveTask("https://example.com", "look", allow=("ftp://a",))
