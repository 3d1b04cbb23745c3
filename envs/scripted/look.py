"""What a script sees of the live page: elements with the points at which a real mouse would hit them.

An element counts as visible only where nothing covers it, asked of the browser itself (`elementFromPoint` on a
grid), so a button half under another one is clicked on its free half.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..actions import Click, Drag
from ..tab import Tab

# hits(e): the grid points of e's box (clipped to the screen) at which a click reaches e, at most `most` of them
LOOK = """
const GRID = 9;
const hits = (e, most = GRID * GRID) => {
  const r = e.getBoundingClientRect();
  const [x0, y0] = [Math.max(r.left, 0), Math.max(r.top, 0)];
  const [w, h] = [Math.min(r.right, innerWidth) - x0, Math.min(r.bottom, innerHeight) - y0];
  const found = [];
  if (w <= 0 || h <= 0 || getComputedStyle(e).visibility === 'hidden') return found;
  for (let i = 0; i < GRID; i++) for (let j = 0; j < GRID; j++) {
    const [x, y] = [x0 + (i + 0.5) * w / GRID, y0 + (j + 0.5) * h / GRID];
    const top = document.elementFromPoint(x, y);
    if (top && (top === e || e.contains(top))) found.push([x, y]);
    if (found.length === most) return found;
  }
  return found;
};
"""

_FIND = f"""
(selector) => {{
  {LOOK}
  return [...document.querySelectorAll(selector)].map((e) => {{
    const r = e.getBoundingClientRect();
    const attributes = Object.fromEntries([...e.attributes].map((a) => [a.name, a.value]));
    return {{
      tag: e.tagName.toLowerCase(), text: e.textContent.replace(/\\s+/g, ' ').trim(),
      value: e.value === undefined ? '' : String(e.value), checked: Boolean(e.checked),
      box: [r.left, r.top, r.width, r.height], points: hits(e), attributes,
    }};
  }});
}}
"""


@dataclass(frozen=True)
class Element:
    """One element: `box` = (x, y, width, height) in CSS px, `points` where a click reaches it (empty = not visible)."""

    tag: str
    text: str
    value: str
    checked: bool
    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...]
    attributes: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name, "")


class ScriptLost(RuntimeError):
    """The page does not show what the script of its task expects."""


class Look:
    """Eyes and aim of a script. With `rng` the aim is spread over the inner part of an element, else it is its
    middle.
    """

    def __init__(self, tab: Tab, goal: str, rng: random.Random | None = None) -> None:
        self.tab = tab
        self.goal = goal
        self.rng = rng

    def all(self, selector: str) -> list[Element]:
        """Every element of a CSS selector, in document order."""
        found = self.tab.evaluate(_FIND, selector)
        return [
            Element(**{**raw, "box": tuple(raw["box"]), "points": tuple(map(tuple, raw["points"]))}) for raw in found
        ]

    def visible(self, selector: str, wanted: Callable[[Element], bool] = lambda _: True) -> list[Element]:
        """Those that a click can reach and that are `wanted`."""
        return [element for element in self.all(selector) if element.points and wanted(element)]

    def one(self, selector: str, wanted: Callable[[Element], bool] = lambda _: True) -> Element:
        """The first visible one. Raises `ScriptLost` when there is none."""
        for element in self.visible(selector, wanted):
            return element
        raise ScriptLost(f"no visible {selector!r} for the goal {self.goal!r}")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Ask the page itself."""
        return self.tab.evaluate(script, argument)

    def point(self, element: Element) -> tuple[float, float]:
        """Where to click `element`."""
        if not element.points:
            raise ScriptLost(f"{element.tag} {element.text!r} is not visible")
        x, y = aim(element.points, self.rng)
        return round(x, 1), round(y, 1)

    def click(self, element: Element) -> Click:
        """A click on the element."""
        return Click(*self.point(element))

    def drag(self, start: Element, end: tuple[float, float]) -> Drag:
        """A drag from the element to a point of the screen."""
        return Drag(*self.point(start), *end)


def aim(points: tuple[tuple[float, float], ...], rng: random.Random | None) -> tuple[float, float]:
    """The point nearest to the middle of `points`; with `rng` one of the inner half of them."""
    middle = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
    spread = [max(max(axis) - min(axis), 1e-6) for axis in zip(*points, strict=True)]

    def distance(point: tuple[float, float]) -> float:
        return max(abs(point[0] - middle[0]) / spread[0], abs(point[1] - middle[1]) / spread[1])

    ranked = sorted(points, key=distance)
    return rng.choice(ranked[: max(1, len(ranked) // 2)]) if rng else ranked[0]
