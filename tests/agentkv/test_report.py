"""The page in a real Chromium: offline, no error, no request, one entry per step, everything said shown as text."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from agentkv import report
from agentkv.envs.actions import Click, Drag, Scroll, Type
from agentkv.envs.browser import find_chromium
from agentkv.grammars import ParseError
from agentkv.reading import read_run
from agentkv.report import write_report
from tests.agentkv.fake_episodes import FakePolicy, fake_run

pytestmark = pytest.mark.browser
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>\u2028 {{x}} @@DATA ${1}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    actions = [Click(10.0, 20.5), Drag(1.0, 2.0, 30.0, 20.0), Scroll(5.0, 5.0, "down"), Type(EVIL), ParseError(EVIL)]
    policies = {
        "full": FakePolicy(actions, text=EVIL),
        "gui-kv": FakePolicy([Click(3.0, 4.0)], share=0.4),
        "snapkv": FakePolicy([ParseError("a"), ParseError("b"), ParseError("c")], share=0.4),
    }
    return fake_run(tmp_path_factory.mktemp("runs") / "r", policies, ("click-tab", "memory-code"), needed=4, goal=EVIL)


@pytest.fixture(scope="module")
def chromium():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright=playwright), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(run, chromium):
    """The opened page; afterwards: no console message, no error, no request but the file itself."""
    path, seen = write_report(run, notes=["a note <b>of</b> ours"]), []
    context = chromium.new_context(offline=True, reduced_motion="reduce")
    opened = context.new_page()
    opened.on("console", lambda message: seen.append(message.text))
    opened.on("pageerror", lambda error: seen.append(str(error)))
    opened.on("request", lambda request: seen.append(request.url) if request.url[:5] != "data:" else None)
    opened.goto(path.as_uri())
    yield opened
    assert opened.evaluate("window.hacked") is None
    context.close()
    assert seen == [path.as_uri()]


def test_one_entry_per_step_of_every_episode(page, run):
    episodes = read_run(run).episodes
    assert page.locator(".pair").count() == 4
    for index in range(4):
        page.locator(f'[data-pair="{index}"]').click()
        pair = page.evaluate(f"DATA.pairs[{index}]")
        mine = [e for e in episodes if (e["task"], e["seed"]) == (pair["task"], pair["seed"])]
        assert page.locator("[data-step]").count() == max(len(e["steps"]) for e in mine)
        assert {m: len(p["steps"]) for m, p in pair["plays"].items()} == {e["method"]: len(e["steps"]) for e in mine}


def test_the_table_is_the_summary(page):
    rows = page.locator("#summary tbody tr")
    assert [rows.nth(i).locator(".method").inner_text() for i in range(3)] == ["full", "gui-kv", "snapkv"]
    cells = rows.nth(1).locator("td").all_inner_texts()
    assert "100\u202f%" in cells[1] and "n=4" in cells[1] and cells[2].startswith("40\u202f%")
    assert page.locator("#notes").inner_text() == "a note <b>of</b> ours"
    assert page.locator(".task").count() == 2


def test_what_was_said_is_text(page):
    assert page.locator(".goal").inner_text().startswith("</script><script>")
    assert page.locator(".said").first.inner_text().startswith("</script><script>")
    page.locator('[data-step="3"]').click()
    assert page.locator(".card .did").first.inner_text().startswith("type “</script>")
    assert page.locator("#player img[src=x]").count() == 0


def test_the_marker_lies_on_the_executed_pixel(page):
    picture = page.locator(".card").first.locator("img").bounding_box()
    mark = page.locator(".card").first.locator("svg.click circle").last.bounding_box()
    x, y = mark["x"] + mark["width"] / 2 - picture["x"], mark["y"] + mark["height"] / 2 - picture["y"]
    assert x / picture["width"] * 30 == pytest.approx(10.0, abs=0.2)
    assert y / picture["height"] * 40 == pytest.approx(20.5, abs=0.2)


def test_an_unreadable_answer_shows_its_error_and_no_marker(page):
    page.locator('[data-step="2"]').click()
    last = page.locator(".card").nth(2)
    assert last.locator(".wrong").inner_text() == "c" and last.locator("svg.click").count() == 0
    assert last.locator(".badge").inner_text() == "parse failures"


def test_the_overlay_is_the_share_that_was_kept(page):
    page.locator('[data-step="1"]').click()
    frames = page.locator(".held tbody tr").nth(1).locator("canvas")
    assert frames.count() == 2
    frame = page.evaluate("DATA.pairs[0].plays['gui-kv'].steps[1].frames[0]")
    alpha = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 == 3)"
    kept = list(base64.b64decode(frame["kept"]))
    assert [a < 20 for a in frames.first.evaluate(alpha)] == [k == 100 for k in kept], "a veil where it was dropped"
    page.get_by_role("button", name="tint").click()
    assert [a > 20 for a in frames.first.evaluate(alpha)] == [k == 100 for k in kept], "colour where it was kept"
    page.get_by_role("button", name="off").click()
    assert page.locator(".held canvas").count() == 0


def test_methods_are_compared_step_by_step(page):
    told = page.locator(".compare li").all_inner_texts()
    assert told[0] == "gui-kv leaves full at step 1: click (3, 4) where full does: click (10, 20.5)"
    assert told[1].startswith("snapkv leaves full at step 1: no action")
    rows = page.locator(".compare tbody tr")
    assert [rows.nth(i).locator(".apart-mark").count() for i in range(3)] == [0, 1, 1]
    frames = page.evaluate("DATA.pairs[0].plays['gui-kv'].steps[1].frames")
    bars = rows.nth(1).locator("td").nth(1).locator("rect")
    heights = [float(bars.nth(i).get_attribute("height")) / 16 for i in range(len(frames))]
    kept = [list(base64.b64decode(frame["kept"])) for frame in frames]
    assert heights == pytest.approx([sum(x) / len(x) / 100 for x in kept])
    rows.nth(0).locator("td").nth(2).click()
    assert page.locator('[data-step][aria-current="step"]').inner_text() == "3"


def test_keys_filters_and_the_address(page):
    page.keyboard.press("ArrowRight")
    assert page.locator('[data-step][aria-current="step"]').inner_text() == "2" and page.url.endswith(
        "#click-tab/1000000/2"
    )
    page.locator("#task").select_option("memory-code")
    assert page.locator(".pair").count() == 2
    page.locator("#differ").check()
    assert page.locator(".pair").count() == 2, "snapkv fails everywhere"
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_every_picture_has_a_text_and_every_button_a_name(page):
    assert page.locator("img:not([alt])").count() == 0
    assert page.evaluate("[...document.querySelectorAll('button')].every((b) => b.textContent.trim() || b.ariaLabel)")


def test_the_page_is_one_file_without_addresses(run):
    html = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html) and "http://www.w3.org/2000/svg" in html
    assert len(re.findall("https?://", html)) == 1, "the name of SVG's namespace, which nothing loads"
    assert "default-src 'none'" in html


def test_a_bounded_page_says_what_it_left_out(run, chromium):
    whole = write_report(run).stat().st_size
    path = write_report(run, max_bytes=1)
    assert path.stat().st_size < whole
    opened = chromium.new_page()
    opened.goto(path.as_uri())
    assert opened.locator("#left-out").inner_text().startswith("3 of 4 episodes were left out to keep this page small")
    opened.close()


def test_long_episodes_are_cut(run, monkeypatch):
    monkeypatch.setattr(report, "MAX_STEPS", 2)
    data = json.loads(re.search(r'id="data">\n(.*?)\n *</script>', write_report(run).read_text(), re.S).group(1))
    play = data["pairs"][0]["plays"]["full"]
    assert len(play["steps"]) == 2 and play["steps_played"] > 2


def test_large_screenshots_become_jpegs(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    uri = report._data_uri((tmp_path / "a.png").read_bytes())
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < (tmp_path / "a.png").stat().st_size


def test_an_empty_run_opens(tmp_path, chromium):
    path = write_report(fake_run(tmp_path / "r", {"full": FakePolicy()}, seeds=1))
    for done in (tmp_path / "r").rglob("episode.json"):
        done.unlink()
    opened = chromium.new_page()
    opened.goto(write_report(path.parent).as_uri())
    assert opened.locator("#player").inner_text() == "No finished episode yet."
    opened.close()
