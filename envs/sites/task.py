"""What a site task is: a page to start on, a goal with drawn values, and how the data differ once it is done.

The checker knows no page: an episode's data (`world`) are stored in the pages' own origin, the pages change them, and
the task is solved when they are exactly what `change` makes of the first ones, nothing else touched. What a template
keeps besides (times, previews, what was read) does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

from textkv.records import checked, parse

from ..allow import AllowList
from ..tab import Tab
from ..task import Task, Verdict
from . import world
from .server import START, SiteServer, serving
from .templates import DASHBOARD, OFFICE, Template
from .world import World

SCREEN = (1280, 720)
LOAD = 30.0  # seconds
Values = dict[str, str]

# what counts of the entries of each kind; kinds that are not here count whole
_COUNTED = {
    "mail": ("folder", "trashed", "starred", "from", "to", "subject", "body"),
    "cards": ("col", "title", "desc", "labels", "assignees", "due", "priority"),
    "files": ("parent", "type", "name", "starred"),
    "users": ("email", "role", "status"),
}
_READ = "() => { try { if (window.site) site.keep(); return localStorage.getItem('agentkv'); } catch { return null; } }"


@dataclass(frozen=True)
class Site:
    """A task in a few lines.

    start: the page it begins on. goal: a text with {names}. pick: draws their values (and more, for `change`) from the
    episode's data; it may put what is to be found there into them. change: makes the data what they should become.
    steps: actions of a perfect run. template: whose pages.
    """

    start: str
    goal: str
    pick: Callable[[Random, World], Values]
    change: Callable[[World, Values], object]
    steps: int
    template: Template = OFFICE

    def values(self, goal: str) -> Values:
        """The values of a filled goal, as a reader of it knows them. Raises ValueError for another task's goal."""
        seen: set[str] = set()

        def group(match: re.Match[str]) -> str:
            name = match[1]
            again = name in seen
            seen.add(name)
            return f"(?P={name})" if again else f"(?P<{name}>.+?)"

        found = re.fullmatch(re.sub(r"\\\{(\w+)\\\}", group, re.escape(self.goal)), goal)
        if found is None:
            raise ValueError(f"{goal!r} is no goal like {self.goal!r}")
        return found.groupdict()


def find(entries: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The first entry with these values."""
    return next(entry for entry in entries if all(entry[name] == value for name, value in wanted.items()))


def draw(site: Site, seed: int, name: str) -> tuple[World, Values, World]:
    """An episode of a task: its data, the goal's values, and the data that solve it."""
    rng = Random(f"{name} {seed}")
    first = world.dashboard(rng) if site.template is DASHBOARD else world.office(rng)
    values = site.pick(rng, first)
    solved = deepcopy(first)
    site.change(solved, values)
    return first, values, solved


def facts(data: World) -> dict[str, list[str]]:
    """What counts of an episode's data, in an order that does not depend on how it came about."""
    found = {}
    for kind, entries in data.items():
        if kind in ("chat", "events"):
            entries = [[key, _counted(kind, entry)] for key, listed in entries.items() for entry in listed]
        elif isinstance(entries, dict):
            entries = list(entries.items())
        else:
            entries = [_counted(kind, entry) for entry in entries]
        found[kind] = sorted(json.dumps(entry, sort_keys=True) for entry in entries)
    return found


def _counted(kind: str, entry: Any) -> Any:
    if kind == "events":
        return [entry["title"], entry["color"]]
    if kind == "chat":
        return [entry["from"], entry["text"]]
    if kind not in _COUNTED:
        return entry
    counted = {name: entry[name] for name in _COUNTED[kind]}
    if kind == "mail":
        counted["body"] = _own_words(entry["body"])
    return {name: sorted(value) if isinstance(value, list) else value for name, value in counted.items()}


def _own_words(body: str) -> str:
    """A mail's text without the mail that it answers or forwards."""
    return " ".join(re.split(r"^--- ", body, maxsplit=1, flags=re.M)[0].split())


class SiteTask(Task):
    """The task `name` on a server of its template (None = the one of this process). `max_steps` defaults to twice a
    perfect run plus ten. Raises `SitesMissing` when the pages are not installed.
    """

    def __init__(self, name: str, site: Site, max_steps: int | None = None, server: SiteServer | None = None) -> None:
        self.id = name
        self.site = site
        self.server = server or serving(site.template)
        self.url = f"{self.server.url}/{START}"
        self.viewport = SCREEN
        self.max_steps = max_steps or 2 * site.steps + 10
        self.allow = AllowList(origins=(self.server.url,))
        self._goal = ""
        self._solved: dict[str, list[str]] = {}

    def setup(self, tab: Tab, seed: int) -> None:
        """Put the episode's data into the pages' origin and open the first page."""
        first, values, solved = draw(self.site, seed, self.id)
        self._goal, self._solved = self.site.goal.format(**values), facts(solved)
        tab.evaluate("([seed, data]) => site.start(seed, data)", [seed, first])
        tab.goto(self.server.address(self.site.start), LOAD)
        with tab.guard():  # the parts of a page that its scripts load later
            tab.page.wait_for_load_state("networkidle", timeout=LOAD * 1000)

    def goal(self, tab: Tab) -> str:
        """The goal with this episode's values."""
        return self._goal

    def verdict(self, tab: Tab, answer: str | None = None) -> Verdict:
        """Solved once the data are as they should become; until then the episode goes on."""
        stored = tab.evaluate(_READ)
        try:
            solved = stored is not None and facts(checked(parse(stored), {"data": dict})["data"]) == self._solved
        except (ValueError, TypeError, LookupError, AttributeError):  # a page may store whatever it likes
            solved = False
        return Verdict(True, 1.0, "everything is as it was asked for") if solved else Verdict(False)
