"""More of what a person does with pages, each on a page of its own; `pytest -v` on this file prints the list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from agentkv.envs import live
from agentkv.envs.actions import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    Move,
    PressBack,
    RightClick,
    Scroll,
    TripleClick,
    Type,
)
from agentkv.envs.browser import Browser
from agentkv.envs.web import WebEnv
from tests.envs.conftest import Site

HEAD = "<!doctype html><meta charset=utf-8><style>body{margin:0;font:16px Arial} #t,#b{position:absolute;left:0;top:0}"
HEAD += "#t{width:200px;height:40px} #b{top:60px;width:200px;height:40px} #t:is([type=checkbox]){width:20px}</style>"
FIELD, AREA, LINE = "<input id=t value='{}'>", "<textarea id=t></textarea>", "<p id=t>hello brave world</p>"
BUTTON = '<button id=b onclick="{}">press</button>'
VALUE, TITLE = "t.value", "document.title"
HERE, THERE = Click(100, 20), Click(100, 80)  # what has the id t, and b


def keys(*chord: str) -> Hotkey:
    return Hotkey(chord)


ALL, END = keys("Control", "a"), keys("End")


@dataclass(frozen=True)
class Case:
    """A page, what is done to it, a script that says what came of it, and what that must be."""

    name: str
    body: str
    acts: tuple[Action, ...]
    asked: str
    answer: Any


CASES = [
    Case("Enter makes a line of a text area", AREA, (HERE, Type("a\nb")), VALUE, "a\nb"),
    Case(
        "Enter in a field sends the form",
        f"<form onsubmit=\"document.title='sent';return false\">{FIELD}</form>",
        (HERE, Type("x\n")),
        TITLE,
        "sent",
    ),
    Case("all is marked and written over", FIELD.format("old"), (HERE, ALL, Type("new")), VALUE, "new"),
    Case("a capital in a chord is its key", FIELD.format("old"), (HERE, keys("Control", "A"), Type("n")), VALUE, "n"),
    Case(
        "Shift makes capitals and signs", FIELD.format(""), (HERE, keys("Shift", "a"), keys("Shift", "1")), VALUE, "A!"
    ),
    Case("a held Shift does so too", FIELD.format(""), (HERE, KeyDown("Shift"), keys("a"), KeyUp("Shift")), VALUE, "A"),
    Case("undo", FIELD.format(""), (HERE, Type("abc"), keys("Control", "z")), VALUE, ""),
    Case(
        "redo", FIELD.format(""), (HERE, Type("abc"), keys("Control", "z"), keys("Control", "Shift", "z")), VALUE, "abc"
    ),
    Case(
        "copy and paste",
        FIELD.format("ab"),
        (HERE, ALL, keys("Control", "c"), END, keys("Control", "v")),
        VALUE,
        "abab",
    ),
    Case("a word is deleted", FIELD.format("one two"), (HERE, END, keys("Control", "Backspace")), VALUE, "one "),
    Case(
        "marked with Shift and deleted",
        FIELD.format("one"),
        (HERE, END, keys("Shift", "Home"), keys("Delete")),
        VALUE,
        "",
    ),
    Case(
        "a double click takes a word", FIELD.format("hello world"), (DoubleClick(15, 20), Type("X")), VALUE, "X world"
    ),
    Case("a triple click takes a line", FIELD.format("hello world"), (TripleClick(15, 20), Type("X")), VALUE, "X"),
    Case("text is marked by dragging", LINE, (Drag(2, 25, 120, 26),), "getSelection().toString().length > 8", True),
    Case("signs of other scripts", FIELD.format(""), (HERE, Type("é😀中文")), VALUE, "é😀中文"),
    Case("what is read only stays", "<input id=t readonly value=a>", (HERE, Type("x")), VALUE, "a"),
    Case(
        "what is disabled does nothing",
        "<button id=t disabled onclick=\"document.title='no'\">x</button>",
        (HERE,),
        TITLE,
        "",
    ),
    Case("the field with autofocus takes keys", "<input id=t autofocus>", (Type("x"),), VALUE, "x"),
    Case(
        "Tab goes in the page's order",
        "<input id=t tabindex=2><input id=b tabindex=1>",
        (keys("Tab"), Type("1\t2")),
        "t.value + b.value",
        "21",
    ),
    Case("a box by Space", "<input type=checkbox id=t>", (keys("Tab"), keys("Space")), "t.checked", True),
    Case(
        "a radio button by arrows",
        "<input type=radio name=r checked><input type=radio name=r id=t>",
        (keys("Tab"), keys("ArrowRight")),
        "t.checked",
        True,
    ),
    Case(
        "a slider by a click",
        "<input type=range id=t value=0>",
        (Click(100, 20),),
        "40 < t.value && t.value < 60",
        True,
    ),
    Case("a number by its spinner", "<input type=number id=t value=5>", (Click(196, 18),), VALUE, "6"),
    Case("a date by its segments", "<input type=date id=t>", (Click(20, 20), Type("05/17/2024")), VALUE, "2024-05-17"),
    Case("a list by a letter", "<select id=t><option>a<option>cat</select>", (keys("Tab"), Type("c")), VALUE, "cat"),
    Case(
        "a text that is edited in the page",
        "<div id=t contenteditable>abc</div>",
        (HERE, END, Type("d")),
        "t.innerText",
        "abcd",
    ),
    Case(
        "bold by keys in it",
        "<div id=t contenteditable>abc</div>",
        (HERE, ALL, keys("Control", "b")),
        "t.querySelector('b') !== null",
        True,
    ),
    Case(
        "things are dragged and dropped",
        "<div id=t draggable=true ondragstart=\"event.dataTransfer.setData('text/plain', 'it')\">a</div><div id=b "
        "ondragover='event.preventDefault()' ondrop=\"document.title=event.dataTransfer.getData('text')\">b</div>",
        (Drag(100, 20, 100, 80),),
        TITLE,
        "it",
    ),
    Case(
        "things follow the pointer",
        "<div id=t></div><script>t.onpointerdown=e=>{t.setPointerCapture(e.pointerId);t.onpointermove=m=>{t.style.left="
        "m.clientX-100+'px'}}</script>",
        (Drag(100, 20, 240, 20),),
        "t.style.left",
        "140px",
    ),
    Case(
        "a canvas is drawn on",
        "<canvas id=t width=200 height=40></canvas><script>let n=0;t.onmousemove=e=>{n+=e.buttons}</script>",
        (Drag(10, 10, 150, 30),),
        "n >= 5",
        True,
    ),
    Case(
        "a menu opens below the pointer",
        "<style>#b{display:none}#t:hover #b,#b:hover{display:block}#b{top:40px}</style>"
        "<div id=t>menu<div id=b onclick=\"document.title='item'\">item</div></div>",
        (Move(100, 20), Click(100, 60)),
        TITLE,
        "item",
    ),
    Case(
        "a menu of the page by the right button",
        "<div id=t oncontextmenu=\"event.preventDefault();document.title='menu'\">x</div>",
        (RightClick(100, 20),),
        TITLE,
        "menu",
    ),
    Case(
        "a long press",
        "<button id=t onpointerdown='this.at=Date.now()' onpointerup='document.title=Date.now()-this.at'>x</button>",
        (LongPress(100, 20),),
        "document.title >= 500",
        True,
    ),
    Case(
        "what lies on top takes the click",
        f"{BUTTON.format('document.title=1')}<div style='position:fixed;inset:0' onclick='this.remove()'></div>",
        (THERE, THERE),
        TITLE,
        "1",
    ),
    Case(
        "a dialog is left by Escape",
        f"{BUTTON.format('t.showModal()')}<dialog id=t>hi</dialog>",
        (THERE, keys("Escape")),
        "t.open",
        False,
    ),
    Case(
        "a popover closes beside it",
        "<button id=b popovertarget=t>x</button><div popover id=t>hi</div>",
        (THERE, Click(350, 250)),
        "t.matches(':popover-open')",
        False,
    ),
    Case(
        "the wheel turns what is under it",
        "<div style='height:100px;overflow:auto' id=s><p style='height:900px'></div><p style='height:900px'>",
        (Scroll(50, 50, "down", 300),),
        "[s.scrollTop, scrollY]",
        [300, 0],
    ),
    Case(
        "more comes when the end is near",
        "<div id=l></div><script>n=0;add=()=>{for(let i=9;i--;)l.insertAdjacentHTML('beforeend',`<p>${n++}`)};"
        "add();add();onscroll=()=>innerHeight+scrollY>document.documentElement.scrollHeight-50&&add()</script>",
        (Scroll(50, 50, "down", 3000),),
        "n > 18",
        True,
    ),
    Case(
        "a mark in the page, and back",
        "<a id=t href='#e'>x</a><p style='height:900px'><p id=e>e",
        (Click(5, 10), PressBack()),
        "location.hash + scrollY",
        "0",
    ),
    Case(
        "a page that changes its address, and back",
        BUTTON.format("history.pushState(1,'','/two')"),
        (THERE, PressBack()),
        "location.pathname",
        "/",
    ),
    Case(
        "a frame of the page",
        '<iframe id=t srcdoc=\'<body style="margin:0"><input style="width:150px">\'></iframe>',
        (Click(50, 15), Type("in")),
        "frames[0].document.querySelector('input').value",
        "in",
    ),
    Case(
        "a shadow root that is closed",
        "<div id=t></div><script>r=t.attachShadow({mode:'closed'});r.innerHTML='<input>'</script>",
        (Click(50, 12), Type("s")),
        "r.querySelector('input').value",
        "s",
    ),
    Case(
        "a place is not told",
        BUTTON.format("navigator.geolocation.getCurrentPosition(Boolean, (e) => (document.title = e.code))"),
        (THERE,),
        TITLE,
        "1",
    ),
    Case("printing goes on", BUTTON.format("print(); document.title = 'after'"), (THERE,), TITLE, "after"),
]


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[tuple[WebEnv, Site]]:
    site = Site()
    env = live.make(site.page(HEAD), "try all", browser, viewport=(400, 300), max_steps=10_000)
    env.reset(seed=0)
    yield env, site
    env.close()
    site.shutdown()
    site.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_person_gets(case: Case, page: tuple[WebEnv, Site]) -> None:
    env, site = page
    env.page.goto(site.page(HEAD + case.body))
    env.tab.settle()
    for action in case.acts:
        *_, info = env.step(action)
        assert info["error"] == ""
    assert env.page.evaluate(case.asked) == case.answer
