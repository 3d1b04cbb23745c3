"""Nothing outside the allow-list is reached, whatever the page tries, and every attempt is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from agentkv import envs
from agentkv.envs import live
from agentkv.envs.actions import Click, Wait
from agentkv.envs.browser import Browser, find_chromium
from agentkv.envs.tab import BrowserCrashed, PageNotLoaded
from agentkv.envs.web import WebEnv
from tests.envs.conftest import Site

SIZE = (200, 200)


@dataclass
class Arena:
    """`site` is the task's own origin, `elsewhere` must never be reached."""

    site: Site
    elsewhere: Site
    env: WebEnv

    def ready(self, script: str) -> WebEnv:
        """The page whose script runs at a click; B is the other origin."""
        head = f"const B = '{self.elsewhere.url}'; onclick = () => {{ {script} }};"
        self.site.page(f"<body style='height: 200px'><script>{head}</script>ready")
        self.elsewhere.hits.clear()
        self.env.reset(seed=0)
        return self.env


FRAME = "const f = document.createElement('iframe'); f.src = {}; document.body.append(f);"
ATTEMPTS = {
    "request": [
        "fetch(B + '/x').catch(() => 0)",
        "new Image().src = B + '/x.png'",
        "navigator.sendBeacon(B + '/x', 'secret')",
        "new EventSource(B + '/x')",
        "location = 'javascript:void fetch(`' + B + '/x`)'",
        "new Worker(URL.createObjectURL(new Blob([`fetch('${B}/x')`])))",
        "document.head.insertAdjacentHTML('beforeend', `<link rel=stylesheet href='${B}/x.css'>`)",
    ],
    "navigation": [
        "location = B + '/x'",
        "document.head.insertAdjacentHTML('beforeend', `<meta http-equiv=refresh content='0;url=${B}/x'>`)",
        "document.body.innerHTML = `<form method=post action='${B}/x'>`; document.forms[0].submit()",
        FRAME.format("B + '/x'"),
        FRAME.format("'data:text/html,<p>inline'"),
        FRAME.format("URL.createObjectURL(new Blob(['<p>inline'], {type: 'text/html'}))"),
        "location = URL.createObjectURL(new Blob(['<p>inline'], {type: 'text/html'}))",
    ],
    "redirect": ["location = '/away'", "fetch('/away').catch(() => 0)", FRAME.format("'/away'")],
    "popup": ["window.open(B + '/x')", "window.open(B + '/x', '', 'noopener')"],
    "websocket": ["new WebSocket(B.replace('http', 'ws') + '/x')"],
    "upload": ["document.body.innerHTML = '<input type=file>'; document.querySelector('input').click()"],
    "download": ["const a = document.createElement('a'); a.href = '/file.bin'; a.click()"],
}


@pytest.fixture(scope="module")
def arena(browser: Browser) -> Iterator[Arena]:
    """One tab for all attempts, loaded anew for each: a context per attempt would triple the time."""
    site, elsewhere = Site(), Site()
    elsewhere.page("<title>elsewhere</title>", "/x")
    site.pages["/away"] = (302, {"Location": elsewhere.url + "/x"}, "")
    attachment = {"Content-Disposition": "attachment", "Content-Type": "application/octet-stream"}
    site.pages["/file.bin"] = (200, attachment, "x")
    url = site.page("<body>empty")
    env = live.make(url, "click", browser, viewport=SIZE, reuse_tab=True)
    yield Arena(site, elsewhere, env)
    env.close()
    for server in (site, elsewhere):
        server.shutdown()
        server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize(("kind", "script"), [(kind, script) for kind, all_ in ATTEMPTS.items() for script in all_])
def test_attempts_are_aborted_and_reported(arena: Arena, kind: str, script: str, reliability) -> None:
    env = arena.ready(script)
    *_, info = env.step(Click(50, 150))
    blocked = list(info["blocked"])
    for _ in range(20):
        if any(entry["kind"] == kind for entry in blocked) and len(env.page.context.pages) == 1:
            break
        *_, info = env.step(Wait(0.1))
        blocked += info["blocked"]
    assert kind in {entry["kind"] for entry in blocked}, blocked
    assert all(entry["reason"] and entry["url"] for entry in blocked)
    assert arena.elsewhere.hits == []
    assert len(env.page.context.pages) == 1
    reliability(8, f"a page tries another origin: {kind}", "envs", "not reached, and reported")


@pytest.mark.browser
@pytest.mark.parametrize(
    "script",
    [
        "location = 'data:text/html,<title>inline</title>'",
        "location = 'file:///etc/passwd'",
        "location = 'chrome://version'",
        "window.open('javascript:fetch(`' + B + '/x`)')",
        "location = 'view-source:' + B",
        "document.head.insertAdjacentHTML('beforeend', `<link rel=preconnect href='${B}'>`)",
        "document.head.insertAdjacentHTML('beforeend', `<link rel=prefetch href='${B}/x'>`)",
    ],
)
def test_what_chromium_itself_refuses(arena: Arena, script: str, reliability) -> None:
    env = arena.ready(script)
    env.step(Click(50, 150))
    *_, info = env.step(Wait(0.3))
    assert info["url"].startswith((arena.site.url, "about:blank", "chrome-error:"))
    assert arena.elsewhere.hits == []
    reliability(8, "a page tries what Chromium itself refuses", "envs", "not reached")


@pytest.mark.browser
def test_a_blocked_link_leaves_the_agent_where_it_is(arena: Arena) -> None:
    env = arena.ready("location = B + '/x'")
    before = env.page.url
    env.step(Click(50, 150))
    *_, info = env.step(Wait(0.2))
    assert info["url"] == before and "ready" in env.page.inner_text("body")


@pytest.mark.browser
def test_inline_frames_are_taken_away(arena: Arena) -> None:
    env = arena.ready(FRAME.format("'data:text/html,<p>inline'"))
    env.step(Click(50, 150))
    env.step(Wait(0.2))
    assert env.page.evaluate("() => document.querySelectorAll('iframe').length") == 0


@pytest.mark.browser
def test_inline_pictures_are_shown(arena: Arena) -> None:
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    script = "const i = new Image(); i.onload = () => document.title = 'shown'; i.src = "
    env = arena.ready(f"{script} '{pixel}'")
    *_, info = env.step(Click(50, 150))
    env.page.wait_for_function("() => document.title === 'shown'", timeout=5000)
    assert info["blocked"] == []


@pytest.mark.browser
def test_own_origin_and_named_origins_pass(browser: Browser, site: Site, elsewhere: Site) -> None:
    url = site.page("<body><script>Promise.all([fetch('/y'), fetch(B + '/y', {mode: 'no-cors'})])</script>")
    site.page(site.pages["/"][2].replace("B +", f"'{elsewhere.url}' +"))
    env = live.make(url, "look", browser, viewport=SIZE, allow=(elsewhere.url,))
    env.reset(seed=0)
    *_, info = env.step(Wait(0.3))
    assert "/y" in site.hits and elsewhere.hits == ["/y"] and info["blocked"] == []
    env.close()


@pytest.mark.browser
def test_dialogs_are_dismissed_and_recorded(arena: Arena) -> None:
    env = arena.ready("document.title = [confirm('sure?'), prompt('name?')].join()")
    *_, info = env.step(Click(50, 150))
    assert info["dialogs"] == ["confirm: sure?", "prompt: name?"]
    assert env.page.title() == "false,"
    assert env.step(Wait(0))[-1]["dialogs"] == []


@pytest.mark.browser
def test_endless_alerts_end(arena: Arena) -> None:
    env = arena.ready("while (true) alert('again')")
    with pytest.raises(BrowserCrashed, match="more than 20 dialogs"):
        env.step(Click(50, 150))
        env.step(Wait(0.5))
    env.reset(seed=0)


@pytest.mark.browser
def test_permissions_are_denied(arena: Arena) -> None:
    env = arena.ready("")
    state = "async (name) => (await navigator.permissions.query({name})).state"
    assert [env.page.evaluate(state, name) for name in ("geolocation", "notifications", "camera")] == ["denied"] * 3


@pytest.mark.browser
def test_a_task_of_files_reaches_no_server(browser: Browser, elsewhere: Site) -> None:
    env = envs.make("memory-colour", browser)
    env.reset(seed=0)
    script = "(url) => { fetch(url).catch(() => 0); new WebSocket(url.replace('http', 'ws')); }"
    env.page.evaluate(script, elsewhere.url)
    *_, info = env.step(Wait(0.3))
    assert {entry["kind"] for entry in info["blocked"]} == {"request", "websocket"}
    assert elsewhere.hits == []
    env.close()


@pytest.mark.browser
def test_a_redirect_at_the_start_is_named(browser: Browser, arena: Arena) -> None:
    env = live.make(arena.site.url + "/away", "look", browser, viewport=SIZE)
    with pytest.raises(PageNotLoaded, match="it redirects to .* is not on the allow-list"):
        env.reset(seed=0)
    env.close()


AWAY = {
    "a script": "<script>location.href = '{}'</script>",
    "a refresh": "<meta http-equiv=refresh content='0;url={}'>",
    "a form": "<form id=f action='{}'></form><script>f.submit()</script>",
    "a script before one that never comes": "<script>location.href = '{}'</script><script src='/never'></script>",
    "again and again": "<script>setInterval(() => location.href = '{}', 1)</script><img src='/never'>",
}


@pytest.mark.parametrize("body", AWAY.values(), ids=AWAY)
def test_a_page_that_leaves_while_it_loads_names_the_refused_address(browser, site, elsewhere, body, reliability):
    away = f"{elsewhere.url}/away"
    env = live.make(site.page(body.format(away)), "look", browser)
    try:
        _, info = env.reset(seed=0)
    except PageNotLoaded as error:
        assert away in str(error) and "is not on the allow-list" in str(error)
    else:  # it was loaded before it tried: the page is shown, and what was refused stands in the record
        env.page.wait_for_timeout(500)
        told = [entry["url"] for entry in info["blocked"]] + [entry.url for entry in env.tab.blocked]
        assert away in {url.rstrip("?") for url in told} and env.tab.page.url.startswith(site.url)
    env.close()
    assert elsewhere.hits == []
    reliability(8, "a page that leaves while it loads", "envs", "the refused address is named")


def test_chromium_asks_nobody_for_itself(site, tmp_path, reliability):
    """Its own log of the network: no address is looked up, and no request but the page's leaves for a server."""
    log, page = tmp_path / "net.json", site.page("<p>hello")
    wrapper = tmp_path / "chromium"
    wrapper.write_text(f'#!/bin/sh\nexec "{find_chromium()}" --log-net-log="{log}" "$@"\n')
    wrapper.chmod(0o755)
    with Browser(wrapper) as logged:
        env = live.make(page, "look", logged)
        env.reset(seed=0)
        env.page.wait_for_timeout(6_000)
        env.close()
    told = json.loads(log.read_text())
    kinds = {number: name for name, number in told["constants"]["logEventTypes"].items()}
    events = [(kinds[event["type"]], event.get("params", {})) for event in told["events"]]
    looked_up = {str(params.get("host")) for kind, params in events if kind == "HOST_RESOLVER_MANAGER_JOB"}
    reached = {
        str(params["address"]) for kind, params in events if kind == "TCP_CONNECT_ATTEMPT" and "address" in params
    }
    assert looked_up == set() and reached <= {f"127.0.0.1:{site.server_port}", "127.0.0.1:1"}
    assert f"127.0.0.1:{site.server_port}" in reached, "the log is read as it is written"
    reliability(8, "what Chromium asks for itself", "envs", "no look-up, no connection")
