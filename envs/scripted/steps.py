"""Steps of a script on pages of many parts: click what has this text, fill a field, read a value and use it later.

A script is `play(goal's reader, steps)`: what the goal names is known from the start, `read` adds what a page shows,
and texts in braces are filled from both. What is out of sight is scrolled to with the wheel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator

from ..actions import Action, Click, Hotkey, Scroll, TripleClick, Type, Wait
from .look import Element, Look, ScriptLost

Known = dict[str, str]
Step = Callable[[Look, Known], Iterator[Action]]
Row = tuple[str, str]  # a CSS selector and a text: the part of the page to look in
_MAX_TURNS = 8  # of the wheel, for one element
_PATIENCE = 0.5  # seconds

# where to turn the wheel, and how far across and down, so that the element comes into sight
_REACH = """
([selector, at]) => {
  const r = document.querySelectorAll(selector)[at].getBoundingClientRect();
  const [x, y] = [r.left + r.width / 2, r.top + r.height / 2];
  for (let box = document.querySelectorAll(selector)[at].parentElement; box; box = box.parentElement) {
    const style = getComputedStyle(box);
    const b = box.getBoundingClientRect();
    const [left, right] = [Math.max(b.left, 0), Math.min(b.right, innerWidth)];
    const [top, bottom] = [Math.max(b.top, 0), Math.min(b.bottom, innerHeight)];
    const across = /auto|scroll/.test(style.overflowX) && box.scrollWidth > box.clientWidth + 1;
    const down = /auto|scroll/.test(style.overflowY) && box.scrollHeight > box.clientHeight + 1;
    const middle = [(left + right) / 2, (top + bottom) / 2];
    if (down && (y < top || y > bottom)) return [...middle, 0, y - middle[1]];
    if (across && (x < left || x > right)) return [...middle, x - middle[0], 0];
  }
  const edge = [innerWidth * 0.9, innerHeight / 2];
  return x < 0 || x > innerWidth ? [...edge, x - innerWidth / 2, 0] : [...edge, 0, y - innerHeight / 2];
}
"""


def play(values: Callable[[str], Known], *steps: Step) -> Callable[[Look], Iterator[Action]]:
    """The script of these steps; `values(goal)` gives what the goal names."""

    def script(look: Look) -> Iterator[Action]:
        known = values(look.goal)
        for step in steps:
            yield from step(look, known)

    return script


def _inside(element: Element, around: Element) -> bool:
    (x, y, width, height), (left, top, across, down) = element.box, around.box
    middle = (x + width / 2, y + height / 2)
    return left <= middle[0] <= left + across and top <= middle[1] <= top + down


def _matches(look: Look, known: Known, selector: str, text: str, row: Row | None) -> list[tuple[int, Element]]:
    """Elements of the selector with this very text, else those that hold it; with their numbers on the page."""
    selector, text = selector.format(**known), text.format(**known)
    found = list(enumerate(look.all(selector)))
    if row:
        rows = [element for _, element in _matches(look, known, *row, None)]
        found = [pair for pair in found if any(_inside(pair[1], around) for around in rows)]
    same = [pair for pair in found if pair[1].text == text]
    return same or [pair for pair in found if text in pair[1].text]


def _seek(look: Look, known: Known, selector: str, text: str, row: Row | None) -> Generator[Action, None, Element]:
    """Turns the wheel until one is in sight, and returns it."""
    for _ in range(_MAX_TURNS):
        found = _matches(look, known, selector, text, row)
        seen = [element for _, element in found if element.points]
        if seen:
            return seen[0]
        if not found:
            yield Wait(_PATIENCE)  # a page that still draws itself
            continue
        x, y, across, down = look.evaluate(_REACH, [selector.format(**known), found[0][0]])
        way = ("right" if across > 0 else "left") if across else ("down" if down > 0 else "up")
        yield Scroll(round(x), round(y), way, min(max(abs(round(across or down)), 40), 500))
    raise ScriptLost(f"no visible {selector!r} with {text.format(**known)!r} for the goal {look.goal!r}")


def click(selector: str, text: str = "", row: Row | None = None) -> Step:
    """A click on the first such element, in the part of the page that `row` names."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        element = yield from _seek(look, known, selector, text, row)
        yield look.click(element)

    return step


def fill(selector: str, text: str, row: Row | None = None) -> Step:
    """The field holds `text` alone afterwards."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        element = yield from _seek(look, known, selector, "", row)
        yield TripleClick(*look.point(element)) if element.value else look.click(element)
        yield Type(text.format(**known))

    return step


def corner(selector: str) -> Step:
    """A click near the left end: the first part of a date, the first line of a text."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        element = yield from _seek(look, known, selector, "", None)
        yield Click(*min(element.points, key=lambda point: (point[0], abs(point[1] - element.box[1] - 14))))

    return step


def write(text: str) -> Step:
    """Types into what has the focus."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        yield Type(text.format(**known))

    return step


def press(*keys: str) -> Step:
    """Keys pressed together."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        yield Hotkey(keys)

    return step


def read(pattern: str, selector: str, text: str = "", row: Row | None = None) -> Step:
    """Keeps the named groups of `pattern` in the text (or value) of an element in sight."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        element = yield from _seek(look, known, selector, text, row)
        shown = element.text or element.value
        match = re.search(pattern.format(**known), shown)
        if match is None:
            raise ScriptLost(f"{shown[:80]!r} has no {pattern!r} for the goal {look.goal!r}")
        known.update(match.groupdict())

    return step


def work(make: Callable[[Known], Known]) -> Step:
    """Adds what follows from what is known, without looking."""

    def step(look: Look, known: Known) -> Iterator[Action]:
        known.update(make(known))
        yield from ()

    return step
