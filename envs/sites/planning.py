"""Tasks with gentelella's calendar and board."""

from __future__ import annotations

from random import Random

from .task import Site, Values, find
from .world import NAMES, TITLES, World, phrase

COLUMNS = {"To do": "todo", "In progress": "doing", "Review": "review", "Done": "done"}


def date_of(day: str | int, month: int = 4) -> str:
    """The key of a day of 2026 in the calendar's data."""
    return f"2026-{month:02}-{int(day):02}"


def add_event(data: World, date: str, title: str, color: str = "") -> None:
    """An event on a day that may have some."""
    data["events"].setdefault(date, []).append({"title": title, "color": color})


def an_event(rng: Random, data: World) -> Values:
    """An event that is there, another title for it, and a free day."""
    key = rng.choice(list(data["events"]))
    free = rng.choice([day for day in range(1, 31) if date_of(day) not in data["events"]])
    about = {"title": data["events"][key][0]["title"], "day": str(int(key[-2:])), "free": str(free)}
    new = rng.choice([title for title in TITLES if title != about["title"]])
    return about | {"new": f"{new} {rng.randint(2, 99)}", "color": rng.choice(("Blue", "Yellow", "Red", "Purple"))}


def _move(data: World, v: Values) -> None:
    data["events"][date_of(v["free"])] = data["events"].pop(date_of(v["day"]))


CALENDAR = {
    "site-calendar-add": Site(
        "calendar.html",
        "Add an event called '{new}' on April {free}, 2026.",
        an_event,
        lambda d, v: add_event(d, date_of(v["free"]), v["new"]),
        5,
    ),
    "site-calendar-colour": Site(
        "index.html",
        "Add an event called '{new}' on May {free}, 2026 to the calendar, in {color}.",
        an_event,
        lambda d, v: add_event(d, date_of(v["free"], 5), v["new"], v["color"].lower()),
        8,
    ),
    "site-calendar-rename": Site(
        "calendar.html",
        "Rename the event '{title}' in April 2026 to '{new}'.",
        an_event,
        lambda d, v: d["events"][date_of(v["day"])][0].update(title=v["new"]),
        4,
    ),
    "site-calendar-delete": Site(
        "inbox.html",
        "Delete the event '{title}' from the calendar of April 2026.",
        an_event,
        lambda d, v: d["events"].pop(date_of(v["day"])),
        3,
    ),
    "site-calendar-move": Site(
        "calendar.html", "Move the event '{title}' from April {day} to April {free}, 2026.", an_event, _move, 4
    ),
}


def a_card(rng: Random, data: World) -> Values:
    """Two cards, columns where they are not, a person, a new title."""
    one, other = rng.sample([card for card in data["cards"] if card["col"] in ("todo", "doing")], 2)
    column = rng.choice(("Review", "Done"))
    name = rng.choice([name for name in NAMES if _initials(name) not in one["assignees"]])
    about = {"one": one["title"], "other": other["title"], "column": column, "name": name}
    due = f"May {rng.randint(1, 28)}"
    priority = rng.choice([kind for kind in ("Low", "Medium", "High") if kind.lower() != one["priority"]])
    return about | {"title": phrase(rng, 3).capitalize(), "due": due, "priority": priority}


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split())


def add_card(data: World, column: str, title: str, due: str = "") -> None:
    """A new card as the board's editor makes it."""
    card = {"col": COLUMNS[column], "title": title, "desc": "", "labels": [], "assignees": []}
    data["cards"].append(card | {"due": due, "priority": "medium"})


def _move_cards(data: World, v: Values) -> None:
    for title in (v["one"], v["other"]):
        find(data["cards"], title=title)["col"] = COLUMNS[v["column"]]


BOARD = {
    "site-board-move": Site(
        "inbox.html",
        "On the kanban board, move the cards '{one}' and '{other}' to {column}.",
        a_card,
        _move_cards,
        13,
    ),
    "site-board-add": Site(
        "kanban.html",
        "Add a card called '{title}' to the column {column}, due {due}.",
        a_card,
        lambda d, v: add_card(d, v["column"], v["title"], v["due"]),
        6,
    ),
    "site-board-assign": Site(
        "kanban.html",
        "Also assign {name} to the card '{one}'.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"])["assignees"].append(_initials(v["name"])),
        3,
    ),
    "site-board-edit": Site(
        "chat.html",
        "On the kanban board, rename the card '{one}' to '{title}' and make its due date {due}.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"]).update(title=v["title"], due=v["due"]),
        7,
    ),
    "site-board-delete": Site(
        "calendar.html",
        "Delete the card '{one}' from the kanban board.",
        a_card,
        lambda d, v: d["cards"].remove(find(d["cards"], title=v["one"])),
        3,
    ),
    "site-board-priority": Site(
        "kanban.html",
        "Set the priority of the card '{one}' to {priority}.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"]).update(priority=v["priority"].lower()),
        5,
    ),
}

TASKS: dict[str, Site] = CALENDAR | BOARD
