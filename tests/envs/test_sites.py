"""Tasks on pages that look like the web: their draws, their checker, their pages, and the packages these come from."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from agentkv import envs
from agentkv.envs import oracle
from agentkv.envs.actions import Finished, Type
from agentkv.envs.browser import Browser
from agentkv.envs.sites import SITES, SitesMissing, SiteTask, __main__, packages
from agentkv.envs.sites.packages import PACKAGES, Package, files_of, install, integrity_of
from agentkv.envs.sites.server import SiteServer, content_of
from agentkv.envs.sites.task import draw, facts
from agentkv.envs.sites.templates import DASHBOARD, OFFICE
from agentkv.envs.web import WebEnv

needs_pages = pytest.mark.skipif(
    not all(package.installed for package in PACKAGES),
    reason="the pages of the site tasks are not installed: python -m envs.sites install",
)
# one per way of working: a dialog, lists by keyboard, a value carried across pages in the other look
SOME = ("site-mail-reply", "site-board-move", "memory-site-sb-alert")


def test_there_are_enough_and_each_has_a_script() -> None:
    memory = [name for name in SITES if name.startswith("memory-site-")]
    assert len(SITES) >= 60 and len(memory) >= 20
    assert set(envs.site_ids()) == set(SITES) <= set(oracle.SCRIPTS)
    assert all(name.startswith("site-") for name in SITES if name not in memory)
    assert all(3 <= site.steps <= 20 for site in SITES.values())
    assert sum(site.template is DASHBOARD for site in SITES.values()) >= 8


@pytest.mark.parametrize("name", SITES)
def test_goals_can_be_read_back_and_are_never_met_at_the_start(name: str) -> None:
    site = SITES[name]
    goals = set()
    for seed in range(5):
        first, values, solved = draw(site, seed, name)
        goal = site.goal.format(**values)
        read = site.values(goal)
        assert read.items() <= values.items(), goal
        assert facts(first) != facts(solved)
        goals.add(goal)
    assert len(goals) >= 2
    assert draw(site, 3, name) == draw(site, 3, name)


def test_another_goal_is_not_read() -> None:
    with pytest.raises(ValueError, match="is no goal like 'Sign in"):
        SITES["site-login"].values("Sign out.")


def test_what_a_template_adds_does_not_count_and_everything_else_does() -> None:
    first, _, _ = draw(SITES["site-mail-send"], 0, "any")
    other = deepcopy(first)
    other["mail"].reverse()
    other["mail"][0] |= {"unread": True, "time": "now", "preview": "x"}
    other["cards"][0]["id"] = 77
    assert facts(first) == facts(other)
    for kind, change in (("mail", {"starred": None}), ("cards", {"due": "never"}), ("files", {"name": "x"})):
        wrong = deepcopy(first)
        wrong[kind][0] |= change
        assert facts(first) != facts(wrong)
    first["mail"][0]["body"] = "yes\n\n--- On Mon, A wrote:\n> no"
    other = deepcopy(first)
    other["mail"][0]["body"] = "yes"
    assert facts(first) == facts(other)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """A registry on the loopback interface with one small package, and an empty cache; npm is not there."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in (("package/dist/a.html", b"<p>hello"), ("package/secret.html", b"not served")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    folder = tmp_path / "registry"
    (folder / "pages").mkdir(parents=True)
    (folder / "pages.tgz").write_bytes(archive.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    address = f"http://127.0.0.1:{server.server_port}"
    (folder / "pages" / "1.0.0").write_text(json.dumps({"dist": {"tarball": f"{address}/pages.tgz"}}))
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files_of.cache_clear()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield Package("pages", "1.0.0", integrity_of(archive.getvalue()), "package/dist", 0.1)
    server.shutdown()
    server.server_close()


def test_install_fetches_once_and_reads_what_is_served(registry: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SitesMissing, match="not installed; run python -m envs.sites install"):
        files_of(registry)
    assert install(registry).read_bytes()[:2] == b"\x1f\x8b"
    assert files_of(registry) == {"a.html": b"<p>hello"}
    monkeypatch.delenv("NPM_CONFIG_REGISTRY")
    assert install(registry) == registry.path  # nothing is asked for again


def test_another_checksum_is_refused(registry: Package) -> None:
    other = Package("pages", "1.0.0", "sha512-AAAA", "package/dist", 0.1)
    with pytest.raises(SitesMissing, match="what came from the registry is not pages 1.0.0: its checksum is sha512-"):
        install(other)
    assert not other.path.exists()
    install(registry)
    registry.path.write_bytes(registry.path.read_bytes() + b" ")
    for use in (files_of, install):
        with pytest.raises(SitesMissing, match=r"pages-1.0.0.tgz is not pages 1.0.0.*expected sha512-.*delete it"):
            use(registry)


def test_no_such_package(registry: Package) -> None:
    with pytest.raises(SitesMissing, match="other/2.0.0 could not be fetched .HTTP Error 404"):
        install(Package("other", "2.0.0", registry.integrity, "package", 1))


def test_list_says_how_to_get_them(registry: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["list"]) == 0
    assert capsys.readouterr().out.count("(MIT, ") == 2
    files_of.cache_clear()
    assert __main__.main(["serve", "gentelella"]) == 2
    assert "python -m envs.sites install" in capsys.readouterr().err


@needs_pages
@pytest.mark.parametrize("template", [OFFICE, DASHBOARD], ids=["gentelella", "sb-admin-2"])
def test_no_page_asks_another_host(template) -> None:
    content = content_of(template)
    for site in SITES.values():
        assert site.template is not template or template.folder + site.start in content
    for name, body in content.items():
        if name.endswith((".html", ".css")):
            assert b"fonts.googleapis" not in body and b"source.unsplash" not in body, name


@needs_pages
@pytest.mark.browser
@pytest.mark.parametrize("name", SOME)
def test_solved_by_its_script(browser: Browser, name: str) -> None:
    env = envs.make(name, browser)
    reward, steps = oracle.run(env, 0)
    assert reward == 1 and SITES[name].steps <= steps <= env.max_steps
    assert env.tab is not None and env.tab.blocked == [] and env.tab.record.dialogs == []
    env.close()


@needs_pages
@pytest.mark.browser
def test_two_fresh_servers_give_the_same_pixels(browser: Browser) -> None:
    for name, template in (("site-shop-cart", OFFICE), ("site-sb-ticket", DASHBOARD)):
        shots = []
        for _ in range(2):
            with SiteServer(template) as server:
                env = WebEnv(SiteTask(name, SITES[name], server=server), browser)
                first, _ = env.reset(seed=5)
                second, *_ = env.step(next(oracle.solve(env)))
                shots.append(np.stack([first["screenshot"], second["screenshot"]]))
                env.close()
        assert (shots[0] == shots[1]).all()
        assert shots[0][0].std() > 20 and (shots[0][0] != shots[0][1]).any()


@needs_pages
@pytest.mark.browser
def test_something_else_done_is_not_solved(browser: Browser) -> None:
    env = envs.make("site-mail-send", browser)
    env.reset(seed=0)
    *most, send = list(_actions(env, stop=7))
    env.step(Type("and more"))
    *_, terminated, _, info = env.step(send)
    assert not terminated and info["raw_reward"] == 0
    *_, terminated, _, info = env.step(Finished("done"))
    assert terminated and not info["success"]
    env.close()


def _actions(env: WebEnv, stop: int) -> Iterator[object]:
    for number, action in enumerate(oracle.solve(env)):
        yield action
        if number == stop:
            return
        env.step(action)
