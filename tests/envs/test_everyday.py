"""What a person does with an ordinary page, by mouse and keys alone: `pytest -v` on this file prints the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentkv.envs import live
from agentkv.envs.actions import Action, Click, Drag, Hotkey, KeyDown, KeyUp, Scroll, Type
from agentkv.envs.browser import Browser
from agentkv.envs.web import WebEnv

PAGE = Path(__file__).with_name("everyday.html")


def _nodes(node: dict[str, Any], inside: bool) -> Iterator[dict[str, Any]]:
    """Elements with children inside of a popup."""
    inside = inside or "popup" in " ".join(node.get("attributes", [])).split()
    children = node.get("children", [])
    if inside and children:
        yield node
    for child in [*children, *node.get("shadowRoots", [])]:
        yield from _nodes(child, inside)


class Person:
    """Sees positions, as eyes do, and acts by mouse and keys."""

    def __init__(self, env: WebEnv) -> None:
        self.env = env

    def do(self, *actions: Action) -> dict[str, Any]:
        for action in actions:
            *_, info = self.env.step(action)
            assert info["error"] == ""
        return info

    def press(self, *keys: str) -> dict[str, Any]:
        return self.do(Hotkey(keys))

    def click(self, selector: str, right: float | None = None, within: str | None = None) -> dict[str, Any]:
        """On the middle of an element, or `right` pixels from its right edge."""
        page = self.env.page.frame_locator(within) if within else self.env.page
        box = page.locator(selector).bounding_box()
        assert box is not None
        x = box["x"] + (box["width"] / 2 if right is None else box["width"] - right)
        return self.do(Click(x, box["y"] + box["height"] / 2))

    def seen(self, text: str) -> tuple[float, float]:
        """The middle of the popup's part that says `text`."""
        session = self.env.page.context.new_cdp_session(self.env.page)
        tree = session.send("DOM.getDocument", {"depth": -1, "pierce": True})["root"]
        parts = [node for node in _nodes(tree, False) if any(n.get("nodeValue") == text for n in node["children"])]
        assert parts, f"nothing says {text!r}"
        quad = session.send("DOM.getBoxModel", {"nodeId": parts[0]["nodeId"]})["model"]["content"]
        session.detach()
        return (quad[0] + quad[4]) / 2, (quad[1] + quad[5]) / 2

    def choose(self, *texts: str) -> dict[str, Any]:
        for text in texts:
            info = self.do(Click(*self.seen(text)))
        return info

    def value(self, name: str) -> Any:
        return self.env.page.evaluate("(id) => document.getElementById(id).value", name)

    def fired(self) -> list[str]:
        return self.env.page.evaluate("() => fired.splice(0)")

    def open(self) -> bool:
        """A popup stands in the document."""
        return self.env.page.evaluate("() => Boolean(document.querySelector('div[popover]:popover-open'))")


@pytest.fixture(scope="module")
def person(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    folder = tmp_path_factory.mktemp("everyday")
    (folder / "page.html").write_text(PAGE.read_text())
    Image.new("RGB", (40, 40), (0, 128, 0)).save(folder / "lazy.png")
    env = live.make((folder / "page.html").as_uri(), "try all", browser, viewport=(800, 600), max_steps=10_000)
    env.reset(seed=0)
    env.page.set_default_timeout(2000)
    yield Person(env)
    env.close()


@pytest.fixture(autouse=True)
def _at_rest(person: Person) -> Iterator[None]:
    person.env.page.evaluate("() => { fired.length = 0; scrollTo(0, 0); }")
    yield
    left = person.open()
    if left:
        person.press("Escape")
    assert not left


def a_list_opens_in_the_picture(who: Person) -> None:
    before = who.env.render()
    who.click("#single")
    assert who.open() and not np.array_equal(before, who.env.render())
    who.choose("two")
    assert who.value("single") == "two" and who.fired() == ["input single", "change single"]


def a_list_by_keys_alone(who: Person) -> None:
    who.env.page.evaluate("() => document.getElementById('keys').focus()")
    who.press("Alt", "ArrowDown")
    assert who.open()
    who.do(Hotkey(("ArrowDown",)), Hotkey(("ArrowDown",)))
    assert who.value("keys") == "red"
    who.press("Enter")
    assert who.value("keys") == "blue" and who.fired() == ["input keys", "change keys"]


def a_list_with_groups(who: Person) -> None:
    who.click("#grouped")
    who.choose("quince", "Nuts")
    assert who.open() and who.value("grouped") == "apple"
    who.choose("hazel")
    assert who.value("grouped") == "hazel"


def a_long_list_is_scrolled(who: Person) -> None:
    who.click("#long")
    x, y = who.seen("item 3")
    who.do(Scroll(x, y, "down", 1000))
    who.choose("item 60")
    assert who.value("long") == "item 60"


def letters_find_in_a_list(who: Person) -> None:
    who.click("#country")
    who.do(Type("fi\n"))
    assert who.value("country") == "Finland"


def escape_leaves_a_list(who: Person) -> None:
    who.click("#country")
    who.press("ArrowDown")
    who.press("Escape")
    assert who.value("country") == "Finland" and not who.open() and who.fired() == []


def a_press_beside_or_on_it_closes_a_list(who: Person) -> None:
    for again in ("#single", "#below"):
        who.click("#single")
        who.do(Click(790, 500)) if again == "#below" else who.click(again)
        assert not who.open()


def several_of_a_list_with_control(who: Person) -> None:
    box = who.env.page.locator("#many").bounding_box()
    first, third = (Click(box["x"] + 10, box["y"] + down) for down in (8, 42))
    who.do(first, KeyDown("Control"), third, KeyUp("Control"))
    assert who.env.page.evaluate("() => [...$('many').selectedOptions].map((o) => o.value)") == ["a", "c"]


def a_page_with_a_menu_of_its_own(who: Person) -> None:
    who.click("#custom")
    assert not who.open() and who.env.page.inner_text("#menu") == "own menu"


def a_list_in_a_shadow_root(who: Person) -> None:
    who.click("#deep")
    who.choose("out")
    assert who.env.page.evaluate("() => $('shade').shadowRoot.querySelector('select').value") == "out"


def a_list_in_a_small_frame(who: Person) -> None:
    who.click("#framed", within="#frame")
    who.choose("right")
    assert who.env.page.frame_locator("#frame").locator("#framed").input_value() == "right"


def a_list_in_a_modal_dialog(who: Person) -> None:
    who.click("#modal")
    who.click("#inside")
    who.choose("yes")
    assert who.value("inside") == "yes"
    who.press("Escape")
    assert not who.env.page.evaluate("() => $('box').open")


def a_day_of_the_next_month(who: Person) -> None:
    who.click("#date", right=10)
    who.choose("\u203a", "17")
    assert who.value("date") == "2026-04-17" and who.fired() == ["input date", "change date"]


def a_birthday_decades_ago(who: Person) -> None:
    who.click("#birth", right=10)
    year = who.env.page.evaluate("() => new Date().getUTCFullYear()")
    month = who.env.page.evaluate("() => new Date().toLocaleString('en', {month: 'long', timeZone: 'UTC'})")
    who.choose(f"{month} {year} \u25be", *["\u00ab"] * 3, "\u203a", "Jul", "23")
    assert who.value("birth") == f"{year - 29}-07-23"


def a_day_out_of_bounds(who: Person) -> None:
    who.click("#bounded", right=10)
    who.choose("25")
    assert who.open() and who.value("bounded") == "2026-03-10"
    who.choose("12")
    assert who.value("bounded") == "2026-03-12"


def a_date_is_typed(who: Person) -> None:
    who.click("#typed", right=100)
    who.do(Type("05172024"))
    assert who.value("typed") == "2024-05-17"


def a_calendar_by_keys(who: Person) -> None:
    who.click("#typed", right=10)
    who.do(Hotkey(("ArrowDown",)), Hotkey(("ArrowRight",)), Hotkey(("PageDown",)), Hotkey(("Enter",)))
    assert who.value("typed") == "2024-06-25"


def a_month(who: Person) -> None:
    who.click("#month", right=10)
    who.choose("\u203a", "Sep")
    assert who.value("month") == "2027-09"


def a_week(who: Person) -> None:
    who.click("#week", right=10)
    who.choose("18")
    assert who.value("week") == "2026-W12"


def a_time(who: Person) -> None:
    who.click("#time", right=10)
    x, y = who.seen("02")
    who.do(Click(x, y), Click(*who.seen("PM")))
    assert who.value("time") == "14:30"
    who.press("Escape")
    assert who.value("time") == "09:30"
    who.click("#time", right=10)
    who.do(Click(*who.seen("PM")), Hotkey(("Enter",)))
    assert who.value("time") == "21:30"


def a_day_and_its_time(who: Person) -> None:
    who.click("#moment", right=10)
    who.do(Click(*who.seen("PM")), Click(*who.seen("21")), Hotkey(("Enter",)))
    assert who.value("moment") == "2026-03-21T21:30"


def a_colour_by_mouse(who: Person) -> None:
    who.click("#colour")
    box = who.env.page.locator("#colour").bounding_box()
    left, top = box["x"], box["y"] + box["height"]
    who.do(Click(left + 205, top + 9))
    red, green, blue = bytes.fromhex(who.value("colour")[1:])
    assert red > 240 and green == blue < 16 and who.fired() == ["input colour"]
    who.choose("OK")
    assert who.fired() == ["change colour"]


def a_colour_by_its_number(who: Person) -> None:
    who.click("#hex")
    who.do(Type("#1a2b3c"), Hotkey(("Enter",)))
    assert who.value("hex") == "#1a2b3c"


def suggestions_of_a_field(who: Person) -> None:
    who.click("#town")
    who.do(Type("p"))
    with pytest.raises(AssertionError):
        who.seen("Oslo" + " ")
    who.choose("Porto")
    assert who.value("town") == "Porto" and who.fired()[-2:] == ["input town", "change town"]


def suggestions_by_keys(who: Person) -> None:
    who.click("#town")
    who.do(Hotkey(("Control", "a")), Type("pra"), Hotkey(("ArrowDown",)), Hotkey(("Enter",)))
    assert who.value("town") == "Prague"


def a_button_that_opens_a_picker(who: Person) -> None:
    who.click("#pick")
    who.choose("28")
    assert who.value("hidden") == "2026-03-28"


def a_slider_is_dragged(who: Person) -> None:
    box = who.env.page.locator("#range").bounding_box()
    y = box["y"] + box["height"] / 2
    who.do(Drag(box["x"] + 8, y, box["x"] + box["width"] - 8, y))
    assert who.value("range") == "100"


def a_number_by_its_arrows(who: Person) -> None:
    who.click("#number")
    who.do(Hotkey(("ArrowUp",)), Hotkey(("ArrowUp",)))
    assert who.value("number") == "7"


def what_is_folded_opens(who: Person) -> None:
    who.click("#details summary")
    assert who.env.page.evaluate("() => $('details').open")


def a_box_is_ticked_by_its_label(who: Person) -> None:
    who.click("#label", right=10)
    assert who.env.page.is_checked("#check")


def a_form_says_what_is_missing(who: Person) -> None:
    before = who.env.render()
    info = who.click("#send")
    assert info["told"] == ["the form was not sent: required: Please fill out this field."]
    assert who.open() and not np.array_equal(before, who.env.render())
    who.do(Type("x"))
    assert not who.open() and who.value("required") == "x"


def a_copy_button_and_paste(who: Person) -> None:
    who.click("#copy")
    who.click("#paste")
    who.press("Control", "v")
    assert who.value("paste") in ("copied text", "")  # a file has no clipboard of its own: see test_manners
    who.do(Hotkey(("Control", "a")), Type("mine"), Hotkey(("Control", "a")), Hotkey(("Control", "x")))
    who.do(Hotkey(("Control", "v")), Hotkey(("Control", "v")))
    assert who.value("paste") == "minemine"


def scrolling_by_keys_and_wheel_is_over(who: Person) -> None:
    who.do(Click(790, 500))
    for act in (Hotkey(("End",)), Hotkey(("Home",)), Hotkey(("PageDown",)), Scroll(400, 300, "down", 300)):
        before = who.env.page.evaluate("() => scrollY")
        info = who.do(act)
        shot = who.env.render()
        assert who.env.page.evaluate("() => scrollY") != before and info["told"] == []
        who.env.page.wait_for_timeout(150)
        assert np.array_equal(shot, who.env.tab.screenshot())


def a_smooth_jump_is_over(who: Person) -> None:
    who.click("#smooth")
    shot = who.env.render()
    who.env.page.wait_for_timeout(300)
    assert who.env.page.evaluate("() => scrollY") > 500 and np.array_equal(shot, who.env.tab.screenshot())


def a_late_picture_is_there(who: Person) -> None:
    who.click("#smooth")
    box = who.env.page.locator("#lazy").bounding_box()
    assert who.env.render()[int(box["y"]) + 20, int(box["x"]) + 20].tolist() == [0, 128, 0]


def what_does_not_end_is_told(who: Person) -> None:
    assert who.click("#move")["told"] == ["the page is still moving"]


CASES = [value for value in list(globals().values()) if getattr(value, "__annotations__", {}).get("who") == "Person"]


@pytest.mark.browser
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.replace("_", " "))
def test_a_person_can(case: Callable[[Person], None], person: Person) -> None:
    case(person)


def test_there_are_enough() -> None:
    assert len(CASES) >= 30
